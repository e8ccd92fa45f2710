"""Writes the tensors of an adapter that is made: into a folder in PEFT's form, or into one file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from streammerge.errors import printable
from streammerge.factoring.documents import CONFIG, WEIGHTS
from streammerge.factoring.layers import LayerReport
from streammerge.factoring.recording import SUM, Record
from streammerge.formats.base import LayoutFile
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.formats.safetensors import plan_layout
from streammerge.planning.receipt import escaped
from streammerge.recipe.document import to_json
from streammerge.stores.base import Output, Staging
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, ranges

COPY_BYTES = 1 << 20
Piece = tuple[TensorSpec, Callable[[int, int], memoryview]]
"""A tensor of the file, with a function that reads a range of its bytes."""


def write_folder(
    staging: Staging, pieces: Sequence[Piece], text: bytes, record: Record | None, layers: Sequence[LayerReport]
) -> int:
    """Writes tensors and PEFT's configuration ``text``. Returns the bytes of all files."""
    layout = plan_layout(WEIGHTS, [spec for spec, _ in pieces], {"format": "pt"})
    file = staging.create(WEIGHTS, layout.size)
    head = b"".join(literal.data for literal in layout.literals)
    sums = _write_tensors(file, layout, pieces)
    _write_head(file, layout, head)
    files = {CONFIG: text}
    if record is not None:
        files |= record.files({WEIGHTS: [*sums, SUM.update(head)], CONFIG: [SUM.update(text)]}, layers)
    for name, content in files.items():
        staging.create(name, len(content)).write_full(content, 0)
    return layout.size + sum(map(len, files.values()))


def write_file(
    staging: Staging,
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    record: Record | None,
    layers: Sequence[LayerReport],
) -> int:
    """Writes tensors into the one file of an output, with recipe and receipt in its metadata. Returns its bytes."""
    specs, made = [spec for spec, _ in pieces], dict(metadata)
    blank = None
    if record is not None:
        blank = record.blank(sum(spec.nbytes > 0 for spec in specs) + 1, layers)
        made |= {RECIPE_KEY: to_json(record.receipt.recipe), RECEIPT_KEY: blank.text()}
    layout = plan_layout(staging.out.name, specs, made)
    file = staging.create(staging.out.name, layout.size)
    head = b"".join(literal.data for literal in layout.literals)
    sums = [*_write_tensors(file, layout, pieces), SUM.update(head)]
    if blank is not None:
        final = blank.filled(dict.fromkeys(blank.checksums, sums), {})
        head = head.replace(escaped(blank.text()), escaped(final.text()), 1)
    _write_head(file, layout, head)
    return layout.size


def _write_tensors(file: Output, layout: LayoutFile, pieces: Sequence[Piece]) -> list[int]:
    """Returns the checksums of the tensors that are not empty, in the order of the file."""
    sums: dict[int, int] = {}
    for spec, read in pieces:
        value, offset = 0, layout.offsets[spec.name]
        for start, stop in ranges(spec.nbytes, COPY_BYTES):
            data = read(start, stop)
            file.write_full(data, offset + start)
            value = SUM.update(data, value)
        if spec.nbytes:
            sums[offset] = value
    return [sums[offset] for offset in sorted(sums)]


def _write_head(file: Output, layout: LayoutFile, head: bytes) -> None:
    offset = 0
    for literal in layout.literals:
        file.write_full(head[offset : offset + len(literal.data)], literal.offset)
        offset += len(literal.data)


def from_number(spec: TensorSpec, value: float) -> Callable[[int, int], memoryview]:
    """Returns a reader of the bytes of one number."""
    form = {DType.F64: "<d", DType.F16: "<e"}.get(spec.dtype, "<f")
    data = struct.pack(form, value)
    whole = memoryview(data[2:] if spec.dtype is DType.BF16 else data)
    return lambda start, stop: whole[start:stop]


def from_file(file: Output, offset: int) -> Callable[[int, int], memoryview]:
    """Returns a reader of the bytes behind an offset of a temporary file."""

    def read(start: int, stop: int) -> memoryview:
        buffer = memoryview(bytearray(stop - start))
        if file.read_into(buffer, offset + start) != len(buffer):
            raise OSError(f"{printable(file.location)} ended before its end")
        return buffer

    return read
