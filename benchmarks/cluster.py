"""A merge on many machines, computed: the scheduler is the real one, the times of units are measured.

python -m benchmarks.cluster measure FOLDER     measures units on this machine -> benchmarks/cluster.json
python -m benchmarks.cluster simulate           prints the tables of docs/cluster.md

The model to merge is made of headers only: its files are sparse. Its plan, its units, and the order in which machines claim
them are those of the library. Time passes in a simulation. A unit takes as long as the slowest of three: the arithmetic of
the machine's cores, its network, and its part of the storage. Arithmetic is drawn from the measured times of real units.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.planning.plan import Plan
from streammerge.planning.units import Unit, cut, share

MEASURED = Path(__file__).with_name("cluster.json")
GB, TB = 1e9, 1e12


# ------------------------------------------------------------------------------------------------------------ the model


def shapes(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields the matrices of a mixture of experts. 61 layers of 256 experts are 1.34 TB in bfloat16."""
    yield "model.embed_tokens.weight", (129_280, 7168)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, shape in (("q_a", (1536, 7168)), ("q_b", (24_576, 1536)), ("kv_a", (576, 7168)), ("kv_b", (32_768, 512))):
            yield f"{at}.self_attn.{name}_proj.weight", shape
        yield f"{at}.self_attn.o_proj.weight", (7168, 16_384)
        for expert in range(experts):
            for name, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048))):
                yield f"{at}.mlp.experts.{expert}.{name}_proj.weight", shape
    yield "lm_head.weight", (129_280, 7168)


def write_sparse(folder: Path, layers: int, experts: int, shard_bytes: float = 5e9) -> None:
    """Writes a model whose files have headers and no blocks."""
    folder.mkdir(parents=True)
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, (rows, columns) in shapes(layers, experts):
        nbytes = 2 * rows * columns
        if size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [size, size + nbytes]}
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header = json.dumps(tensors, separators=(",", ":")).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + max(each["data_offsets"][1] for each in tensors.values()))
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")


@dataclass(frozen=True)
class Planned:
    """What the plan of a large merge says."""

    units: list[Unit]
    read_bytes: int
    write_bytes: int
    tensors: int


def planned(folder: Path, method: str = "linear", layers: int = 61, experts: int = 256) -> Planned:
    """Plans the merge of two such models into a folder, and cuts it. Each of ``METHODS`` reads both."""
    import streammerge as sm

    for name in "ab":
        if not (folder / name).exists():
            write_sparse(folder / name, layers, experts)
    base = {"base": folder / "a"} if method != "linear" else {}
    more: dict[str, Any] = {"memory": "4GiB", "workers": 16, "method": method, **base}
    plan = sm.plan([folder / "a", folder / "b"], f"{folder}/out/", **more)
    if not isinstance(plan, Plan):
        raise TypeError("a plan of models")
    return Planned(cut(plan.tasks), plan.read_bytes, plan.write_bytes, len(plan.tasks))


# --------------------------------------------------------------------------------------------------------- measurement


def measure(folder: Path, gigabytes: float = 0.6) -> dict[str, Any]:
    """Measures real units: CPU seconds for each GB that they cost, and what a claim, a receipt and the finish take."""
    import torch
    from safetensors.torch import save_file

    import streammerge as sm
    from streammerge.planning import units as units_
    from streammerge.running.unit_receipts import UnitInMaking
    from streammerge.stores import claims
    from streammerge.stores.locations import parse

    torch.set_num_threads(1)
    units_._LEAST_COST = 96 << 20  # several batches, so that units end one by one
    for number in (1, 2):
        make = torch.Generator().manual_seed(number)
        tensors = {
            f"{n}.weight": (torch.randn(2048, 1024, generator=make) * 0.02).bfloat16()
            for n in range(int(gigabytes * 1e9) >> 22)
        }
        save_file(tensors, folder / f"{number}.safetensors")
    said: dict[str, Any] = {"cpu": os.uname().machine, "methods": {}}
    inputs = [folder / "1.safetensors", folder / "2.safetensors"]
    add = UnitInMaking.add
    times: list[float] = []
    last = [0.0]

    def timed(self: Any, *given: Any) -> bool:
        whole = add(self, *given)
        if whole:
            now = time.process_time()
            times.append((now - last[0]) / self.unit.cost * GB)
            last[0] = now
        return whole

    UnitInMaking.add = timed  # type: ignore[assignment, method-assign]
    for method in METHODS:
        more: dict[str, Any] = {"method": method, "base": inputs[0]} if method != "linear" else {}
        plan = folder / f"{method}.plan"
        made = sm.plan(inputs, folder / f"{method}.safetensors", save=plan, workers=1, **more)
        times.clear()
        began = last[0] = time.process_time()
        result = sm.worker(plan, share="1/1", workers=1, executor="threads")
        worker_seconds = time.process_time() - began
        began = time.process_time()
        sm.finish(plan)
        said["methods"][method] = {
            "seconds_per_gb": [round(each, 4) for each in times[1:]],
            "worker_cpu_seconds": round(worker_seconds, 2),
            "finish_cpu_seconds": round(time.process_time() - began, 2),
            "units": result.share,
            "read_bytes": made.read_bytes,
            "write_bytes": made.write_bytes,
        }
    joint = parse(folder / "claims.safetensors").join("measured")
    with claims.Claims(joint, 30.0) as crew:
        began = time.perf_counter()
        for number in range(200):
            crew.take(str(number))
        said["claim_seconds"] = (time.perf_counter() - began) / 200
        for number in range(200):
            claims.finish(joint.home, str(number), b"x" * 800)
        began = time.perf_counter()
        said["receipts"] = len([*claims.finished(joint.home)])
        said["receipt_seconds"] = (time.perf_counter() - began) / 200
    joint.clear()
    began = time.process_time()
    planned(folder / "large")
    said["plan_cpu_seconds"] = round(time.process_time() - began, 1)
    UnitInMaking.add = add  # type: ignore[method-assign]
    return said


