"""etcd's protobuf messages: the part of its rpc.proto and kv.proto that leases need.

Owns: the field numbers, and the classes made from them. No I/O; any thread.

The classes are built at import from the text below. Generated code would work with only a few major
versions of protobuf, and would not be readable.

The text is parsed as proto2. The encoding of proto2 differs from etcd's proto3 in one case: proto2
sends a field that is set to 0. This difference is needed, because ``version = 0`` in a Compare must
be sent: etcd takes a comparison without a value as true.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

_PACKAGE = "udptun.etcd"
_PROTO = """
message ResponseHeader { uint64 cluster_id = 1; int64 revision = 3; }
message KeyValue {
    bytes key = 1; int64 create_revision = 2; int64 mod_revision = 3; bytes value = 5;
    int64 lease = 6;
}

message RangeRequest { bytes key = 1; bytes range_end = 2; }
message RangeResponse { ResponseHeader header = 1; repeated KeyValue kvs = 2; }
message PutRequest { bytes key = 1; bytes value = 2; int64 lease = 3; }
message DeleteRangeRequest { bytes key = 1; bytes range_end = 2; }

message Compare {
    int32 result = 1; int32 target = 2; bytes key = 3; int64 version = 4; int64 mod_revision = 6;
}
message RequestOp { PutRequest request_put = 2; DeleteRangeRequest request_delete_range = 3; }
message TxnRequest { repeated Compare compare = 1; repeated RequestOp success = 2; }
message TxnResponse { ResponseHeader header = 1; bool succeeded = 2; }

message LeaseGrantRequest { int64 TTL = 1; }
message LeaseGrantResponse { ResponseHeader header = 1; int64 ID = 2; int64 TTL = 3; }
message LeaseRevokeRequest { int64 ID = 1; }
message LeaseRevokeResponse { ResponseHeader header = 1; }
message LeaseTimeToLiveRequest { int64 ID = 1; }
message LeaseTimeToLiveResponse { ResponseHeader header = 1; int64 ID = 2; int64 TTL = 3; }

message Event { int32 type = 1; KeyValue kv = 2; }
message WatchCreateRequest { bytes key = 1; bytes range_end = 2; int64 start_revision = 3; }
message WatchProgressRequest { }
message WatchRequest {
    WatchCreateRequest create_request = 1; WatchProgressRequest progress_request = 3;
}
message WatchResponse {
    ResponseHeader header = 1; bool created = 3; bool canceled = 4; int64 compact_revision = 5;
    string cancel_reason = 6; repeated Event events = 11;
}

message AuthenticateRequest { string name = 1; string password = 2; }
message AuthenticateResponse { ResponseHeader header = 1; string token = 2; }
"""
_SCALARS = {"bool", "bytes", "int32", "int64", "string", "uint64"}


def _make_classes() -> dict[str, Any]:
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="udptun/etcd.proto", package=_PACKAGE, syntax="proto2"
    )
    for name, body in re.findall(r"message (\w+) \{(.*?)\}", _PROTO, re.DOTALL):
        message = file.message_type.add(name=name)
        for repeated, kind, field, number in re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", body):
            added = message.field.add(
                name=field, number=int(number),
                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
            )
            if kind in _SCALARS:
                added.type = getattr(field_type, f"TYPE_{kind.upper()}")
            else:
                added.type = field_type.TYPE_MESSAGE
                added.type_name = f".{_PACKAGE}.{kind}"
    # Not the default pool, because all generated code in the process shares the default pool.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{_PACKAGE}.{message.name}")
        )
        for message in file.message_type
    }


_CLASSES = _make_classes()

Compare = _CLASSES["Compare"]
DeleteRangeRequest = _CLASSES["DeleteRangeRequest"]
PutRequest = _CLASSES["PutRequest"]
RangeRequest = _CLASSES["RangeRequest"]
RequestOp = _CLASSES["RequestOp"]
TxnRequest = _CLASSES["TxnRequest"]
WatchCreateRequest = _CLASSES["WatchCreateRequest"]
WatchProgressRequest = _CLASSES["WatchProgressRequest"]
WatchRequest = _CLASSES["WatchRequest"]
WatchResponse = _CLASSES["WatchResponse"]

COMPARE_VERSION, COMPARE_MOD = 0, 2  # Compare.target
EVENT_DELETE = 1  # Event.type


class Method(NamedTuple):
    """A method of etcd's gRPC services: its path, and the classes of its request and response."""

    path: str
    request: Any
    response: Any


def _method(service: str, name: str) -> Method:
    return Method(f"/etcdserverpb.{service}/{name}",
                  _CLASSES[f"{name}Request"], _CLASSES[f"{name}Response"])


RANGE = _method("KV", "Range")
TXN = _method("KV", "Txn")
LEASE_GRANT = _method("Lease", "LeaseGrant")
LEASE_REVOKE = _method("Lease", "LeaseRevoke")
LEASE_TIME_TO_LIVE = _method("Lease", "LeaseTimeToLive")
AUTHENTICATE = _method("Auth", "Authenticate")
WATCH = _method("Watch", "Watch")
