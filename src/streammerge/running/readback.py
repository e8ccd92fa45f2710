"""Checks checkpoint files with our own readers and with the safetensors library."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import FormatError, RecipeError, StreammergeError, UncheckedError, VerifyError, printable
from streammerge.formats import detect
from streammerge.formats.base import Container, LayoutFile, is_part
from streammerge.formats.records import RECEIPT_FILE, RECEIPT_KEY
from streammerge.planning.receipt import ITSELF, Receipt, read_receipt
from streammerge.running.process import collector_paused
from streammerge.stores.base import Location

if TYPE_CHECKING:
    from streammerge.planning.outputs.layout import Layout

_MOST_RECEIPT_BYTES = 256 << 20


def check_structure(folder: Location, layout: Layout) -> None:
    """Raises VerifyError unless the files of a new output in ``folder`` hold the planned tensors.

    Raises UncheckedError when the check itself fails because of the machine or an unforeseen error. Such an error says
    nothing about the output.
    """
    try:
        with collector_paused():
            container = open_checkpoint(folder if layout.as_folder else folder / layout.files[0].name).container
            begins = container.tensor_begins()
        for file in layout.files:
            if file.offsets:
                path = folder / file.name
                _check_places(begins.get(path, ()), file, layout)
                if file.seal is None:
                    check_by_library(path, set(file.offsets))
    except VerifyError:
        raise
    except StreammergeError as error:
        if _is_of_the_machine(error):
            raise UncheckedError(str(error)) from error
        raise VerifyError(f"the output cannot be read back, so nothing was written: {error}") from error
    except Exception as error:
        raise UncheckedError(f"{type(error).__name__}: {printable(error)}") from error


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether the system caused the error: no free descriptor, no memory, a failing disk."""
    while error is not None and not isinstance(error, OSError | MemoryError):
        error = error.__cause__
    return error is not None


def _check_places(begins: Collection[int], file: LayoutFile, layout: Layout) -> None:
    """Raises VerifyError unless the tensors of a file that are not empty begin where they were planned."""
    wanted = len(layout.receipt.checksums[file.name if layout.as_folder else ITSELF]) // 8 - 1
    if len(begins) != wanted or not set(begins) <= set(file.offsets.values()):
        raise VerifyError(f"{printable(file.name)} has tensors at other places than planned; nothing was written")


def check_by_library(path: Location, names: set[str]) -> None:
    """Raises VerifyError unless the safetensors library reads the file's header and finds exactly these tensors."""
    from safetensors import SafetensorError

    file = path.local_path
    if file is None:  # the library opens files only
        return
    try:
        found = _names_by_library(file)
    except SafetensorError as error:
        if "unknown variant" in str(error):  # a dtype that this release of the library does not know yet
            return
        raise VerifyError(f"{printable(path.name)}: the safetensors library refuses it ({printable(error)})") from error
    if found != names:
        raise VerifyError(f"{printable(path.name)}: the safetensors library finds other tensors in it")


def _names_by_library(path: str) -> set[str]:
    """Returns the names in a file. The library imports numpy or torch to open one, and numpy is imported faster.

    Uses torch if numpy cannot be imported.
    """
    from safetensors import safe_open

    file: Any
    try:
        file = safe_open(path, framework="numpy")
    except ImportError:
        file = safe_open(path, framework="pt")
    with file:
        return set(file.keys())


def read_part(path: Location) -> tuple[Container, list[tuple[int, int]]]:
    """Returns the container of a file of an output, and the (offset, bytes) of the tensors in it. A file with parts of
    tensors is known by its folder only. Raises VerifyError."""
    container = read_output(path.parent if is_part(path) else path)
    spans = container.tensor_spans()
    if path not in spans:
        raise VerifyError(f"{printable(path)} is not named by the metadata beside it")
    return container, spans[path]


def receipt_of(out: Location) -> Receipt:
    """Returns the receipt of an output. Raises VerifyError when there is none, or it is damaged."""
    if not out.exists():
        raise RecipeError(f"{printable(out)} does not exist")
    if out.is_folder():
        path = out / RECEIPT_FILE
        if not path.lexists() or path.size > _MOST_RECEIPT_BYTES:
            raise _without(out)
        text = path.read(0, path.size).decode("utf-8", "replace")
    else:
        container = read_output(out)
        if RECEIPT_KEY not in container.metadata:
            raise _without(out)
        text = container.metadata[RECEIPT_KEY]
    return read_receipt(text, out)


def _without(out: Location) -> VerifyError:
    return VerifyError(
        f"{printable(out)} has no receipt, so it cannot be verified; streammerge writes one into each output"
    )


def read_output(path: Location) -> Container:
    """Returns the container of an output. Raises VerifyError when it cannot be read."""
    try:
        return detect.read(path)
    except FormatError as error:
        raise VerifyError(f"it cannot be read: {error}") from error
