"""Keys of a recipe about the output's tokens: whose they are, and where the row of a new one comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from streammerge.errors import RecipeError
from streammerge.recipe.fields import TRUTH, WHOLE, FormOf, Kind, MapOf, Path, Plain, Problems, Schema, key, shown
from streammerge.recipe.scalars import MODEL

NO_MODEL = ("base", "union")
"""Sources of a tokenizer that are no models."""
TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""The built-in chat templates."""
_LEAST_TEMPLATE = 20


@dataclass(frozen=True)
class TokenSource:
    """Where the row of a token comes from: the same token in ``model``; the token with another name or a number there; or
    zeros, if there is no model."""

    model: str | None = None
    token: str | None = None
    token_id: int | None = None


class _TokenSourceKind(Kind):
    """Reads a model, ``{kind: model_token, model, token | token_id}`` or ``{kind: zero}``."""

    def read(self, value: Any, path: Path, problems: Problems) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind is None:
            return TokenSource(MODEL.read(value, path, problems))
        known = {"zero": {"kind"}, "model_token": {"kind", "model", "token", "token_id"}}.get(kind)
        if known is None:
            problems.add((*path, "kind"), f"kind is model_token or zero, not {shown(kind)}")
            return None
        for name in value:
            if name not in known:
                problems.add((*path, name), f"unknown key {shown(name)}; a source of kind {kind} knows {', '.join(known)}")
        if kind == "zero":
            return TokenSource()
        token, number = value.get("token"), value.get("token_id")
        if (token is None) == (number is None):
            problems.add(path, "a source of kind model_token has either token or token_id")
            return None
        if number is not None:
            number = WHOLE.read(number, (*path, "token_id"), problems)
        model = MODEL.read(value.get("model"), (*path, "model"), problems)
        return TokenSource(model, None if token is None else str(token), number)

    def schema(self, forms: Schema) -> Schema:
        model = MODEL.schema(forms)
        other = {
            "kind": {"const": "model_token"},
            "model": model,
            "token": {"type": "string"},
            "token_id": {"type": "integer"},
        }
        zero = {"type": "object", "properties": {"kind": {"const": "zero"}}, "required": ["kind"]}
        return {"anyOf": [model, {"type": "object", "properties": other, "required": ["kind", "model"]}, zero]}

    def dump(self, value: Any) -> Any:
        if value.model is None:
            return {"kind": "zero"}
        if value.token is None and value.token_id is None:
            return value.model
        named = {"token": value.token} if value.token is not None else {"token_id": value.token_id}
        return {"kind": "model_token", "model": value.model, **named}


@dataclass(frozen=True)
class Token:
    """What a token's row is made of."""

    IGNORED: ClassVar[dict[str, str]] = {}

    source: TokenSource | None = key(
        _TokenSourceKind(), "A model, another token of a model, or zero; as for other tokens by default.", default=None
    )
    force: bool = key(TRUTH, "Whether models that have the token take this row too.", default=False)
    path: Path = field(default=(), compare=False, repr=False)


def _multiple(value: Any) -> int:
    number = WHOLE.parse(value)
    if number < 1:
        raise ValueError(value)
    return int(number)


@dataclass(frozen=True)
class Tokenizer:
    """Whose tokens the output has."""

    IGNORED: ClassVar[dict[str, str]] = {}

    source: str = key(MODEL, "base, union, or the model whose tokenizer the output has.", default="union")
    tokens: Mapping[str, Token] = key(MapOf(FormOf(Token)), "Token -> where its row comes from.", default_factory=dict)
    pad_to_multiple_of: int | None = key(
        Plain("a positive whole number", _multiple, {"type": "integer", "minimum": 1}),
        "The number of rows is rounded up to a multiple of this.",
        default=None,
    )

    @property
    def models(self) -> list[str]:
        """Every model that it names."""
        named = [] if self.source in NO_MODEL else [self.source]
        return named + [each.source.model for each in self.tokens.values() if each.source and each.source.model]

    def with_models(self, name: Callable[[str], str]) -> Tokenizer:
        """Returns the same with other names for its models."""

        def token(each: Token) -> Token:
            if each.source is None or each.source.model is None:
                return each
            return replace(each, source=replace(each.source, model=name(each.source.model)))

        source = self.source if self.source in NO_MODEL else name(self.source)
        return replace(self, source=source, tokens={text: token(each) for text, each in self.tokens.items()})


def _template(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if value in (*TEMPLATES, "auto") or ("{" in value and len(value) >= _LEAST_TEMPLATE):
        return value
    raise RecipeError(f"chat_template takes auto, {', '.join(TEMPLATES)}, or the text of a Jinja template")


TEMPLATE = Plain("a chat template", _template, {"type": "string"})
