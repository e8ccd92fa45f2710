"""A merge on the nodes of a Ray cluster. Each node follows the saved plan as ``streammerge worker`` does, and claims units.

The plan, the claims and the receipts are files beside the output. Ray starts one actor on each node, and brings numbers of
less than 1 kB back. So a lost node costs the units that it was making, and the same command goes on after the death of this
process.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.errors import BudgetError, LockedError, StreammergeError, TaskError, printable
from streammerge.events import Event, Listener, Resumed, RunStarted, Suspended, TaskDone, Told
from streammerge.options.resources import Executing, Machine, Resources, Sharing
from streammerge.planning.plan import Plan
from streammerge.planning.units import Unit
from streammerge.requests.machines import for_others, joint_of, work
from streammerge.running.execution import Result, refuse_input_as_output, refuse_to_lose_files
from streammerge.running.executors import ray as cluster
from streammerge.running.executors.messages import pickled_error, unpickled_error
from streammerge.running.finishing import finish_units
from streammerge.running.process import resident_bytes
from streammerge.running.session import RunOptions
from streammerge.stores import claims
from streammerge.stores.base import Joint
from streammerge.stores.locations import parse
from streammerge.units import binary_bytes, counted

_PLAN = "plan"
_STARTUP_BYTES = 320 << 20
"""Memory of a node's process beside its budget: Python, Ray and torch."""
_POLL_SECONDS = 0.5
_NODES_SECONDS = 5.0
"""The time between two looks for nodes that are new."""
_LAST_SECONDS = 3.0
"""The time in which nodes tell their last numbers, when all units are made."""
_MOST_STARTS = 3
"""How often a process is started on one node."""
_HEAD_SECONDS = 40.0
"""How long a head that does not answer is waited for, while its nodes make units. Ray ends this process after 60."""
_WAIT_SECONDS = 15.0
"""The time after which it is told that no node has room yet."""


class NodeWork:
    """The work of one node. Ray makes an actor of it, whose calls run on threads of its own."""

    def __init__(self, place: str, machine: Mapping[str, Any]) -> None:
        self._place, self._machine = place, machine
        self._read_bytes = self._written_bytes = self._memory_bytes = 0
        self._tensor = ""

    def work(self) -> tuple[int, int, int, int, int] | bytes:
        """Makes units until all are made. Returns the bytes read and written as events tell them, the memory (the most
        above start-up, and at start-up), and the bytes that were asked of stores. Returns the pickle of an error."""
        try:
            made = work(parse(self._place), Sharing(claim=True), Machine(**self._machine), self._listen, resident_bytes())
        except BaseException as error:  # noqa: BLE001 - carried to the process that asked, whatever it is
            return pickled_error(error)
        return self._read_bytes, made.written_bytes, made.peak_bytes, made.startup_bytes, made.read_bytes

    def _listen(self, event: Event) -> None:
        if isinstance(event, TaskDone):
            self._read_bytes += event.read_bytes
            self._written_bytes += event.written_bytes
            self._tensor, self._memory_bytes = event.tensor, event.memory_bytes

    def told(self) -> tuple[str, int, int, int]:
        """Returns the last tensor, the bytes read and written so far, and the memory now."""
        return self._tensor[:200], self._read_bytes, self._written_bytes, self._memory_bytes


@dataclass(slots=True)
class _Node:
    """A node of the cluster, and what its process has told. ``working`` and ``asked``: what Ray will answer."""

    name: str
    actor: Any = None
    working: Any = None
    asked: Any = None
    started: int = 0
    told: tuple[str, int, int, int] = ("", 0, 0, 0)
    errors: list[BaseException] = field(default_factory=list)