# ---------------------------------------------------------------------------------------------------------- simulation


@dataclass(frozen=True)
class Machines:
    """The machines of a merge and their storage. Rates are bytes per second.

    ``seconds_per_gb``: measured CPU seconds of units, of which one is drawn for each unit. ``start_seconds``: until a
    machine claims its first unit. ``claim_seconds``: until a unit is claimed; receipts are written while the next unit is
    made. ``receipt_seconds``: until a receipt is read. ``deaths_per_hour``: of each machine.
    """

    nodes: int
    cores: int = 16
    network: float = 12.5 * GB
    storage: float = 40 * GB
    seconds_per_gb: Sequence[float] = (0.3,)
    start_seconds: float = 10.0
    claim_seconds: float = 0.005
    receipt_seconds: float = 0.001
    deaths_per_hour: float = 0.0
    lease_seconds: float = 30.0
    claims: bool = True


@dataclass(frozen=True)
class Run:
    """What a simulated merge took. ``busy``: the share of the machines' time in which they made units. ``lost``: units that
    died with a machine."""

    seconds: float
    busy: float
    lost: int


def simulate(plan: Planned, machines: Machines, seed: int = 0) -> Run:
    """Lets machines claim the units of a plan, or make their shares, until all are made."""
    draw = random.Random(seed)
    units = {unit.number: unit for unit in plan.units}
    scale = (plan.read_bytes + plan.write_bytes) / max(sum(unit.cost for unit in plan.units), 1)
    orders = [iter(_order(plan.units, machines, node, draw)) for node in range(machines.nodes)]
    taken: dict[int, float] = {}
    """Unit -> when it may be claimed again: never, unless its machine died."""
    done: set[int] = set()
    busy, lost, end = 0.0, 0, 0.0
    dead: list[tuple[float, int]] = []
    waiting: list[tuple[float, int]] = [(machines.start_seconds, node) for node in range(machines.nodes)]
    heapq.heapify(waiting)
    active = machines.nodes
    while waiting and len(done) < len(units):
        now, node = heapq.heappop(waiting)
        unit = _next(orders[node], units, taken)
        if unit is None and dead and dead[0][0] <= now:
            unit = units[heapq.heappop(dead)[1]]
        if unit is None:
            active -= 1
            if dead:  # it waits until the lease of a dead machine is over
                heapq.heappush(waiting, (max(dead[0][0], now), node))
                active += 1
            continue
        taken[unit.number] = now
        nbytes = unit.cost * scale
        rate = min(machines.network, machines.storage / max(active, 1))
        cpu = unit.cost / GB * draw.choice(machines.seconds_per_gb) / machines.cores
        seconds = max(cpu, nbytes / rate) + machines.claim_seconds
        if machines.deaths_per_hour and draw.random() < seconds * machines.deaths_per_hour / 3600:
            lost += 1
            at = now + seconds * draw.random()
            heapq.heappush(dead, (at + machines.lease_seconds, unit.number))
            heapq.heappush(waiting, (at + machines.start_seconds, node))  # another machine takes its place
            continue
        busy += seconds
        end = max(end, now + seconds)
        done.add(unit.number)
        heapq.heappush(waiting, (now + seconds, node))
    finish = machines.start_seconds + len(units) * machines.receipt_seconds
    return Run(end + finish, busy / (machines.nodes * end), lost)


def _order(units: Sequence[Unit], machines: Machines, node: int, draw: random.Random) -> Sequence[Unit]:
    if not machines.claims:
        return share(units, node, machines.nodes)
    from streammerge.requests import machines as real

    urandom, os.urandom = os.urandom, draw.randbytes
    try:
        return real._from_middle(units)
    finally:
        os.urandom = urandom


def _next(order: Iterator[Unit], units: dict[int, Unit], taken: dict[int, float]) -> Unit | None:
    for unit in order:
        if unit.number not in taken:
            return unit
    return None


# --------------------------------------------------------------------------------------------------------------- tables

