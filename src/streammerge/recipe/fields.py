"""Kinds of values that a key of a recipe may hold: their reading, writing, and description for editors.

Each mistake is recorded with the path of its key, and reading continues, so all mistakes are reported together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, NamedTuple

from streammerge.errors import RecipeError, printable
from streammerge.options.base import Option
from streammerge.options.values import text, truth, whole

Path = tuple[str | int, ...]
Schema = dict[str, Any]
_ALIKE = 0.8
"""How much of two names is equal if one of them is a misspelling of the other."""


class Position(NamedTuple):
    """The position of a key in a file."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: "


Positions = Mapping[Path, Position]


def position_of(path: Path, positions: Positions) -> Position | None:
    """Returns the position of a key, or of its nearest parent in the file; None if it was not read from a file."""
    while path and path not in positions:
        path = path[:-1]
    return positions.get(path)


class Problems(list[tuple[Path, str]]):
    """Mistakes in a recipe, each with the path of its key. ``warnings``: what is ignored in it, likewise."""

    def __init__(self, found: Iterable[tuple[Path, str]] = ()) -> None:
        super().__init__(found)
        self.warnings: list[tuple[Path, str]] = []

    def warn(self, path: Path, message: str) -> None:
        self.warnings.append((path, message))

    def add(self, path: Path, message: str) -> None:
        self.append((path, message))


class Kind(ABC):
    """A kind of value."""

    @abstractmethod
    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        """Returns the value, or a usable substitute; adds mistakes to ``problems``."""

    @abstractmethod
    def schema(self, forms: Schema) -> Schema:
        """Returns the kind's JSON Schema. Adds the forms that it refers to to ``forms``."""

    def dump(self, value: Any) -> Any:
        return value


class Plain(Kind):
    """A single value. ``parse`` raises RecipeError, or ValueError if ``words`` describe the expected value.

    ``guess`` turns a wrong value into a substitute, so that the rest of the recipe can be checked.
    """

    def __init__(
        self,
        words: str,
        parse: Callable[[Any], Any],
        schema: Schema | Callable[[], Schema],
        dump: Callable[[Any], Any] | None = None,
        guess: Callable[[Any], Any] | None = None,
    ) -> None:
        self.words, self.parse, self._schema, self._dump, self.guess = words, parse, schema, dump, guess

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        try:
            return self.parse(value)
        except RecipeError as error:
            problems.add(path, str(error))
        except (ValueError, TypeError, OverflowError):
            problems.add(path, f"{_name(path)} takes {self.words}, not {shown(value)}")
        return self.guess(value) if self.guess else None

    def schema(self, forms: Schema) -> Schema:  # noqa: ARG002 - it refers to no form
        return dict(self._schema() if callable(self._schema) else self._schema)

    def dump(self, value: Any) -> Any:
        return self._dump(value) if self._dump else value


class ListOf(Kind):
    """A list of at least ``least`` values, held as a tuple. With ``or_one`` a single value means a list of one."""

    def __init__(self, item: Kind, or_one: bool = False, least: int = 1) -> None:
        self.item, self.or_one, self.least = item, or_one, least

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        if self.or_one and not isinstance(value, list | tuple):
            value = [value]
        if not isinstance(value, list | tuple) or len(value) < self.least:
            problems.add(path, f"{_name(path)} takes a list, not {shown(value) if value else 'nothing'}")
            return ()
        read = [self.item.read(item, (*path, number), problems) for number, item in enumerate(value)]
        return tuple(item for item in read if item is not None)

    def schema(self, forms: Schema) -> Schema:
        item = self.item.schema(forms)
        whole = {"type": "array", "items": item, "minItems": self.least}
        return {"anyOf": [item, whole]} if self.or_one else whole

    def dump(self, value: Any) -> Any:
        return [self.item.dump(item) for item in value]


class MapOf(Kind):
    """A mapping from names to values of one kind."""

    def __init__(self, item: Kind) -> None:
        self.item = item

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            problems.add(path, f"{_name(path)} takes names with values below them, not {shown(value)}")
            return {}
        read = {str(name): self.item.read(item, (*path, name), problems) for name, item in value.items()}
        return {name: item for name, item in read.items() if item is not None}

    def schema(self, forms: Schema) -> Schema:
        return {"type": ["object", "null"], "additionalProperties": self.item.schema(forms)}

    def dump(self, value: Any) -> Any:
        return {name: self.item.dump(item) for name, item in value.items()}


