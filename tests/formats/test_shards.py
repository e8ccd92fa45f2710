"""The files of one checkpoint as one container. Indexes of whole folders are tested with the folders."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.errors import FormatError
from streammerge.formats import shards
from streammerge.formats.detect import read_file
from streammerge.formats.shards import inside, read_sharded, read_weight_map
from streammerge.stores.locations import parse
from streammerge.strict_json import load_json


def test_every_tensor_of_the_shards_is_read_in_the_order_of_the_files(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2), "old": torch.ones(1)}, tmp_path / "m-1.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-2.safetensors", "b": "./m-1.safetensors"}}))
    assert read_weight_map(parse(index)) == {"a": "m-2.safetensors", "b": "m-1.safetensors"}
    made = read_sharded(parse(index), read_file)
    assert [*made.tree] == ["b", "old", "a"]
    assert made.form is not None
    assert (made.format, made.form.index) == ("sharded safetensors", index.name)
    assert any("does not name 1 tensor of its shards" in note for note in made.notes)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "", "~x", "c:x", 3, None, "x" * 300])
def test_only_the_name_of_a_file_below_the_folder_is_taken(tmp_path: Path, name: object) -> None:
    with pytest.raises(FormatError, match=r"is not the name of a file in this folder|is longer than"):
        inside(parse(tmp_path), name)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}'])
def test_an_index_without_a_map_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"JSON|no weight_map|not text"):
        read_weight_map(parse(tmp_path / "m.index.json"))


def test_a_usual_index_is_read_as_json() -> None:
    """The quick reader of a weight map accepts nothing that the strict one refuses, and reads nothing otherwise."""
    content = {"metadata": {"total_size": 7}, "weight_map": {"a.0": "x-1.safetensors", "ü": "y", "c": "x-1.safetensors"}}
    draw, accepted = random.Random(0), 0
    for indent in (None, 2):
        for text in (json.dumps(content, indent=indent, ensure_ascii=False), json.dumps({"weight_map": {"a": "b"}})):
            assert shards._usual_weight_map(text) == json.loads(text)["weight_map"]
            for _ in range(4000):
                at = draw.randrange(len(text))
                put = draw.choice(["", '"', ",", "}", "{", "\\", "\n", "\v", " ", "a"])
                changed = text[:at] + put + text[at + draw.randint(0, 2) :]
                try:
                    made = shards._usual_weight_map(changed)
                except ValueError as error:
                    with pytest.raises(ValueError, match=re.escape(str(error)[:9])):
                        load_json(changed)
                    continue
                if made is not None:
                    accepted += 1
                    assert made == load_json(changed)["weight_map"], changed
    assert accepted > 1000
    twice = '{"weight_map": {"a": "x", "a": "y"}}'
    inner = '{"b": {"weight_map": {"a": "x"}}}'
    for text in (twice, inner, '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}", ""):
        assert shards._usual_weight_map(text) is None
