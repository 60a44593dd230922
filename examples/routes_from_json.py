"""Replace the route table by a JSON file: routes_from_json.py FILE

The file has a subnet and an address for each host: {"10.244.2.0/24": "192.0.2.2"}. If the
file has a mistake, no route changes.
"""

import json
import sys
from pathlib import Path

from udptun import ControlClient, FieldError, Route


def main(file: str) -> int:
    hosts = json.loads(Path(file).read_text())
    try:
        routes = [Route.make(subnet, address, probe=True) for subnet, address in hosts.items()]
    except FieldError as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 1
    with ControlClient() as client:
        diff = client.replace_routes(routes)
    print(f"{diff.added} added, {diff.changed} changed, {diff.removed} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
