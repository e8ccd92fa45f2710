"""python -m benchmarks.headers: what planning costs for models of many tensors, of which only headers take disk.

Makes sharded models with real headers and data of zeros, which take no space, and plans their merge in a fresh process.
Prints seconds, CPU seconds and the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.measure import measure

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_EXPERTS, _COLUMNS = 384, 2048
_TENSOR_BYTES = 6_705_152
"""Two bytes for each of 2048 x 1637 numbers: 232,640 of them are 1.56 TB."""


def names(tensors: int) -> Iterator[str]:
    """Yields names as those of a mixture of experts."""
    for number in range(tensors):
        expert, projection = divmod(number, len(_PROJECTIONS))
        layer, expert = divmod(expert, _EXPERTS)
        yield f"model.layers.{layer}.mlp.experts.{expert}.{_PROJECTIONS[projection]}.weight"


def sparse_model(folder: Path, tensors: int = 232_640, shards: int = 160, tensor_bytes: int = _TENSOR_BYTES) -> Path:
    """Returns the folder of a sharded bf16 model whose data are holes; makes it first if it is absent."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = tensor_bytes // 2 // _COLUMNS
    shape, nbytes = [_COLUMNS, rows], 2 * _COLUMNS * rows
    weight_map: dict[str, str] = {}
    rest = names(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        count = tensors // shards + (shard < tensors % shards)
        own = list(islice(rest, count))
        header = {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": [at * nbytes, (at + 1) * nbytes]}
            for at, name in enumerate(own)
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as made:
            made.write(len(text).to_bytes(8, "little") + text)
            made.truncate(8 + len(text) + count * nbytes)
        weight_map |= dict.fromkeys(own, file)
    content = {"metadata": {"total_size": tensors * nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    (folder / "config.json").write_text(json.dumps({"architectures": ["Sparse"], "torch_dtype": "bfloat16"}))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, default=Path("benchmark-files"), help="folder of the models")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--tensors", type=int, default=232_640)
    parser.add_argument("--shards", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="512MiB")
    asked = parser.parse_args()
    models = [
        sparse_model(asked.files / f"sparse-{asked.tensors}-{asked.shards}-{number}", asked.tensors, asked.shards)
        for number in range(asked.models)
    ]
    command = [sys.executable, "-m", "streammerge", "plan", *models, "-o", "merged/", "--memory", asked.memory]
    for _ in range(asked.rounds):
        made = measure(command)
        print(f"{made.seconds:.2f} s, {made.cpu_seconds:.2f} CPU s, {made.resident >> 20} MiB, exit {made.exit_code}")
    print(made.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