def execute_on_nodes(
    plan: Plan,
    running: RunOptions,
    resources: Resources,
    executing: Executing,
    hashed: bool,
    resident_before: int,
) -> Result:
    """Runs a plan on the nodes of a cluster. Raises the errors of :func:`streammerge.merge`."""
    if plan.out is None:
        raise ValueError("a plan without an output cannot be run")
    began = time.perf_counter()
    out = plan.out.resolve() if plan.out.is_folder() else plan.out
    refuse_input_as_output(out, plan)
    refuse_to_lose_files(out, plan)
    said = for_others(plan, resources.workers, "threads", hashed)
    joint, units = joint_of(said), said.all_units()
    if not running.resume:
        joint.clear()
    with cluster.connected(executing.address) as ray:
        joint.begin((claims.UNITS, claims.CLAIMS, claims.MACHINES))
        place = joint.home / _PLAN
        place.replace_small(said.text().encode())
        machine = {"memory": plan.memory_bytes, "workers": resources.workers, "polite": running.polite}
        nodes = _Nodes(ray, str(place.absolute()), machine, plan, joint, units, running.listener)
        try:
            nodes.make()
        except StreammergeError as error:
            nodes.close()
            if not running.resume or not (
                isinstance(error, LockedError | TaskError) or isinstance(error.__cause__, OSError)
            ):
                joint.clear()  # another run would fail in the same way
            raise
        finally:
            nodes.close()

    def told(event: Event) -> None:
        if not isinstance(event, RunStarted | Told):  # these were told when the nodes began
            running.listener(event)

    options = dataclasses.replace(running, executor="threads", listener=told)
    plan.executor = "threads"
    result = finish_units(plan, joint, units, said.lease_seconds, options, resident_before)
    return dataclasses.replace(
        result,
        read_bytes=result.read_bytes + nodes.read_bytes,
        seconds=time.perf_counter() - began,
        peak_bytes=max(result.peak_bytes, nodes.peak_bytes),
        startup_bytes=max(result.startup_bytes, nodes.startup_bytes),
        notes=(*result.notes, *nodes.notes),
    )


