"""What an option is, and what a class of options does with the values that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from streammerge.errors import RecipeError, printable


class OptionKind(NamedTuple):
    """The kind of value that an option takes.

    ``words``: its description for messages. ``parse`` reads a value, and raises TypeError or ValueError for an invalid one.
    ``flag``: whether the value is true or false. ``many``: whether the command line accepts the option several times.
    ``least``: the smallest whole number.
    """

    words: str
    parse: Callable[[Any], Any]
    flag: bool = False
    many: bool = False
    least: int | None = None


class Option(NamedTuple):
    """One option. ``kind`` is None if the recipe's key of that name reads the value.

    ``otherwise``: describes the behaviour when the option is not given. ``negated``: the command line has ``--no-NAME``
    instead. ``letter``: a short name beside the long one, like ``-m``.
    """

    name: str
    annotation: str
    default: Any
    doc: str
    kind: OptionKind | None
    metavar: str
    choices: tuple[str, ...]
    otherwise: str
    negated: bool
    short: str
    overrides: bool
    letter: str

    @property
    def flag(self) -> str:
        """The option of the command line, like ``--no-resume``; ``-p`` for the parameters of a method."""
        return self.short or f"--{'no-' * self.negated}{self.name.replace('_', '-')}"

    def read(self, value: Any) -> Any:
        """Returns the parsed value. Raises RecipeError for a value that the option does not take."""
        if self.kind is None or (value is None and self.default is None):
            return value
        try:
            return self.kind.parse(value)
        except (TypeError, ValueError, OverflowError) as error:
            shown = printable(value, 60) or "an empty text"
            raise RecipeError(f"`{self.name}` takes {self.kind.words}, not {shown}") from error


def option(
    doc: str,
    kind: OptionKind | None = None,
    *,
    default: Any = None,
    metavar: str = "",
    choices: tuple[str, ...] = (),
    otherwise: str = "",
    negated: bool = False,
    short: str = "",
    overrides: bool = False,
    letter: str = "",
) -> Any:
    """Makes an attribute of a class of options, whose name and annotation :func:`options_of` adds.

    ``overrides``: whether it replaces the key of that name in a recipe.
    """
    return Option("", "", default, doc, kind, metavar, choices, otherwise, negated, short, overrides, letter)


class Options:
    """A group of options. Making one reads every value, and raises RecipeError for a value that an option does not take.

    Its attributes are annotated with their types, and made by :func:`option`. Its values cannot be changed. It is no
    dataclass, because each would take as long as two modules, in each start of a command.
    """

    def __init__(self, **given: Any) -> None:
        for name, each in options_of(type(self)).items():
            object.__setattr__(self, name, each.read(given.pop(name, each.default)))
        if given:
            raise TypeError(f"{type(self).__name__} has no option {next(iter(given))}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to the option {name!r}")

    @property
    def overrides(self) -> dict[str, Any]:
        """Returns the given options that replace keys of a recipe."""
        return {name: getattr(self, name) for name, each in options_of(type(self)).items() if each.overrides}


Group = TypeVar("Group", bound=Options)


def options_of(*groups: type[Options]) -> dict[str, Option]:
    """Returns the options of these classes by name."""
    found: dict[str, Option] = {}
    for group in groups:
        for name, annotation in group.__annotations__.items():
            described: Option = vars(group)[name]
            found[name] = described._replace(name=name, annotation=annotation)
    return found


def picked(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Makes the options of one class from all arguments of a function."""
    return group(**{name: given[name] for name in options_of(group) if name in given})
