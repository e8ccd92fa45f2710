"""The checks that every format must pass. A subclass, whose name begins with Test, writes its files by ``write``."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets
from safetensors.torch import save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]
SHAPES = [(), (0, 4), (1,), (7,), (3, 5), (2, 3, 4)]
FLIPS = 150


class FormatSuite:
    """``DTYPES``: the dtypes that the format can hold; ``NAME``: the name of its file or folder in the tests."""

    DTYPES: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64,
    )  # fmt: skip
    NAME = "in.checkpoint"

    def write(self, path: Path, tensors: Tensors) -> None:
        raise NotImplementedError

    def tensors(self, seed: int) -> Tensors:
        """Returns every dtype in every difficult shape, and one tensor of several grains."""
        make = torch.Generator().manual_seed(seed)
        made = {"layers.0.large": torch.randn(3, 70_001, generator=make)}
        for dtype in self.DTYPES:
            for shape in SHAPES:
                name = f"{str(dtype).removeprefix('torch.')}.{'x'.join(map(str, shape)) or 'scalar'}"
                made[name] = (torch.randn(shape, generator=make) * 9).to(dtype)
        return made

    def floats(self, seed: int) -> Tensors:
        return {name: tensor for name, tensor in self.tensors(seed).items() if tensor.is_floating_point()}

    def saved(self, folder: Path, tensors: Tensors, name: str = "") -> Path:
        self.write(folder / (name or self.NAME), tensors)
        return folder / (name or self.NAME)

    def files(self, path: Path) -> list[Path]:
        return sorted(path.iterdir()) if path.is_dir() else [path]

    def test_what_it_holds_is_told(self, tmp_path: Path) -> None:
        tensors = self.tensors(1)
        entries = sm.inspect(self.saved(tmp_path, tensors)).entries
        assert {name: (entry.spec.dtype.torch, entry.spec.shape) for name, entry in entries.items()} == {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
        }

    @pytest.mark.parametrize("io", ["mmap", "pread"])
    @pytest.mark.parametrize("out", ["out.safetensors", "out.pth"])
    def test_every_bit_is_kept(self, tmp_path: Path, io: str, out: str) -> None:
        tensors = self.tensors(2)
        path = self.saved(tmp_path, tensors)
        before = [each.read_bytes() for each in self.files(path)]
        sm.convert(path, tmp_path / out, io=io)
        made = load_safetensors(tmp_path / out) if out.endswith("safetensors") else torch.load(tmp_path / out)
        assert_same(made, tensors)
        assert [each.read_bytes() for each in self.files(path)] == before

    @pytest.mark.parametrize("io", ["mmap", "pread"])
    def test_a_merge_is_the_mean_rounded_once(self, tmp_path: Path, io: str) -> None:
        one, two = self.floats(3), self.floats(4)
        paths = [self.saved(tmp_path, one), self.saved(tmp_path, two, f"other-{self.NAME}")]
        sm.merge(paths, tmp_path / "out.safetensors", weights=[0.6, 0.4], io=io)
        made = load_safetensors(tmp_path / "out.safetensors")
        assert {name: octets(tensor) for name, tensor in made.items()} == {
            name: octets(mean([one[name], two[name]], [0.6, 0.4])) for name in one
        }

    def test_it_is_merged_with_a_file_of_another_format(self, tmp_path: Path) -> None:
        one, two = self.floats(5), self.floats(6)
        save_file(two, tmp_path / "two.safetensors")
        sm.merge([self.saved(tmp_path, one), tmp_path / "two.safetensors"], tmp_path / "out.safetensors")
        made = load_safetensors(tmp_path / "out.safetensors")
        assert {name: octets(tensor) for name, tensor in made.items()} == {
            name: octets(mean([one[name], two[name]], [1, 1])) for name in one
        }

    def test_a_file_that_was_cut_is_named(self, tmp_path: Path) -> None:
        """Only a file that ends in padding may lose some of it."""
        tensors = {"w": torch.ones(5, 7), "b": torch.ones(3)}
        path = self.saved(tmp_path, tensors)
        whole = max(self.files(path), key=lambda each: each.stat().st_size)
        data = whole.read_bytes()
        padding = len(data) - len(data.rstrip(b"\0"))
        for size in (len(data) - 1, len(data) - 20, len(data) // 2, len(data) // 3, 40, 9, 1, 0):
            whole.write_bytes(data[:size])
            if len(data) - size < padding - 512:
                sm.convert(path, tmp_path / "out.safetensors", overwrite=True)
                assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)
            else:
                with pytest.raises(sm.FormatError, match=whole.name):
                    sm.convert(path, tmp_path / "never.safetensors")
        assert not (tmp_path / "never.safetensors").exists()

    def test_an_injured_file_is_read_or_refused(self, tmp_path: Path) -> None:
        """A changed byte gives the tensors or one of our own errors, never another exception."""
        path = self.saved(tmp_path, {"w": torch.ones(3), "b": torch.ones(2)})
        whole = max(self.files(path), key=lambda each: each.stat().st_size)
        data, dice = whole.read_bytes(), random.Random(7)
        for _ in range(FLIPS):
            injured = bytearray(data)
            injured[dice.randrange(min(len(data), 4000))] = dice.randrange(256)
            whole.write_bytes(injured)
            try:
                index = sm.inspect(path)
            except sm.StreammergeError:
                continue
            assert all(entry.nbytes < 1 << 30 for entry in index.entries.values())

    def test_looking_at_it_imports_no_torch(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path, {"w": torch.ones(3)})
        code = f"import sys, streammerge as sm; sm.inspect({str(path)!r}); print({{'torch', 'numpy'}} & {{*sys.modules}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"
