"""Checks the structure and the checksums of an output against its receipt. :mod:`.values` checks the values."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from streammerge.errors import FormatError, VerifyError, listed, printable
from streammerge.events import Checked, Listener, RunFinished, RunStarted, quiet
from streammerge.formats import torch_zip
from streammerge.formats.file_names import files_below
from streammerge.formats.records import RECEIPT_FILE
from streammerge.planning.receipt import ITSELF, Receipt, escaped
from streammerge.running import process
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.readback import check_by_library, read_output, read_part
from streammerge.running.reading import RANGE_BYTES, ChecksumWork, FileRange, neighbours
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32, Checksum
from streammerge.stores.digests import outside
from streammerge.tensors.spec import ranges
from streammerge.units import counted, decimal_bytes

_MOST_NAMED = 10
"""Wrong parts whose names are looked up in the files' headers."""
_LOADED = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".index.json", ".py")
"""Endings of files that a loader might take for a part of the model."""


@dataclass(slots=True, repr=False)
class Verified:
    """The report of a verification that found no error.

    ``sampled_tensors``: tensors computed again, ``sampled_elems``: their numbers. ``equal_elems``: numbers equal to the
    float64 result rounded once. ``repeated_elems``: numbers in pieces where float64 may decide differently, such as which
    of two near-equal numbers is larger; these pieces equal the merge's own result bit for bit. All other numbers equal the
    float64 result within rounding. ``notes``: what was not verified, and why.
    """

    out: Location
    tensors: int = 0
    files: int = 0
    checked_bytes: int = 0
    digest: str = ""
    sampled_tensors: int = 0
    sampled_elems: int = 0
    equal_elems: int = 0
    repeated_elems: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def recomputed(self) -> bool:
        return self.sampled_elems > 0

    def __repr__(self) -> str:
        again = f", {self.sampled_elems:,} numbers computed again" if self.recomputed else ""
        return f"<Verified {printable(self.out)}: {counted(self.tensors, 'tensor')} as they were written{again}>"

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        return table(f"verified {printable(self.out)}", self._facts())

    def __str__(self) -> str:
        return "\n".join([f"verified {printable(self.out)}", *(f"  {label:<10} {text}" for label, text in self._facts())])

    def _facts(self) -> list[tuple[str, str]]:
        files = f" in {self.files} files" if self.files > 1 else ""
        facts = [
            ("structure", f"{counted(self.tensors, 'tensor')}{files}, as they were written"),
            ("checksums", f"{decimal_bytes(self.checked_bytes)}, all tensors and all other bytes"),
        ]
        if self.recomputed:
            elems = self.sampled_elems
            rounded = elems - self.equal_elems - self.repeated_elems
            kinds = [
                (self.equal_elems, "are the float64 result to the bit"),
                (rounded, "differ from it by rounding only"),
                (self.repeated_elems, "are what the merge computes, to the bit"),
            ]
            said = ", ".join(f"{100 * count / elems:.4g} % {what}" for count, what in kinds if count)
            numbers = f"{elems:,} numbers of {counted(self.sampled_tensors, 'tensor')}"
            facts.append(("values", f"{numbers} computed again: {said}"))
        return [*facts, *(("note", note) for note in self.notes), ("digest", self.digest)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """Byte ranges of a file, and their expected checksums, as columns. ``named``: returns what lies at an offset."""

    path: Location
    offsets: array[int]
    sizes: array[int]
    sums: array[int]
    named: Callable[[int], str]


def check_files(
    out: Location, receipt: Receipt, workers: int, memory_bytes: int = 0, listener: Listener = quiet
) -> Verified:
    """Checks structure and checksums of every file. Raises VerifyError, which names everything that is wrong.

    ``memory_bytes``: the budget, for the listener.
    """
    if out.is_folder() == (ITSELF in receipt.checksums):
        raise VerifyError(f"{printable(out)}: its receipt is that of another kind of output")
    parts: list[_Parts] = []
    wrong: list[str] = []
    tensors = 0
    for name in receipt.checksums:
        try:
            path = out if name == ITSELF else _file_of(out, name)
        except FormatError as error:
            wrong.append(str(error))
            continue
        sums = receipt.sums(name)
        if name == ITSELF or len(sums) > 1:
            tensors += _tensor_file(path, name, receipt, parts, wrong)
        else:  # also a file whose tensors are all empty
            whole = printable(name)
            parts.append(_Parts(path, array("Q", [0]), array("Q", [path.size]), array("I", sums), lambda _, n=whole: n))  # type: ignore[misc]
    notes = []
    if out.is_folder():
        read_output(out)  # checks that the index and its shards agree
        extra = sorted({name for name, _ in files_below(out)} - {RECEIPT_FILE, *receipt.checksums})
        wrong += [f"{printable(name)} does not belong to it" for name in extra if name.endswith(_LOADED)]
        beside = [name for name in extra if not name.endswith(_LOADED)]
        notes += [f"{listed(beside)} came later and was not verified"] if beside else []
    checked = sum(sum(part.sizes) for part in parts)
    listener(RunStarted(checked, 0, memory_bytes, tensors))
    began = time.perf_counter()
    wrong += _wrong_parts(parts, receipt.kind, workers, listener)
    listener(RunFinished(time.perf_counter() - began))
    if wrong:
        raise VerifyError(f"{printable(out)} is not as it was written: {listed(wrong, 10)}")
    return Verified(out, tensors, len(receipt.checksums), checked, receipt.digest, notes=notes)


def _file_of(out: Location, name: str) -> Location:
    """Returns a file of an output. Raises FormatError if it is absent or not a regular file."""
    path = out / name
    if not path.lexists():
        raise FormatError(f"{printable(name)} is absent")
    path.status()
    return path


def _tensor_file(path: Location, name: str, receipt: Receipt, parts: list[_Parts], wrong: list[str]) -> int:
    """Adds the parts of a file of tensors to ``parts``. Returns the number of its tensors."""
    (container, spans), sums = read_part(path), receipt.sums(name)
    if name == ITSELF and (receipt.kind is CRC32) != container.pickled:
        raise VerifyError(f"{printable(path.name)}: its receipt is that of another kind of file")
    if len(sums) != len(spans) + 1:
        wrong.append(f"{printable(name or path.name)} has {len(spans)} tensors, {len(sums) - 1} were written")
        return len(spans)
    by_library = not container.pickled and container.distributed is None
    tensors = len(container.tree) if by_library else len(spans)
    if by_library:
        check_by_library(path, set(container.tree))
    del container  # before the next file, because a header may hold hundreds of thousands of names
    rest = rest_of(path, spans, receipt, name)
    if receipt.kind.update(rest) != sums[-1]:
        wrong.append(f"the header of {printable(name or path.name)}")
    offsets, sizes = (array("Q", [span[which] for span in spans]) for which in (0, 1))
    parts.append(_Parts(path, offsets, sizes, array("I", sums[:-1]), lambda offset: _what_lies_at(path, offset)))
    return tensors


def _what_lies_at(path: Location, offset: int) -> str:
    """Returns the name of a tensor that is not empty, or of a storage."""
    container, _ = read_part(path)
    if container.distributed is not None:
        blobs = [(blob, source.spec.name) for source in container.arrays for blob in source.blobs]
        found = {blob.offset: f"tensor {printable(name)}" for blob, name in blobs if blob.path == path}
    elif container.pickled:
        found = {store.offset: f"storage {printable(key)}" for key, store in container.storages.items()}
    else:
        found = {r.entry.offset: f"tensor {printable(n)}" for n, r in container.tree.items() if r.entry.nbytes}
    return found.get(offset, f"byte {offset}")


def rest_of(path: Location, spans: list[tuple[int, int]], receipt: Receipt, name: str) -> bytes:
    """Returns the bytes of a file outside its tensors, with the receipt blank as it was planned.

    ``name``: its name in the receipt. Only a file that is the whole output holds the receipt.
    """
    if name != ITSELF:
        return b"".join(outside(path, spans))
    rest, final, blank = b"".join(outside(path, spans)), receipt.text(), receipt.blank().text()
    if rest[:1] == b"\x80":  # a plain pickle
        return rest.replace(final.encode(), blank.encode(), 1)
    if receipt.kind is CRC32:
        return torch_zip.with_blank_receipt(rest, final.encode(), blank.encode())
    return rest.replace(escaped(final), escaped(blank), 1)


def _wrong_parts(parts: list[_Parts], kind: Checksum, workers: int, listener: Listener) -> list[str]:
    """Returns descriptions of the parts whose checksum is wrong."""
    cut: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    wrong: list[tuple[int, int]] = []
    held = process.Gauge()
    with (
        closing(ThreadExecutor(workers)) as executor,
        closing(executor.run(ChecksumWork(kind), neighbours(_ranges(parts)))) as results,
    ):
        for values, sums in results:
            nbytes = 0
            for (number, row, start, size), value in zip(values, sums, strict=True):
                part, nbytes = parts[number], nbytes + size
                if size < part.sizes[row]:
                    known = cut.setdefault((number, row), [])
                    known.append((start, size, value))
                    if sum(each[1] for each in known) < part.sizes[row]:
                        continue
                    value = kind.join(cut.pop((number, row)))
                if value != part.sums[row]:
                    wrong.append((number, row))
            listener(Checked(parts[number].path.name, nbytes, held.now()))
    told = [parts[number].named(parts[number].offsets[row]) for number, row in sorted(wrong)[:_MOST_NAMED]]
    return told + [f"byte {parts[number].offsets[row]}" for number, row in sorted(wrong)[_MOST_NAMED:]]


def _ranges(parts: list[_Parts]) -> Iterator[FileRange]:
    """Yields the parts, long ones cut, each with the value (file, row, start, size)."""
    for number, part in enumerate(parts):
        for row, (offset, nbytes) in enumerate(zip(part.offsets, part.sizes, strict=True)):
            for start, stop in ranges(nbytes, RANGE_BYTES) if nbytes else [(0, 0)]:
                yield (number, row, start, stop - start), part.path, offset + start, stop - start
