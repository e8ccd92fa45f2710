"""The receipt: the record in a finished output of how it was made, so that it can be verified later.

A planned receipt already has its final length. Zeros stand for the checksums and hashes, which are known last. It holds
nothing about the machine, its users or the time: it is a function of recipe and inputs, like the rest of the output.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePosixPath
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import FormatError, VerifyError, printable
from streammerge.stores.base import Location
from streammerge.stores.checksums import CRC32, CRC32C, Checksum
from streammerge.stores.digests import digest_outside
from streammerge.stores.locations import parse
from streammerge.stores.names import is_inner
from streammerge.strict_json import load_json
from streammerge.version import __version__

ITSELF = ""
"""The name in a receipt of the file that holds the receipt."""
_FORM = 2
_BLANK_SHA256 = "0" * 64
_SUMS = "([0-9a-f]{8})+"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of how an output was made.

    ``recipe``: the recipe without paths of this machine, also of a conversion. ``inputs``: the name of each input file ->
    its size in bytes, the SHA-256 of its bytes outside the tensors and, if requested, of the whole file; for a checkpoint
    in memory, its size and ``in_memory``. ``checksums``: the name of each output file -> the checksums of its tensors in
    file order, without empty tensors, then one of its other bytes (with a blank receipt), 8 hexadecimal digits each.
    ``dispositions``: what became of each thing in the inputs. ``accounts``: what became of each tensor of each checkpoint.
    ``layers``: of an adapter that was made, how well its factors represent the update of each tensor.
    ``digest``: the SHA-256 of the receipt.
    """

    recipe: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    seed: int
    checksum: str
    checksums: dict[str, str]
    dispositions: list[dict[str, Any]] = field(default_factory=list)
    accounts: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    digest: str = _BLANK_SHA256
    form: int = field(default=_FORM)

    @property
    def held(self) -> list[str]:
        """Names of the inputs that were in the caller's memory. They cannot be read again."""
        return [name for name, said in self.inputs.items() if said.get("in_memory")]

    @property
    def kind(self) -> Checksum:
        return CRC32 if self.checksum == CRC32.name else CRC32C

    def text(self, indent: int | None = None) -> str:
        data = {each.name: getattr(self, each.name) for each in fields(self)}  # asdict would copy every name
        for name in ("accounts", "layers"):  # a receipt of an earlier release, or of another output, keeps its bytes
            if not data[name]:
                del data[name]
        return json.dumps(data, indent=indent, separators=(",", ": " if indent else ":"))

    def blank(self) -> Receipt:
        """Returns the receipt as it was planned: zeros in place of checksums and hashes."""
        inputs = {n: {**i, "sha256": _BLANK_SHA256} if "sha256" in i else i for n, i in self.inputs.items()}
        checksums = {name: "0" * len(sums) for name, sums in self.checksums.items()}
        return replace(self, inputs=inputs, checksums=checksums, digest=_BLANK_SHA256)

    def filled(self, checksums: Mapping[str, Sequence[int]], hashes: Mapping[str, str]) -> Receipt:
        """Returns the receipt with the checksums of each output file and, if requested, the hashes of the inputs."""
        sums = {name: "".join(f"{value:08x}" for value in checksums[name]) for name in self.checksums}
        inputs = {n: {**i, "sha256": hashes[n]} if n in hashes else i for n, i in self.inputs.items()}
        made = replace(self, checksums=sums, inputs=inputs)
        return replace(made, digest=made.own_digest())

    def own_digest(self) -> str:
        """Returns the correct value of ``digest``."""
        import hashlib

        return hashlib.sha256(replace(self, digest=_BLANK_SHA256).text().encode()).hexdigest()

    def sums(self, name: str) -> list[int]:
        """Returns the checksums of one output file."""
        text = self.checksums[name]
        return [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]


InputSpans = tuple[Location, list[tuple[int, int]]]
"""A file, and the (begin, end) byte ranges of its tensors."""


def input_files(named: Mapping[str, CheckpointIndex]) -> dict[str, InputSpans]:
    """Returns every file of the checkpoints by its name in a receipt: its location, and the ranges of its tensors.

    ``named``: name of each checkpoint -> its index.
    """
    found = {}
    for name, index in named.items():
        is_folder = index.path.is_folder()
        above, folder = (name, index.path) if is_folder else (posixpath.dirname(name), index.path.parent)
        for file, spans in index.container.tensor_spans(joined=True).items():
            inner = file.relative_to(folder) if folder in file.parents else file.name
            found[_below(above, inner)] = (file, spans)
    return found


def files_beside(named: Mapping[str, Location], files: Iterable[Location]) -> dict[str, InputSpans]:
    """Returns files beside the weights of checkpoints as :func:`input_files` does, with all of their bytes as headers.

    ``named``: name of each checkpoint -> its location.
    """
    homes = {(path if path.is_folder() else path.parent).absolute(): (name, path) for name, path in named.items()}
    found = {}
    for file in files:
        if home := homes.get(file.parent.absolute()):
            name, path = home
            found[_below(name if path.is_folder() else posixpath.dirname(name), file.name)] = (
                file,
                list[tuple[int, int]](),
            )
    return found


