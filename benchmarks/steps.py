"""python -m benchmarks.steps: averages the steps of a run, which torch.distributed.checkpoint wrote, beside ``cat``.

Four ranks write the steps, each a quarter of each tensor. Both commands run in turn, each from a cold page cache unless
``--warm``. Prints seconds and CPU seconds, and the ratio of the rates in each round, of which the median counts. Others
who use the machine change seconds; ``chrt -r 1 python -m benchmarks.steps`` goes before them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Measured, measure

_HERE = Path(__file__).parent
_RANKS, _WIDTH, _LAYER = 4, 768, 4 * 768 * 768 + 3 * 2048 * 768 + 2 * 768


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--megabytes", type=int, default=280, help="of each step")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--warm", action="store_true", help="the files are in the page cache")
    parser.add_argument("--files", type=Path, default=_HERE / "files", help="where steps are made and the output written")
    chosen = parser.parse_args()
    run = chosen.files / f"steps-{chosen.dtype}-{chosen.megabytes}MB"
    folders = [run / f"step-{1000 * (number + 1)}" for number in range(chosen.steps)]
    if not all((folder / ".metadata").exists() for folder in folders):
        _write(folders, chosen.megabytes, chosen.dtype)
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    out = chosen.files / "averaged.safetensors"
    cat = ["sh", "-c", 'cat "$@" > /dev/null', "cat", *map(str, files)]
    merge = [sys.executable, "-m", "streammerge", "merge", *map(str, folders), "-o", str(out), "--no-progress"]
    merge += ["--schedule", "minus-sqrt", "--memory", chosen.memory, "--overwrite"]
    ratios = []
    for number in range(chosen.rounds):
        made = dict[str, Measured]()
        for name, command in (("cat", cat), ("merge", merge))[:: -1 if number % 2 else 1]:
            os.sync()
            if chosen.warm:
                measure(cat)
            else:
                _drop_from_cache(files)
            made[name] = measure(command)
            if made[name].exit_code:
                print(made[name].output, file=sys.stderr)
                return 1
        ratios.append(made["cat"].seconds / made["merge"].seconds)
        shown = ", ".join(
            f"{name} {each.seconds:.2f} s, {each.cpu_seconds:.2f} CPU s" for name, each in sorted(made.items())
        )
        print(f"{shown}: {ratios[-1]:.2f} of the rate of cat", flush=True)
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e9:.1f} GB in {len(folders)} steps: {statistics.median(ratios):.2f} of the rate of cat")
    out.unlink()
    return 0


def _drop_from_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _shapes(elems: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of a language model of about so many numbers."""
    yield "model.embed_tokens.weight", (16_000, _WIDTH)
    for layer in range(max(round((elems - 16_000 * _WIDTH) / _LAYER), 1)):
        name = f"model.layers.{layer}"
        yield from ((f"{name}.self_attn.{part}_proj.weight", (_WIDTH, _WIDTH)) for part in "qkvo")
        yield from ((f"{name}.mlp.{part}_proj.weight", (2048, _WIDTH)) for part in ("gate", "up"))
        yield f"{name}.mlp.down_proj.weight", (_WIDTH, 2048)
        yield from ((f"{name}.{part}_layernorm.weight", (_WIDTH,)) for part in ("input", "post_attention"))
    yield "model.norm.weight", (_WIDTH,)


def _write(folders: list[Path], megabytes: int, dtype: str) -> None:
    from torch.multiprocessing.spawn import spawn

    folders[0].parent.mkdir(parents=True, exist_ok=True)
    _meeting(folders).unlink(missing_ok=True)
    spawn(_rank, (folders, megabytes, dtype), nprocs=_RANKS)  # type: ignore[no-untyped-call]


def _meeting(folders: list[Path]) -> Path:
    """Returns the file by which the ranks find each other."""
    return folders[0].parent / "ranks"


def _rank(rank: int, folders: list[Path], megabytes: int, dtype: str) -> None:
    """Writes the part of one rank of all steps, which are one model with small changes."""
    import torch.distributed
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(_meeting(folders)), _RANKS)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=_RANKS)
    mesh, kind = init_device_mesh("cpu", (_RANKS,)), getattr(torch, dtype)
    shapes = dict(_shapes(megabytes * 1_000_000 // kind.itemsize))
    generator = torch.Generator().manual_seed(rank)
    base = {name: torch.randn(-(-shape[0] // _RANKS), *shape[1:], generator=generator) for name, shape in shapes.items()}
    for folder in folders:
        tensors = {}
        for name, part in base.items():
            part.add_(torch.randn(part.shape[-1], generator=generator), alpha=1e-3)
            shape = torch.Size(shapes[name])
            strides = (shape[-1], 1)[-len(shape) :]
            tensors[name] = DTensor.from_local(part.to(kind), mesh, [Shard(0)], shape=shape, stride=strides)
        save({"model": tensors}, checkpoint_id=str(folder))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
