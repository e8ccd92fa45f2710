"""Added tokens that a tokenizer can never produce. The oracle is the package tokenizers, where it is installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from streammerge.checkpoints import reachable
from streammerge.checkpoints.reachable import unreachable
from streammerge.checkpoints.tokens import entry

TOKENS = ("the", "Ġthe", "▁the", "##ing", "<|im_end|>", "中", "Ã©", "Ab", "a b", "<0x0A>", "Ġ", "é")
LLAMA2 = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
BYTES = {"normalizer": {"type": "NFC"}, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}
METASPACE = {
    "normalizer": None,
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
}
LOWER = {"normalizer": {"type": "Lowercase"}, "decoder": None}
STYLES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "byte-level": (BYTES, {"Ġthe", "Ã©", "Ġ", "é"}),
    "Llama 2": (LLAMA2, {"▁the", "<0x0A>"}),
    "Metaspace": (METASPACE, {"▁the"}),
    "lower case": (LOWER, set()),
}


@pytest.mark.parametrize("style", STYLES)
def test_known_styles(style: str) -> None:
    steps, dead = STYLES[style]
    assert set(unreachable(steps, [entry(each, 0) for each in TOKENS]) or ()) == dead


def test_continuations_of_words() -> None:
    assert unreachable({"model": "WordPiece"}, [entry("##ing", 0), entry("ing", 1), entry("##", 2)]) == ["##ing"]


@pytest.mark.parametrize("style", ["byte-level", "Metaspace", "lower case"])
def test_the_package_says_the_same(style: str) -> None:
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    steps, dead = STYLES[style]
    assert set(reachable._by_library(steps, [entry(each, 0) for each in TOKENS]) or ()) == dead


def test_an_unknown_step_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert unreachable({"normalizer": {"type": "Precompiled"}}, [entry("x", 0)]) is None
