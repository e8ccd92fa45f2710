"""Which added tokens a tokenizer can produce.

An added token is matched in the text as it is, before the text is split. A token from another vocabulary whose name encodes
a space or bytes, like ``Ġthe``, stands in no text, so its row is never used.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from streammerge.checkpoints.tokens import Added

HOW_TO_COUNT = "counting those that it can never produce needs the package tokenizers: `pip install 'streammerge[llm]'`"
_METASPACE = "▁"


class _UnknownStep(Exception):
    """A step of a tokenizer that is not described here."""


def unreachable(steps: dict[str, Any], tokens: Sequence[Added]) -> list[str] | None:
    """Returns those of the added tokens that no text of their meaning contains; None if this cannot be told.

    ``steps``: see :class:`~streammerge.checkpoints.tokens.Tokens`. The package tokenizers is asked about steps that are not
    known here, if it is installed.
    """
    try:
        return [each["content"] for each in tokens if not _is_reachable(steps, each)]
    except _UnknownStep:
        return _by_library(steps, tokens)


def _is_reachable(steps: dict[str, Any], token: Added) -> bool:
    content = str(token["content"])
    if steps.get("model") == "WordPiece" and content.startswith("##") and len(content) > 2:
        return False
    text = _decoded(steps.get("decoder"), content)
    if not token.get("normalized", True):
        return content in text
    normalize = _normalizer(steps.get("normalizer"))
    wanted = normalize(content)
    return bool(wanted) and wanted in normalize(text)


def _normalizer(step: Any) -> Callable[[str], str]:
    kind = step.get("type") if isinstance(step, dict) else None
    if step is None:
        return str
    if kind == "Sequence":
        parts = [_normalizer(each) for each in step.get("normalizers", ())]

        def chained(text: str) -> str:
            for part in parts:
                text = part(text)
            return text

        return chained
    if kind == "Prepend":
        return lambda text: step["prepend"] + text if text else text
    if kind == "Replace" and isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
        return lambda text: text.replace(step["pattern"]["String"], step["content"])
    if kind == "Lowercase":
        return str.lower
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: unicodedata.normalize(kind, text)
    if kind == "BertNormalizer" and not step.get("strip_accents"):
        return lambda text: text.lower() if step.get("lowercase") else text
    raise _UnknownStep(kind)


def _decoded(step: Any, token: str) -> str:
    """Returns the text that a token stands for."""
    kind = step.get("type") if isinstance(step, dict) else None
    if step is None or kind in ("Fuse", "WordPiece"):
        return token
    if kind == "Sequence":
        for each in step.get("decoders", ()):
            token = _decoded(each, token)
        return token
    if kind == "ByteLevel":
        try:
            return bytes(_bytes_of_characters()[each] for each in token).decode("utf-8", "replace")
        except KeyError:
            return token
    if kind == "Metaspace":
        text = token.replace(step.get("replacement", _METASPACE), " ")
        return text.removeprefix(" ") if step.get("prepend_scheme") != "never" else text
    if kind == "Replace" and isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
        return token.replace(step["pattern"]["String"], step["content"])
    if kind == "ByteFallback":
        return "\ufffd" if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else token
    if kind == "Strip":
        for _ in range(step.get("start", 0)):
            token = token.removeprefix(step["content"])
        for _ in range(step.get("stop", 0)):
            token = token.removesuffix(step["content"])
        return token
    if kind == "BPEDecoder":
        return token.replace(step.get("suffix", "</w>"), "")
    raise _UnknownStep(kind)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Returns the character that byte-level vocabularies write for each byte -> that byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _by_library(steps: dict[str, Any], tokens: Sequence[Added]) -> list[str] | None:
    """Asks the package tokenizers. Added tokens are matched before the model, so a model of one token stands for it."""
    import json

    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    added = [{**each, "id": number} for number, each in enumerate(tokens, start=1)]
    model = {"type": "WordLevel", "vocab": {"\0": 0}, "unk_token": "\0"}
    whole = {"version": "1.0", "added_tokens": added, "normalizer": steps.get("normalizer")}
    whole |= {"decoder": steps.get("decoder"), "model": model}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(whole))
        texts = [tokenizer.decode([each["id"]], skip_special_tokens=False) for each in added]
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception:  # noqa: BLE001 - the package raises plain exceptions for what it does not take
        return None
    return [each["content"] for each, made in zip(added, found, strict=True) if each["id"] not in made.ids]
