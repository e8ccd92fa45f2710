"""The nodes of a Ray cluster. A merge on them follows a saved plan (``requests.cluster``). Ray only starts a process on
each node and tells how far it is.

Ray (the extra ``streammerge[ray]``) is imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.running.executors.base import Executor, Result, Unit, Work
from streammerge.running.executors.registry import executor

LEAST_STORE_BYTES = 80 << 20
"""The least object store that Ray accepts. No tensor goes through it."""
_LOOPBACK = "127.0.0.1"
_ANSWER_SECONDS = 5.0


@executor("ray")
class RayExecutor(Executor):
    """Stands for the nodes of a cluster, which share nothing with this process but files."""

    def run(self, work: Work[Unit, Result], units: Iterable[Unit], backlog: int = 64) -> Generator[Result, None, None]:
        raise RecipeError('`executor="ray"` makes merges and conversions only; use `executor="processes"` here')


def imported() -> Any:
    """Imports Ray. Raises RecipeError if it is absent."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            "`executor=\"ray\"` needs the package ray; install it with `pip install 'streammerge[ray]'`"
        ) from error
    return ray


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connects to a cluster, and gives Ray. Starts one on this machine if there is no address, here or in RAY_ADDRESS.

    Keeps a connection that the program has already. Raises RecipeError if there is no cluster at the address.
    """
    ray = imported()
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "configure_logging": True, "logging_level": "error"}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        with _on_loopback(address):
            ray.init(address=address, **quiet)
    else:
        own = {"object_store_memory": LEAST_STORE_BYTES, "include_dashboard": False, "_node_ip_address": _LOOPBACK}
        ray.init(address="local", **own, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _on_loopback(address: str) -> Iterator[None]:
    """Raises RecipeError if nothing listens at an address, where Ray would try for minutes.

    Ray takes the outward address of this machine for 127.0.0.1. Inside the block it does not, if only 127.0.0.1 answers.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdigit():  # "auto", or the address of a proxy
        yield
        return
    from ray._private import ray_constants as constants
    from ray.util import get_node_ip_address

    local = host in (_LOOPBACK, "localhost")
    outward = get_node_ip_address() if local else host
    if _answers(outward, int(port)):
        yield
        return
    if not local or not _answers(_LOOPBACK, int(port)):
        raise RecipeError(f"there is no Ray cluster at {printable(address)}; give the `address` of its head")
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


class Head:
    """The head of the cluster to which this process is connected.

    Ray waits a minute for one that is gone, and then ends the process without a word. So it is looked for before Ray is
    asked.
    """

    def __init__(self, ray: Any) -> None:
        host, _, port = str(getattr(ray.get_runtime_context(), "gcs_address", "")).rpartition(":")
        self._place = (host, int(port)) if host and port.isdigit() else None
        self._lost: float | None = None

    def lost_seconds(self) -> float:
        """Returns for how long the head has not answered, 0 if it does."""
        if self._place is None or _answers(*self._place):  # without a place: through a proxy, which Ray watches
            self._lost = None
            return 0.0
        now = time.monotonic()
        self._lost = self._lost or now
        return max(now - self._lost, 1e-9)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _ANSWER_SECONDS):
            return True
    except OSError:
        return False
