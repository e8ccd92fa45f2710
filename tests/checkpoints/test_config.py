"""A configuration is read as Python reads it. The oracle is json."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.checkpoints.config import (
    config_folder,
    is_model_config,
    mappings,
    read_config,
    tie_flag,
    tree_of,
    value_at,
)
from streammerge.stores.locations import parse

TEXT = '{"time_step_limit": [0.0, Infinity], "low": -Infinity, "odd": NaN, "a": 1, "a": 2, "\\ud800": "\\u00e9"}'


def written(folder: Path, data: bytes) -> Path:
    (folder / "config.json").write_bytes(data)
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_what_python_reads_is_read(tmp_path: Path, encoding: str) -> None:
    config = read_config(parse(written(tmp_path, TEXT.encode(encoding))))
    assert config is not None
    assert not config.unread
    expected = json.loads(TEXT)
    assert repr(config.tree) == repr(expected), "NaN is not equal to itself"
    assert math.isinf(config.tree["time_step_limit"][1])
    assert config.tree["a"] == 2
    assert json.loads(config.text)["a"] == 2, "without the byte order mark, which Python refuses in a text"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[1, 2]", "no mapping"),
        (b"null", "no mapping"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "' + b"x" * (16 << 20) + b'"}', "larger than 16 MiB"),
    ],
)
def test_why_a_configuration_is_not_read(tmp_path: Path, data: bytes, why: str) -> None:
    config = read_config(parse(written(tmp_path, data)))
    assert config is not None
    assert why in config.unread
    assert config.tree == tree_of(parse(tmp_path)) == {}


def test_no_configuration_and_no_regular_file(tmp_path: Path) -> None:
    assert read_config(parse(tmp_path)) is None
    assert read_config(None) is None
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(sm.FormatError, match=r"config\.json"):
        read_config(parse(tmp_path))


def test_the_folder_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / "m" / name).write_text("{}")
    assert config_folder(parse(tmp_path / "m")) == parse(tmp_path / "m")
    assert config_folder(parse(tmp_path / "m" / "model.safetensors.index.json")) == parse(tmp_path / "m")
    assert config_folder(parse(tmp_path / "m" / "model.safetensors")) is None


def test_mappings_are_the_ones_that_describe_the_model() -> None:
    tree = {"a": {"b": {"c": 1}}, "quantization_config": {"d": {}}, "id2label": {"0": "x"}, "list": [{"e": 1}]}
    assert [path for path, _ in mappings(tree)] == [(), ("a",), ("a", "b")]
    assert value_at(tree, ("a", "b", "c")) == 1
    assert value_at(tree, ("a", "x", "c")) is value_at(tree, ("list", "e")) is None


def test_the_outermost_flag_counts() -> None:
    assert tie_flag({}) is None
    assert tie_flag({"tie_word_embeddings": None}) is None
    assert tie_flag({"a": {"b": {"tie_word_embeddings": True}}}) is True
    assert tie_flag({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}) is False
    assert is_model_config({"architectures": []})
    assert not is_model_config({"audio": {"sample_rate": 22050}})
