"""Every container holds its recipe and its receipt under these names."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import streammerge as sm
from streammerge.formats.records import RECEIPT_FILE, RECEIPT_KEY, RECIPE_FILE, RECIPE_KEY


def test_recipe_and_receipt_have_one_name_in_each_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(3, 2)}, "a.pth")
    Path("folder").mkdir()
    save_file({"w": torch.ones(3, 2)}, "folder/model.safetensors", {"format": "pt"})
    for given, out in (("a.pth", "o.pth"), ("a.pth", "o.safetensors"), ("folder", "o/")):
        sm.merge([given, given], out)
    assert {RECIPE_FILE, RECEIPT_FILE} == {"streammerge.yaml", "streammerge.json"}
    assert (Path("o") / RECIPE_FILE).read_text().startswith("merge_method: linear")
    receipts = [json.loads((Path("o") / RECEIPT_FILE).read_text())]
    with safe_open("o.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()[RECIPE_KEY])["merge_method"] == "linear"
        receipts.append(json.loads(opened.metadata()[RECEIPT_KEY]))
    archive = zipfile.ZipFile("o.pth")
    names = {name.rpartition("/")[2]: name for name in archive.namelist()}
    assert archive.read(names[RECIPE_FILE]).startswith(b"merge_method: linear")
    receipts.append(json.loads(archive.read(names[RECEIPT_FILE])))
    assert all(receipt.keys() >= {"digest", "recipe", "inputs"} for receipt in receipts)