METHODS = ("linear", "ties")
NODES = (1, 8, 64)
STORAGES = {"NFS server, 2.5 GB/s": 2.5 * GB, "parallel file system, 40 GB/s": 40 * GB, "object store, 400 GB/s": 400 * GB}
_GET, _PUT = 0.40e-6, 5.0e-6
"""Dollars for a request to a large object store, as they are usually listed. Traffic within a region is free there."""
_NODE_HOUR = 0.80
"""Dollars for an hour of a machine with 16 cores and 12.5 Gbit/s to 100 Gbit/s."""
_BLOCK_BYTES, _PART_BYTES = 8 << 20, 8 << 20
_BEAT_SECONDS = 5.0
_LEAST_SECONDS = {"claim_seconds": 0.005, "receipt_seconds": 0.001}
"""What small files take on storage behind a network. Those of a local disk were measured."""


def tables(plans: dict[str, Planned], measured: dict[str, Any]) -> str:
    """Returns the tables of docs/cluster.md."""
    plan = plans["linear"]
    lines = [
        f"Two models of {plan.write_bytes / TB:.2f} TB and {plan.tensors:,} tensors: {plan.read_bytes / TB:.2f} TB are "
        f"read and {plan.write_bytes / TB:.2f} TB are written, in {len(plan.units):,} units of up to 1 GB. A machine makes "
        f"the plan again in {measured['plan_cpu_seconds']:.1f} CPU seconds (measured).",
        "",
    ]
    small = {name: max(measured[name], least) for name, least in _LEAST_SECONDS.items()}
    for method, own in plans.items():
        said = measured["methods"][method]
        rates = said["seconds_per_gb"]
        common = Machines(1, seconds_per_gb=rates, **small)
        cores = _cpu_rate(own, common)
        lines += [
            f"**{method}**, {len(own.units):,} units: {statistics.median(rates):.2f} CPU seconds for each GB of cost (the "
            f"median of {len(rates)} units; {min(rates):.2f} to {max(rates):.2f}). So {common.cores} cores read and write "
            f"{cores / GB:.0f} GB/s.",
            "",
            "| storage | " + " | ".join(f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES) + " | full with |",
            "|---|" + "---|" * (len(NODES) + 1),
        ]
        for name, storage in STORAGES.items():
            runs = [simulate(own, replace(common, nodes=nodes, storage=storage)) for nodes in NODES]
            full = -(-storage // min(common.network, cores))
            cells = " | ".join(f"{run.seconds / 60:.1f} min" for run in runs)
            lines.append(f"| {name} | {cells} | {full:.0f} node{'s' * (full > 1)} |")
        lines.append("")
    lines += [*_deaths(plan, measured), "", *_costs(plan, measured)]
    return "\n".join(lines)


def _deaths(plan: Planned, measured: dict[str, Any]) -> list[str]:
    calm = Machines(64, storage=400 * GB, seconds_per_gb=measured["methods"]["linear"]["seconds_per_gb"])
    lossy = simulate(plan, replace(calm, deaths_per_hour=10.0))
    fixed = simulate(plan, replace(calm, claims=False))
    return [
        f"64 nodes at the object store, of which each dies ten times an hour: {lossy.lost} units are lost and made again, "
        f"in {lossy.seconds / 60:.1f} instead of {simulate(plan, calm).seconds / 60:.1f} minutes. With fixed "
        f"shares instead of claims, and no deaths: {fixed.seconds / 60:.1f} minutes."
    ]


def _costs(plan: Planned, measured: dict[str, Any]) -> list[str]:
    rates = measured["methods"]["linear"]["seconds_per_gb"]
    lines = [
        "| object store, linear | requests for data | small files | requests | machines |",
        "|---|---|---|---|---|",
    ]
    reads, writes = plan.read_bytes / _BLOCK_BYTES, plan.write_bytes / _PART_BYTES
    for nodes in NODES:
        run = simulate(plan, Machines(nodes, storage=400 * GB, seconds_per_gb=rates))
        small = 2 * len(plan.units) + nodes * run.seconds / _BEAT_SECONDS
        money = reads * _GET + (writes + small) * _PUT
        hours = nodes * run.seconds / 3600
        count = f"{nodes} node{'s' * (nodes > 1)}"
        lines.append(f"| {count} | {reads + writes:,.0f} | {small:,.0f} | ${money:.2f} | ${hours * _NODE_HOUR:.2f} |")
    read, written = TB / _BLOCK_BYTES, TB / _PART_BYTES
    return [
        *lines,
        "",
        f"For each TB read: {read:,.0f} requests, ${read * _GET:.2f}. For each TB written: {written:,.0f} requests, "
        f"${written * _PUT:.2f}.",
    ]


def _cpu_rate(plan: Planned, machines: Machines) -> float:
    """Returns the bytes per second that the cores of one machine read and write."""
    cost = sum(unit.cost for unit in plan.units)
    seconds = cost / GB * statistics.mean(machines.seconds_per_gb) / machines.cores
    return (plan.read_bytes + plan.write_bytes) / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "simulate"))
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.what == "measure":
            MEASURED.write_text(json.dumps(measure(Path(folder)), indent=1) + "\n")
        else:
            print(tables({each: planned(Path(folder), each) for each in METHODS}, json.loads(MEASURED.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
