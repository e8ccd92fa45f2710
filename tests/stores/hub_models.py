"""Small models for the tests of the hub, as the files of a repository."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save


def tensors(seed: int, count: int = 60_000) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {f"layers.{n}.w": torch.randn(count, generator=chance) for n in range(4)} | {"norm": torch.ones(())}


def files(seed: int, card: str = "---\nlicense: mit\n---\n") -> dict[str, bytes]:
    """Returns a folder of two shards with its index, a configuration, a card, and a file that a loader does not read."""
    parts = list(tensors(seed).items())
    shards = {f"model-{n + 1:05}-of-00002.safetensors": dict(parts[3 * n : 3 * n + 3]) for n in range(2)}
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    made = {shard: save(held, {"format": "pt"}) for shard, held in shards.items()}
    made["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    made |= {"config.json": b'{"model_type": "llama"}', "README.md": card.encode(), ".gitattributes": b"*.bin lfs\n"}
    return made | {"extra/words.txt": b"word\n" * 100}


def written(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
