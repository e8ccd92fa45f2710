"""The model card: the ``README.md`` by which the Hugging Face hub and people know what a folder holds.

It is a function of the recipe and of what the cards of the models state, so it has the same bytes on every machine.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from streammerge.checkpoints.config import CONFIG
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats.records import CARD_FILE, RECEIPT_FILE
from streammerge.recipe.adapted import parts_of
from streammerge.recipe.document import parse_yaml, to_yaml
from streammerge.recipe.names import is_held
from streammerge.stores.base import Location
from streammerge.stores.repositories import Repository, repository_of

_LIBRARIES = {"model_index.json": "diffusers", "modules.json": "sentence-transformers", CONFIG: "transformers"}
"""A file of a folder -> the library that loads it."""
_LICENCE = ("license", "license_name", "license_link")
_STATED = (*_LICENCE, "pipeline_tag", "library_name")
_MOST_BYTES = 1 << 20
_MOST_CHARACTERS = 500
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(?P<keys>.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_KEY = re.compile(rf"^(?:{'|'.join(_STATED)})[ \t]*:.*(?:\n(?:[ \t]+|-[ \t]).*)*", re.MULTILINE)
_HUB = "https://huggingface.co"
_NO_PAGE = ("cat", "svd")
"""Ways to merge adapters that are no merge methods."""

Stated = Mapping[str, Any]
"""What the card of a model states of itself, by the names that the hub uses."""


def has_card(folder: Location | None) -> bool:
    """Whether a model card belongs beside the files of this folder: whether a library of the hub loads it."""
    return folder is not None and any((folder / name).is_file() for name in (CONFIG, "model_index.json"))


def library_of(folder: Location) -> str | None:
    """Returns the library that loads a folder, None if none is known."""
    return next((each for file, each in _LIBRARIES.items() if (folder / file).is_file()), None)


def card_text(
    record: Mapping[str, Any], base: str | None, models: Mapping[str, CheckpointIndex], library: str | None
) -> str:
    """Returns the card of a merge.

    ``record``: its recipe as it travels. ``base``: the name of the base in it. ``models``: the name in the receipt of each
    model and each adapter, with its index. ``library``: what loads the output.
    """
    repositories = {name: repository_of(index.path) for name, index in models.items()}
    stated = {name: stated_by(index) for name, index in models.items()}
    front: dict[str, Any] = {}
    if known := list(dict.fromkeys(each.name for each in repositories.values() if each is not None)):
        front["base_model"] = known
        front["base_model_relation"] = "merge"
    front |= {name: value for name, value in _agreed(stated).items() if value is not None}
    if library is not None:
        front.setdefault("library_name", library)
    front["tags"] = ["merge", "streammerge"]
    lines = ["---", to_yaml(front).rstrip("\n"), "---", "", f"# {_title(record, models)}", ""]
    lines += ["This model is a merge of model checkpoints, made with streammerge.", "", "## Method", ""]
    lines += [_method(record), "", "## Models", ""]
    bases = set(parts_of(base)) if base else set[str]()
    lines += [f"- {_named(name, repositories[name])}{' (the base)' * (name in bases)}" for name in models]
    if any(each.get("license") for each in stated.values()):
        lines += ["", "## Licences", "", "What the cards of the models state:", ""]
        lines += [f"- {_called(name, repositories[name])}: {_licence(stated[name])}" for name in models]
    recipe = to_yaml(dict(record)).rstrip("\n")
    fence = _fence(recipe)
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe, fence, ""]
    lines += [f"`{RECEIPT_FILE}` has the checksums of all files; `streammerge verify` reads them.", ""]
    return "\n".join(lines)


def stated_by(index: CheckpointIndex) -> dict[str, Any]:
    """Returns what the card beside a model states: licence, task, library. Empty if there is no card that can be read."""
    folder = next((path for path in (index.path, index.container.path) if not index.in_memory and path.is_folder()), None)
    card = None if folder is None else folder / CARD_FILE
    if card is None or not card.is_file():
        return {}
    text = card.read(0, min(card.size, _MOST_BYTES)).decode("utf-8", "replace")
    front = _FRONT.match(text)
    if front is None:
        return {}
    keys = "\n".join(_KEY.findall(front["keys"].replace("\r\n", "\n")))
    try:
        data = parse_yaml(keys, str(card)).data if keys else {}
    except RecipeError:
        return {}
    return (
        {name: data[name] for name in _STATED if name in data and _is_plain(data[name])} if isinstance(data, dict) else {}
    )


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and 0 < len(each) <= _MOST_CHARACTERS for each in values)


def _agreed(stated: Mapping[str, Stated]) -> dict[str, Any]:
    """Returns what every model states alike. A licence is one thing with its name and its link."""
    first, *others = stated.values()
    found = {name: value for name, value in first.items() if all(each.get(name) == value for each in others)}
    if any({name: each.get(name) for name in _LICENCE} != {name: first.get(name) for name in _LICENCE} for each in others):
        found = {name: value for name, value in found.items() if name not in _LICENCE}
    return {name: found[name] for name in _STATED if name in found}


def _title(record: Mapping[str, Any], models: Iterable[str]) -> str:
    name = record.get("name")
    if isinstance(name, str) and name.strip():
        return _escaped(name)
    short = [posixpath.basename(each.rstrip("/").partition("@")[0]) or each for each in models if not is_held(each)]
    return f"Merge of {_escaped(listed(short, 4))}" if short else "A merge"


def _method(record: Mapping[str, Any]) -> str:
    name = printable(record["merge_method"])
    known = ":" not in name and name not in _NO_PAGE
    return f"{_code(name)}; `streammerge methods {name}` describes it." if known else f"{_code(name)}."


def _named(name: str, repository: Repository | None) -> str:
    said = _called(name, repository)
    return f"{said} at commit {_code(repository.revision)}" if repository is not None else said


def _called(name: str, repository: Repository | None) -> str:
    if repository is not None:
        return f"[{repository.name}]({_HUB}/{repository.name})"
    return "a state dict in memory" if is_held(name) else _code(printable(name))


def _licence(stated: Stated) -> str:
    licence = stated.get("license")
    if licence is None:
        return "none"
    values = [*(licence if isinstance(licence, list) else [licence]), *(stated.get(name) for name in _LICENCE[1:])]
    return ", ".join(_code(printable(value)) for value in values if value is not None)


def _escaped(text: str) -> str:
    """Returns a text as Markdown shows it, in one line."""
    return re.sub(r"([\\`*_\[\]<>#&])", r"\\\1", printable(text))


def _code(text: str) -> str:
    """Returns a text as code, which Markdown shows as it is."""
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fence(text: str) -> str:
    return "`" * max(3, _longest_run(text) + 1)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