def _below(folder: str, name: str) -> str:
    if "://" in folder:
        return f"{folder.rstrip('/')}/{name}"
    return (PurePosixPath(folder) / name).as_posix()


def planned(
    recipe: dict[str, Any],
    files: Mapping[str, InputSpans],
    seed: int,
    kind: Checksum,
    hashed: bool,
    computed: bool,
    held: Mapping[str, int] | None = None,
) -> Receipt:
    """Returns the receipt of an output whose files are not known yet.

    ``files``: the result of :func:`input_files`. ``hashed``: leaves room for the SHA-256 of whole inputs. ``computed``:
    whether torch computes any value. ``held``: name of each checkpoint in memory -> its bytes.
    """
    inputs: dict[str, dict[str, Any]] = {
        name: {"bytes": nbytes, "in_memory": True} for name, nbytes in (held or {}).items()
    }
    for name, (path, spans) in files.items():
        inputs[name] = {"bytes": path.size, "header_sha256": digest_outside(path, spans)}
        if hashed:
            inputs[name]["sha256"] = _BLANK_SHA256
    versions = {"streammerge": __version__}
    if computed:
        versions["torch"] = torch_version()
    return Receipt(recipe, inputs, versions, seed, kind.name, {})


def torch_version() -> str:
    """Returns the version of the installed torch without importing it; "none" if torch is not installed."""
    from importlib.util import find_spec

    try:
        found = find_spec("torch")
    except ValueError:  # the running program has put a module of its own in its place
        found = None
    home = parse(found.origin).parent if found is not None and found.origin else None
    known = None if home is None else _version_in_metadata(home)
    if known is not None:
        return known
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:  # torch was built from source, or copied into an image without its metadata
        if home is None:
            return "none"  # a plan can do without it
    return _stated(home / "version.py", r"""^__version__ = ['"]([^'"]+)""") or "unknown"


def _version_in_metadata(home: Location) -> str | None:
    """Returns the version in the metadata beside a package's folder, None if they are not in one place.

    ``importlib.metadata`` reads them too, but its own import takes as long as all the rest of a small plan.
    """
    try:
        found = [each for each in home.parent.children() if re.fullmatch(r"torch-[^-]+\.dist-info", each.name)]
    except OSError:
        return None
    return _stated(found[0] / "METADATA", r"^Version: (\S+)$") if len(found) == 1 else None


def _stated(file: Location, pattern: str) -> str | None:
    """Returns what the pattern finds in a file, None if it cannot be read."""
    try:
        text = file.read(0, file.size).decode()
    except (OSError, ValueError, FormatError):
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None


def read_receipt(text: str, where: object) -> Receipt:
    """Reads a receipt from its text. Raises VerifyError when it is damaged or not a receipt. ``where``: for the message."""
    try:
        made = Receipt(**load_json(text))
        whole = _is_sound(made) and text in (made.text(), made.text(2)) and made.own_digest() == made.digest
    except (ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise VerifyError(f"{printable(where)}: its receipt is damaged, or of another version of streammerge")
    return made


def _is_sound(made: Receipt) -> bool:
    """Whether every field has the right type. A stranger may have written the receipt, with a correct digest."""
    return (
        made.form == _FORM
        and isinstance(made.recipe, dict)
        and isinstance(made.seed, int)
        and isinstance(made.versions, dict)
        and all(isinstance(version, str) for version in made.versions.values())
        and made.checksum in (CRC32.name, CRC32C.name)
        and isinstance(made.inputs, dict)
        and all(_is_input(said) for said in made.inputs.values())
        and isinstance(made.dispositions, list)
        and isinstance(made.accounts, list)
        and isinstance(made.layers, list)
        and all(map(_is_layer, made.layers))
        and isinstance(made.checksums, dict)
        and (ITSELF not in made.checksums or len(made.checksums) == 1)
        and all(name == ITSELF or is_inner(name) for name in made.checksums)
        and all(isinstance(sums, str) and re.fullmatch(_SUMS, sums) for sums in made.checksums.values())
    )


def _is_input(said: Any) -> bool:
    if isinstance(said, dict) and said.keys() == {"bytes", "in_memory"}:
        return said["in_memory"] is True
    return isinstance(said, dict) and {"bytes", "header_sha256"} <= said.keys() <= {"bytes", "header_sha256", "sha256"}


def _is_layer(said: Any) -> bool:
    if not isinstance(said, dict) or said.keys() != {"tensor", "stored", "rank", "norm", "error"}:
        return False
    numbers = (said["rank"], said["norm"], said["error"])
    texts = isinstance(said["tensor"], str) and isinstance(said["stored"], str)
    return texts and all(isinstance(each, int | float) and math.isfinite(each) for each in numbers)


def escaped(text: str) -> bytes:
    """Returns the bytes of a text inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


_WRITINGS = (lambda r: r.text().encode(), lambda r: r.text(2).encode(), lambda r: escaped(r.text()))


def written_like(final: Receipt, blank: bytes) -> bytes:
    """Returns the bytes of the final receipt, in the same notation as the bytes ``blank`` of its blank form."""
    return next(writing(final) for writing in _WRITINGS if writing(final.blank()) == blank)
