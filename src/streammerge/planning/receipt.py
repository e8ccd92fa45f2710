"""What a finished output says of how it was made, so that it can be verified later.

A receipt is as long as it will be when it is planned; checksums and hashes, known last, take the place of zeros. It says
nothing of the machine, its users or the time, so that it is a function of recipe and inputs like all else.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import FormatError, RecipeError, VerifyError, printable
from streammerge.stores.base import Location, digest_outside
from streammerge.stores.checksums import CRC32, CRC32C, Checksum
from streammerge.stores.locations import parse
from streammerge.strict_json import load_json
from streammerge.version import __version__

ITSELF = ""
"""What a receipt calls the file that it stands in."""
_FORM = 1
_BLANK_SHA256 = "0" * 64
_SUMS = re.compile("([0-9a-f]{8})+")


@dataclass(frozen=True, slots=True)
class Receipt:
    """``recipe``: as it travels, a conversion's too. ``inputs``: name -> bytes and SHA-256 of all but its tensors, and
    of the whole where that was asked for; for a checkpoint in memory its bytes, and that it was there. ``checksums``:
    output file -> those of its tensors in the order in which they lie, empty ones left out, and of all its other bytes but
    for the receipt, each 8 hexadecimal digits. ``digest``: SHA-256 of all this.
    """

    recipe: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    versions: dict[str, str]
    seed: int
    checksum: str
    checksums: dict[str, str]
    digest: str = _BLANK_SHA256
    form: int = field(default=_FORM)

    @property
    def held(self) -> list[str]:
        """Names of the inputs that were in the caller's memory, which nobody can read again."""
        return [name for name, said in self.inputs.items() if said.get("in_memory")]

    @property
    def kind(self) -> Checksum:
        return CRC32 if self.checksum == CRC32.name else CRC32C

    def text(self, indent: int | None = None) -> str:
        return json.dumps(asdict(self), indent=indent, separators=(",", ": " if indent else ":"))

    def blank(self) -> Receipt:
        """As it was planned: zeros for what is known last."""
        inputs = {n: {**i, "sha256": _BLANK_SHA256} if "sha256" in i else i for n, i in self.inputs.items()}
        checksums = {name: "0" * len(sums) for name, sums in self.checksums.items()}
        return replace(self, inputs=inputs, checksums=checksums, digest=_BLANK_SHA256)

    def filled(self, checksums: Mapping[str, Sequence[int]], hashes: Mapping[str, str]) -> Receipt:
        """With the checksums of each output file and, where they were asked for, the hashes of the inputs."""
        sums = {name: "".join(f"{value:08x}" for value in checksums[name]) for name in self.checksums}
        inputs = {n: {**i, "sha256": hashes[n]} if n in hashes else i for n, i in self.inputs.items()}
        made = replace(self, checksums=sums, inputs=inputs)
        return replace(made, digest=made.own_digest())

    def own_recipe(self) -> dict[str, Any]:
        """The recipe, from which the inputs are found. VerifyError when it names what no receipt of ours does."""
        named = [str(name) for name in _models_in(self.recipe)]
        if any(name.startswith(("/", "~")) for name in named):
            raise VerifyError("its receipt names inputs by absolute paths, which none of streammerge's does")
        return self.recipe

    def own_digest(self) -> str:
        """What ``digest`` must be."""
        import hashlib

        return hashlib.sha256(replace(self, digest=_BLANK_SHA256).text().encode()).hexdigest()

    def sums(self, name: str) -> list[int]:
        """The checksums of one output file."""
        text = self.checksums[name]
        return [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]


InputSpans = tuple[Location, list[tuple[int, int]]]
"""A file, and where its tensors lie."""


def input_files(named: Mapping[str, CheckpointIndex]) -> dict[str, InputSpans]:
    """Every file of the checkpoints by its name in a receipt: where it is, and where its tensors lie.

    ``named``: what each checkpoint is called -> its index.
    """
    found = {}
    for name, index in named.items():
        above = name if index.path.is_folder() else posixpath.dirname(name)
        for file, spans in index.container.tensor_spans().items():
            found[_below(above, file.name)] = (file, spans)
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
    """The receipt of an output whose files are not known yet. ``files``: those of :func:`input_files`. ``computed``:
    whether torch has a part in it. ``held``: name -> bytes of the checkpoints in memory.
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
    """The version of torch that is installed, which is not imported. Raises RecipeError where there is none."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    try:
        return version("torch")
    except PackageNotFoundError:  # built from source, or put into an image without its metadata
        found = find_spec("torch")
    if found is None or found.origin is None:
        raise RecipeError("torch is not installed, and this merge computes with it; install torch")
    file = parse(found.origin).parent / "version.py"
    try:
        text = file.read(0, file.size).decode()
        stated = re.search(r"""^__version__ = ['"]([^'"]+)""", text, re.MULTILINE)
    except (OSError, ValueError, FormatError):
        stated = None
    return stated[1] if stated else "unknown"


def read_receipt(text: str, where: object) -> Receipt:
    """The receipt that a file holds. Raises VerifyError when it is none, or not as it was written."""
    try:
        made = Receipt(**load_json(text))
        whole = _is_sound(made) and text in (made.text(), made.text(2)) and made.own_digest() == made.digest
    except (ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise VerifyError(f"{printable(where)}: its receipt is damaged, or of another version of streammerge")
    return made


def _is_sound(made: Receipt) -> bool:
    """Whether everything in it is of its kind; a stranger may have written it, and its digest too."""
    return (
        made.form == _FORM
        and isinstance(made.recipe, dict)
        and isinstance(made.seed, int)
        and isinstance(made.versions, dict)
        and all(isinstance(version, str) for version in made.versions.values())
        and made.checksum in (CRC32.name, CRC32C.name)
        and isinstance(made.inputs, dict)
        and all(_is_input(said) for said in made.inputs.values())
        and isinstance(made.checksums, dict)
        and (ITSELF not in made.checksums or len(made.checksums) == 1)
        and all(_is_name(name) for name in made.checksums)
        and all(isinstance(sums, str) and _SUMS.fullmatch(sums) for sums in made.checksums.values())
    )


def _models_in(node: Any) -> Iterator[Any]:
    """All that a recipe names as models, wherever it does."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("model", "base_model", "copy"):
                yield value
            yield from _models_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from _models_in(value)


def _is_input(said: Any) -> bool:
    if isinstance(said, dict) and said.keys() == {"bytes", "in_memory"}:
        return said["in_memory"] is True
    return isinstance(said, dict) and {"bytes", "header_sha256"} <= said.keys() <= {"bytes", "header_sha256", "sha256"}


def _is_name(name: str) -> bool:
    """Whether it is that of a file in the output's own folder."""
    plain = name not in (".", "..") and not any(c in name for c in "/\\\0")
    return plain and len(name.encode("utf-8", "replace")) < 256


def escaped(text: str) -> bytes:
    """A text as it stands within a JSON document."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


_WRITINGS = (lambda r: r.text().encode(), lambda r: r.text(2).encode(), lambda r: escaped(r.text()))


def written_like(final: Receipt, blank: bytes) -> bytes:
    """The bytes of a receipt, written as these are of its blank."""
    return next(writing(final) for writing in _WRITINGS if writing(final.blank()) == blank)