class FormOf(Kind):
    """A mapping with known keys: a dataclass whose fields were made by :func:`key`.

    The class may define ``REFUSED`` (key -> why it is refused), ``MEANT`` (key of another tool -> the key here),
    ``SHORT`` (the key that a text in place of the mapping is the value of), ``ELSEWHERE`` (key of the mapping below
    another key -> that key) and ``IGNORED`` (key -> what to do instead, or a function that
    returns this):
    mergekit has the class too and ignores all keys that it does not know, so they are ignored with a warning, unless one is
    probably a misspelled key.
    """

    def __init__(self, form: type[Any]) -> None:
        self.form = form

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        keys = _keys(self.form)
        short = getattr(self.form, "SHORT", None)
        if short is not None and isinstance(value, str):
            value = {short: value}
        if not isinstance(value, Mapping):
            first = ", ".join(list(keys)[:4])
            problems.add(path, f"{_name(path)} takes keys like {first} with their values, not {shown(value)}")
            return None
        stands_for = {name: name for name in value if name in keys}
        for name in value:
            if name not in keys and not (value[name] is None and name in getattr(self.form, "REFUSED", {})):
                meant = self._meant(name)
                if self._is_ignored(name, meant):
                    hint = (self._ignored or {}).get(name, "")
                    said = f"{_name(path)} has no key {printable(name)}, so it is ignored, as in mergekit"
                    problems.warn((*path, name), f"{said}; {hint}" if hint else said)
                    continue
                problems.add((*path, name), self._unknown(name, meant, path))
                if meant is not None and meant not in stands_for:  # continue as if the meant key had been written
                    stands_for[meant] = name
        made: dict[str, Any] = {}
        for name, (kind, required) in keys.items():
            written = stands_for.get(name)
            if written is not None and value[written] is not None:
                read = kind.read(value[written], (*path, written), problems)
                if read is not None:
                    made[name] = read
            elif required:
                problems.add(path, f"{_name(path)} needs {name}")
                stand_in = kind.guess(None) if isinstance(kind, Plain) and kind.guess else None
                if stand_in is not None:
                    made[name] = stand_in
        if any(required and name not in made for name, (_, required) in keys.items()):
            return None
        return self.form(**made, **({"path": path} if "path" in {f.name for f in fields(self.form)} else {}))

    @property
    def _ignored(self) -> Mapping[str, str] | None:
        found: Any = getattr(self.form, "IGNORED", None)
        return found() if callable(found) else found  # type: ignore[no-any-return]

    def _is_ignored(self, name: Any, meant: str | None) -> bool:
        """Whether mergekit takes the unknown key, and it is no misspelled one."""
        ignored = self._ignored
        if (
            ignored is None
            or not isinstance(name, str)
            or " " in name
            or any(name in getattr(self.form, told, {}) for told in ("REFUSED", "MEANT", "ELSEWHERE"))
        ):
            return False
        return name in ignored or meant is None or not is_misspelled(name, [meant])

    def _meant(self, name: Any) -> str | None:
        """Returns the key that an unknown one may mean."""
        import difflib

        if name in getattr(self.form, "REFUSED", {}) or name in getattr(self.form, "ELSEWHERE", {}):
            return None
        meant: dict[str, str] = getattr(self.form, "MEANT", {})
        return meant.get(name) or next(iter(difflib.get_close_matches(str(name), _keys(self.form), n=1)), None)

    def _unknown(self, name: Any, meant: str | None, path: Path) -> str:
        refused = getattr(self.form, "REFUSED", {})
        if name in refused:
            return f"{name} is not supported yet: {refused[name]}"
        if name in getattr(self.form, "ELSEWHERE", {}):
            return f"unknown key {printable(name)}; it stands under {self.form.ELSEWHERE[name]}"
        hint = f"did you mean {meant}?" if meant else f"{_name(path)} knows {', '.join(_keys(self.form))}"
        return f"unknown key {printable(name)}; {hint}"

    def schema(self, forms: Schema) -> Schema:
        title = self.form.__name__
        if title not in forms:
            forms[title] = {}
            described, needed = {}, []
            for name, (kind, required) in _keys(self.form).items():
                described[name] = kind.schema(forms) | {"description": doc_of(self.form, name)}
                needed += [name] if required else []
            forms[title] = {
                "type": "object",
                "description": (self.form.__doc__ or "").partition("\n")[0],
                "properties": described,
                "additionalProperties": False,
            } | ({"required": needed} if needed else {})
        reference = {"$ref": f"#/$defs/{title}"}
        return {"anyOf": [{"type": "string"}, reference]} if getattr(self.form, "SHORT", None) else reference

    def dump(self, value: Any) -> Any:
        made = {}
        for each in fields(value):
            held = getattr(value, each.name)
            if "kind" in each.metadata and held != _default(each):
                made[each.name] = each.metadata["kind"].dump(held)
        return made


def is_misspelled(name: Any, known: Iterable[str]) -> bool:
    """Whether a name is probably one of the known ones with letters changed."""
    import difflib

    return bool(difflib.get_close_matches(str(name), [*known], n=1, cutoff=_ALIKE))


def key(kind: Kind, doc: str, **default: Any) -> Any:
    """Makes a field of a form: its kind, its description, and a ``default`` or ``default_factory`` unless it is
    required."""
    return field(metadata={"kind": kind, "doc": doc}, **default)


def option_key(kind: Kind, option: Option, default: Any = None) -> Any:
    """A field of a form that an option replaces: it is described as the option is, and has the option's own default."""
    stated = option.otherwise if option.otherwise in option.choices else default
    return key(kind, option.doc, default=stated)


def doc_of(form: type[Any], name: str) -> str:
    return str(next(f.metadata["doc"] for f in fields(form) if f.name == name))


def _keys(form: type[Any]) -> dict[str, tuple[Kind, bool]]:
    """Returns the keys of a form: kind, and whether it is required."""
    return {
        f.name: (f.metadata["kind"], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(form)
        if "kind" in f.metadata
    }


def _default(each: Any) -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default


def _name(path: Path) -> str:
    """Names a place in a sentence."""
    named = [part for part in path if isinstance(part, str)]
    if not named:
        return "a recipe"
    return printable(named[-1]) if path[-1] == named[-1] else f"an entry of {printable(named[-1])}"


def shown(value: Any) -> str:
    """Formats a value of a recipe for a sentence."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return f"the keys {', '.join(map(printable, list(value)[:4]))}"
    return printable(str(value).lower() if isinstance(value, bool) else value, 60)


TEXT = Plain("a text", text, {"type": "string"})
WHOLE = Plain("a whole number", whole, {"type": "integer"})
TRUTH = Plain("true or false", truth, {"type": "boolean"})


def one_of(choices: tuple[str, ...]) -> Plain:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return Plain(f"one of {', '.join(choices)}", parse, {"enum": list(choices)})
