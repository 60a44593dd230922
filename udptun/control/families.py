"""The metric families that the forwarder and the node daemon have in common.

Owns the labels for quantiles and for peers. Imports prometheus_client, which needs megabytes of
memory, so import this module at the first scrape. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .peer_series import Counters

QUANTILES = (0.5, 0.95, 1.0)


def quantile_gauge(
    name: str, text: str, labels: Sequence[str],
    measured: Iterable[tuple[Sequence[str], Iterable[float | None]]],
) -> GaugeMetricFamily:
    """Return a family with the quantiles of measured values. Without a value, there is no sample.

    measured  for each set of label values: the values of all peers; None: not measured
    """
    family = GaugeMetricFamily(name, text, labels=[*labels, "quantile"])
    for of_labels, found in measured:
        values = sorted(value for value in found if value is not None)
        for quantile in QUANTILES if values else ():
            value = values[math.ceil(quantile * len(values)) - 1]
            family.add_metric([*of_labels, f"{quantile:g}"], value)
    return family


def transfer_counters(
    prefix: str, labels: Mapping[str, str], counters: Mapping[str, Counters]
) -> Iterator[Metric]:
    """Yield the packets and bytes of each peer.

    labels    further labels, with their values
    counters  by the value of the label ``peer``
    """
    packets, size = (
        CounterMetricFamily(f"{prefix}_peer_{unit}", text, labels=["peer", *labels, "direction"])
        for unit, text in (
            ("packets", "Inner packets that were sent to the peer (encap) or came from it."),
            ("bytes", "The same in bytes of UDP payload.")))
    for peer, (sent, sent_bytes, received, received_bytes) in counters.items():
        for direction, n, n_bytes in (("encap", sent, sent_bytes),
                                      ("decap", received, received_bytes)):
            packets.add_metric([peer, *labels.values(), direction], n)
            size.add_metric([peer, *labels.values(), direction], n_bytes)
    yield packets
    yield size
