"""A merge on the nodes of a Ray cluster, in a process that a test may kill.

python ray_driver.py ADDRESS OUT SECONDS LEASE_SECONDS OPTIONS

``SECONDS`` pass after each piece. ``OPTIONS``: those of a merge, as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import streammerge as sm
from streammerge.events import Event
from streammerge.planning import saved, units
from streammerge.requests import cluster


class SlowNode(cluster.NodeWork):
    """A node that waits after each piece."""

    seconds = 0.0

    def _listen(self, event: Event) -> None:
        super()._listen(event)
        time.sleep(self._machine_seconds())

    def _machine_seconds(self) -> float:
        return type(self).seconds


def main(address: str, out: str, seconds: str, lease_seconds: str, options: str) -> None:
    saved.LEASE_SECONDS = float(lease_seconds)
    units._LEAST_COST = 200_000
    cluster._HEAD_SECONDS = 3.0
    SlowNode.seconds = float(seconds)
    cluster.NodeWork = SlowNode  # type: ignore[misc]

    def tell(event: Event) -> None:
        print(type(event).__name__, flush=True)

    try:
        result = sm.merge(out=out, executor="ray", address=address or None, listener=tell, **json.loads(options))
    except sm.StreammergeError as error:
        print(json.dumps({"error": type(error).__name__, "said": str(error)}))
    else:
        print(json.dumps({"notes": list(result.notes), "read_bytes": result.read_bytes, "peak_bytes": result.peak_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