class _Nodes:
    """The nodes that make the units of a plan."""

    def __init__(
        self,
        ray: Any,
        place: str,
        machine: Mapping[str, Any],
        plan: Plan,
        joint: Joint,
        units: Sequence[Unit],
        listener: Listener,
    ) -> None:
        self._ray, self._place, self._machine = ray, place, machine
        self._plan, self._joint, self._units, self._listener = plan, joint, units, listener
        self._nodes: dict[str, _Node] = {}
        self._looked = float("-inf")
        self._head, self._headless = cluster.Head(ray), False
        self.notes: list[str] = []
        self.read_bytes = self.peak_bytes = self.startup_bytes = 0
        self._needed_bytes = plan.budget.peak_bytes + _STARTUP_BYTES
        self._ended = False

    def make(self) -> None:
        """Returns when all units have receipts."""
        plan = self._plan
        for note in plan.notes:
            self._listener(Told("note", note))
        for warning in plan.warnings:
            self._listener(Told("warning", warning))
        self._listener(RunStarted(plan.read_bytes, plan.write_bytes, plan.memory_bytes, len(plan.tasks)))
        done = len(self._units) - self._left()
        if done:
            share = done / len(self._units)
            self._listener(Resumed(int(plan.layout.size * share), int(plan.read_bytes * share)))
            self._note(f"continued an interrupted run: {done} of {counted(len(self._units), 'unit')} were there")
        began = time.monotonic()
        waiting = False
        while self._left():
            if self._lacks_head():
                continue
            self._look_for_nodes()
            if (
                time.monotonic() - began > _WAIT_SECONDS
                and not waiting
                and not any(n.told[1] for n in self._nodes.values())
            ):
                waiting = True
                self._note(f"waiting for a node with {binary_bytes(self._needed_bytes)} of free memory and free CPUs")
            self._poll()
        self._ended = True
        deadline = time.monotonic() + _LAST_SECONDS
        while (
            not self._headless
            and time.monotonic() < deadline
            and any(node.working is not None for node in self._nodes.values())
        ):
            self._poll()

    def _lacks_head(self) -> bool:
        """Whether the cluster has no head now. Its nodes go on for a while, so units are counted, and Ray is asked nothing.
        Raises TaskError when that has lasted."""
        lost = self._head.lost_seconds()
        if lost and not self._headless:
            self._note("the head of the cluster does not answer; its nodes are waited for")
        self._headless = lost > 0
        if lost > _HEAD_SECONDS:
            raise TaskError(
                "the head of the Ray cluster is lost; start a cluster, and the same command goes on from the units that "
                "are made"
            ) from ConnectionError(f"no answer for {lost:.0f} seconds")
        if lost:
            time.sleep(_POLL_SECONDS)
        return self._headless

    def _left(self) -> int:
        done = {*claims.names_in(self._joint.home / claims.UNITS)}
        return sum(unit.name not in done for unit in self._units)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._listener(Told("note", text))

    # ---------------------------------------------------------------------------------------------------------- processes

    def _look_for_nodes(self) -> None:
        """Starts a process on each node that has none."""
        if time.monotonic() - self._looked < _NODES_SECONDS:
            return
        self._looked = time.monotonic()
        alive = {each["NodeID"]: each["Resources"] for each in self._ray.nodes() if each["Alive"]}
        fit = {name: has for name, has in alive.items() if has.get("memory", 0) >= self._needed_bytes and has.get("CPU", 0)}
        if alive and not fit and not self._nodes:
            raise BudgetError(
                f"no node of the cluster has {binary_bytes(self._needed_bytes)} of memory and a CPU; "
                "pass less `memory` or fewer `workers`"
            )
        for name, has in fit.items():
            node = self._nodes.setdefault(name, _Node(name))
            if node.actor is None and node.started < _MOST_STARTS:
                self._start(node, int(has["CPU"]))
        if not any(node.actor is not None for node in self._nodes.values()):
            errors = [error for node in self._nodes.values() for error in node.errors]
            lost = TaskError("all nodes of the cluster are lost; the same command goes on from the units that are made")
            lost.__cause__ = errors[-1] if errors else ConnectionError("no node answers")
            raise lost

    def _start(self, node: _Node, cpus: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        workers = min(self._machine["workers"] or cpus, cpus)
        actor = self._ray.remote(NodeWork).options(
            num_cpus=workers,
            memory=self._needed_bytes,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.name, soft=False),
        )
        node.actor = actor.remote(self._place, {**self._machine, "workers": workers})
        node.started += 1
        node.working, node.asked = node.actor.work.remote(), node.actor.told.remote()
        node.told = ("", 0, 0, 0)

    def _poll(self) -> None:
        """Takes what the nodes have told. Raises the error of a node that any other node would make too."""
        live = {node.working: node for node in self._nodes.values() if node.working is not None}
        live |= {node.asked: node for node in self._nodes.values() if node.asked is not None}
        began = time.monotonic()
        ready, _ = self._ray.wait([*live], num_returns=len(live), timeout=_POLL_SECONDS) if live else ([], [])
        for each in ready:
            node = live[each]
            try:
                answer = self._ray.get(each)
            except self._ray.exceptions.RayError as error:
                self._lose(node, error)
                continue
            if node.actor is None:
                continue
            if each is node.asked:
                self._hear(node, answer)
            else:
                self._end(node, answer)
        time.sleep(max(_POLL_SECONDS - (time.monotonic() - began), 0.0))

    def _hear(self, node: _Node, told: tuple[str, int, int, int]) -> None:
        self._count(node, told)
        node.asked = node.actor.told.remote()

    def _count(self, node: _Node, told: tuple[str, int, int, int]) -> None:
        """Tells what a node has done since it was heard last."""
        _, read_bytes, written_bytes, _ = node.told
        tensor, read_now, written_now, memory_bytes = told
        if read_now > read_bytes or written_now > written_bytes:
            node.told = told
            self.read_bytes += read_now - read_bytes
            self._listener(TaskDone(tensor, read_now - read_bytes, written_now - written_bytes, memory_bytes))

    def _end(self, node: _Node, answer: tuple[int, int, int, int, int] | bytes) -> None:
        node.working = None
        if isinstance(answer, tuple):
            read_bytes, written_bytes, peak_bytes, startup_bytes, asked_bytes = answer
            self._count(node, (node.told[0], read_bytes, written_bytes, startup_bytes + peak_bytes))
            self.read_bytes += asked_bytes - read_bytes
            self.peak_bytes = max(self.peak_bytes, peak_bytes)
            self.startup_bytes = max(self.startup_bytes, startup_bytes)
            return
        error = unpickled_error(answer)
        if isinstance(error, StreammergeError) and not isinstance(error.__cause__, OSError):
            raise error
        self._lose(node, error)

    def _lose(self, node: _Node, error: BaseException) -> None:
        if node.actor is None:
            return
        self._kill(node)
        node.errors.append(error)
        if not self._ended:
            said = printable(str(error).partition("\n")[0], 120)
            self._note(f"a node was lost, and others take over what it was making ({type(error).__name__}: {said})")

    def _kill(self, node: _Node) -> None:
        actor, node.actor, node.working, node.asked = node.actor, None, None, None
        if actor is not None and not self._headless:
            self._ray.kill(actor)

    def close(self) -> None:
        """Ends the processes on all nodes."""
        for node in self._nodes.values():
            self._kill(node)
        if not self._ended:
            self._ended = True
            left = self._left()
            made = (len(self._units) - left) / len(self._units)
            size = self._plan.layout.size
            self._listener(Suspended(int(size * made), size))
