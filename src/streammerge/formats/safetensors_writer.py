"""A writer of safetensors files larger than memory, tensor by tensor, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from streammerge.errors import MismatchError, RecipeError, listed, printable
from streammerge.formats.safetensors import plan_layout
from streammerge.stores.locations import PathLike, parse
from streammerge.tensors.dtypes import parse_dtype
from streammerge.tensors.spec import TensorSpec
from streammerge.tensors.threads import one_torch_thread


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are known beforehand, one tensor at a time::

        specs = [TensorSpec("embedding.weight", "float32", (50_000, 1024)), ...]
        with SafetensorsWriter("big.safetensors", specs) as writer:
            writer.write("embedding.weight", array)
            writer.commit()

    The file appears under its name, complete and synced, when :meth:`commit` returns. Leaving the block without a
    commit leaves no file. ``metadata`` maps strings to strings; ``format: pt`` is added, because loaders look for it.
    Raises RecipeError if the output exists or metadata are not strings, MismatchError for tensors that the format
    cannot hold.
    """

    def __init__(
        self,
        path: PathLike,
        specs: Iterable[TensorSpec],
        metadata: dict[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        out = parse(path)
        specs = list(specs)
        if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
            raise RecipeError("safetensors metadata may hold strings only")
        layout = plan_layout(out.name, specs, {"format": "pt"} | (metadata or {}))
        out.check_writable(overwrite)
        self._specs = {spec.name: spec for spec in specs}
        self._offsets = layout.offsets
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._specs}
        self._open = True
        self._staging = out.stage(overwrite)
        if self._staging.resumable:
            self._staging.abort(keep=True)
            raise RecipeError(f"an interrupted merge into {printable(out)} is kept beside it; finish it first")
        try:
            self._staging.clear()
            self._file = self._staging.create(out.name, layout.size)
            for literal in layout.literals:
                self._file.write_full(literal.data, literal.offset)
        except BaseException:
            self._staging.abort()
            raise

    def write(self, name: str, array: Any, start: int = 0) -> None:
        """Writes a tensor, or the part of it that begins at element ``start`` in C order.

        ``array``: a torch tensor, a numpy array, or a buffer of the tensor's own bytes. A whole array must have the
        tensor's shape. Raises RecipeError for an unknown name, MismatchError for another dtype, shape or length.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise RecipeError(f"{printable(name)} is not among the tensors this file was planned with")
        self._check_open()
        data = _octets(array, spec, whole=start == 0)
        begin = start * spec.dtype.element_bytes
        if start < 0 or begin + len(data) > spec.nbytes:
            raise MismatchError(f"{printable(name)} has {spec.nbytes} bytes; {len(data)} at byte {begin} do not fit")
        self._file.write_full(data, self._offsets[name] + begin)
        self._written[name].append((begin, begin + len(data)))

    def commit(self) -> None:
        """Publishes the file. Raises MismatchError, and publishes nothing, if bytes are missing."""
        self._check_open()
        missing = [name for name, spans in self._written.items() if not _covers(spans, self._specs[name].nbytes)]
        if missing:
            raise MismatchError(f"write all tensors before commit; incomplete: {listed(missing)}")
        self._staging.commit(as_folder=False)
        self._open = False

    def close(self) -> None:
        """Discards the file unless it was committed. Leaving a ``with`` block calls it."""
        self._open = False
        self._staging.abort()

    def _check_open(self) -> None:
        if not self._open:
            raise RecipeError("the file is closed; make a new SafetensorsWriter")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _octets(array: Any, spec: TensorSpec, whole: bool) -> memoryview:
    """Returns the bytes of an array of the right dtype, in C order."""
    if hasattr(array, "detach"):
        import torch

        with one_torch_thread():
            tensor = array.detach().cpu().contiguous()
            _check(spec, tensor.dtype, tuple(tensor.shape), whole)
            flat = tensor.reshape(-1).view(torch.uint8)
            buffer = bytearray(flat.numel())
            if buffer:
                torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat)
        return memoryview(buffer)
    if hasattr(array, "__array_interface__"):
        _check(spec, array.dtype, tuple(array.shape), whole)
        return memoryview(array.tobytes())
    return memoryview(array).cast("B")


def _check(spec: TensorSpec, dtype: object, shape: tuple[int, ...], whole: bool) -> None:
    if parse_dtype(dtype) != spec.dtype:
        raise MismatchError(f"{printable(spec.name)} was planned as {spec.dtype.torch_name}, not {dtype}")
    numel = 1
    for size in shape:
        numel *= size
    if whole and numel == spec.numel and shape != spec.shape:
        raise MismatchError(f"{printable(spec.name)} was planned with shape {list(spec.shape)}, not {list(shape)}")


def _covers(spans: list[tuple[int, int]], nbytes: int) -> bool:
    cursor = 0
    for begin, end in sorted(spans):
        if begin > cursor:
            return False
        cursor = max(cursor, end)
    return cursor >= nbytes
