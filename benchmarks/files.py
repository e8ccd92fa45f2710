"""The checkpoints that benchmarks merge: made on first use, equal in every run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.headers import sparse_model

_BLOCK_ELEMS = 8_388_593  # odd, so that no two tensors of a file begin alike
_NAMES = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}
HIDDEN = 2048


@dataclass(frozen=True, slots=True)
class Model:
    """One of several fine-tunes of one model; ``number`` 0 is the base.

    ``shape``: "layers" as in a language model, "giant" for a single tensor, "small" for many of 64 KiB, "sparse" for a
    folder of 232,640 tensors whose data are holes. ``form``: safetensors, pth, or legacy (torch before 1.6).
    """

    gigabytes: float = 2.0
    number: int = 0
    dtype: str = "bfloat16"
    shape: str = "layers"
    form: str = "safetensors"

    @property
    def file_name(self) -> str:
        if self.shape == "sparse":
            return f"sparse-{self.number}"
        ending = "safetensors" if self.form == "safetensors" else "pth"
        return f"{self.shape}-{self.dtype}-{self.gigabytes:g}GB-{self.form}-{self.number}.{ending}"

    @property
    def element_bytes(self) -> int:
        return _NAMES[self.dtype][1]

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields names and shapes of its tensors."""
        elems = int(self.gigabytes * 1e9) // self.element_bytes
        if self.shape == "giant":
            yield "giant.weight", (elems,)
        elif self.shape == "small":
            for number in range(elems * self.element_bytes >> 16):
                yield f"blocks.{number // 64}.{number % 64}.weight", ((1 << 16) // self.element_bytes,)
        else:
            yield "model.embed_tokens.weight", (16_000, HIDDEN)
            per_layer = 12 * HIDDEN * HIDDEN + HIDDEN
            for layer in range((elems - 16_000 * HIDDEN) // per_layer):
                for name, rows in (("q", 1), ("k", 1), ("v", 1), ("o", 1), ("up", 4), ("down", 4)):
                    yield f"model.layers.{layer}.{name}.weight", (rows * HIDDEN, HIDDEN)
                yield f"model.layers.{layer}.norm.weight", (HIDDEN,)

    def made(self, folder: Path) -> Path:
        """Returns the file in this folder; makes it first if it is absent."""
        path = folder / self.file_name
        if self.shape == "sparse":
            return sparse_model(path)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            self._write_safetensors(partial) if self.form == "safetensors" else self._write_pickled(partial)
            partial.rename(path)
        return path

    def _write_safetensors(self, path: Path) -> None:
        header, cursor = {}, 0
        for name, shape in self.shapes():
            end = cursor + math.prod(shape) * self.element_bytes
            header[name] = {"dtype": _NAMES[self.dtype][0], "shape": shape, "data_offsets": [cursor, end]}
            cursor = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        block = self._block().view(torch.uint8).numpy().data
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while cursor:
                cursor -= file.write(block[:cursor])

    def _write_pickled(self, path: Path) -> None:
        block = self._block()
        tensors, cursor = {}, 0
        for name, shape in self.shapes():
            elems = math.prod(shape)
            repeats = -(-(cursor + elems) // len(block))
            tensors[name] = block.repeat(repeats)[cursor : cursor + elems].clone().reshape(shape)
            cursor = (cursor + elems) % len(block)
        whole = {"model": tensors, "step": 1000 * self.number, "epoch": self.number, "model_loss": 2.5}
        torch.save(whole, path, _use_new_zipfile_serialization=self.form != "legacy")

    def _block(self) -> torch.Tensor:
        """Returns the numbers that fill its tensors: those of the base plus small changes."""
        return _numbers(self.number).to(getattr(torch, self.dtype))


@cache
def _numbers(number: int) -> torch.Tensor:
    base = torch.randn(_BLOCK_ELEMS, generator=torch.Generator().manual_seed(0)) * 0.02
    return base + torch.randn(_BLOCK_ELEMS, generator=torch.Generator().manual_seed(number)) * 0.002 if number else base
