"""What a run must not lose: inputs, their folders, other files; and inputs that change meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm


def test_an_input_that_changes_during_the_run_leaves_no_output(tmp_path: Path) -> None:
    for number in range(2):
        save_file(trained(number), tmp_path / f"{number}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]

    def meddle(event: object) -> None:
        if type(event).__name__ == "Syncing" or type(event).__name__ == "TaskDone":
            os.utime(paths[1], (1, 1))

    with pytest.raises(sm.ChangedError, match=r"1\.safetensors changed"):
        sm.merge(paths, tmp_path / "out.safetensors", listener=meddle)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_that_is_an_input_is_refused(tmp_path: Path, link: object) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    before = (tmp_path / "in.safetensors").read_bytes()
    link(tmp_path / "in.safetensors", tmp_path / "out.safetensors")  # type: ignore[operator]
    with pytest.raises(sm.FormatError, match="one of the inputs"):
        sm.merge([tmp_path / "in.safetensors"], tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file(trained(1), tmp_path / "a" / "model.safetensors")
    with pytest.raises(sm.FormatError, match="holds one of the inputs"):
        sm.merge([tmp_path / "a"], tmp_path / "a", overwrite=True)
    assert_same(load_safetensors(tmp_path / "a" / "model.safetensors"), trained(1))


def folders(tmp_path: Path) -> tuple[Path, Path]:
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file(trained(number), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path / "a", tmp_path / "b"


def test_an_output_in_the_folder_of_an_input_is_refused(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    with pytest.raises(sm.FormatError, match="lies in the folder of an input"):
        sm.merge([a, b], a / "merged.safetensors", integers="first")
    with pytest.raises(sm.FormatError, match="lies in the folder of an input"):
        sm.merge([a, b], b / "merged" / "x.safetensors" if (b / "merged").mkdir() else b / "merged" / "x", integers="first")


def test_a_folder_with_a_hard_link_of_an_input_is_not_replaced(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "out").mkdir()
    os.link(a / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(sm.FormatError, match="holds one of the inputs"):
        sm.merge([a, b], tmp_path / "out", integers="first", overwrite=True)


def test_a_file_in_the_place_of_a_folder_is_noticed_first(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(sm.RecipeError, match="is a file, and a folder is to be there"):
        sm.merge([a, b], tmp_path / "out", integers="first", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("how", ["own", "link"])
def test_extras_over_an_inputs_configuration_are_refused(tmp_path: Path, how: str) -> None:
    a, _ = folders(tmp_path)
    extras = a / "config.json"
    if how == "link":
        extras = tmp_path / "linked.json"
        os.link(a / "config.json", extras)
    with pytest.raises(sm.RecipeError, match="an input or the output"):
        sm.convert(a, tmp_path / "out", extras=extras, overwrite=True)
    assert (a / "config.json").read_text() == "{}"


def test_our_own_output_is_replaced_whatever_it_held(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    sm.merge([a, b], tmp_path / "out", integers="first")
    sm.merge([a / "model.safetensors", b / "model.safetensors"], tmp_path / "out", integers="first", overwrite=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_side_file_that_changes_is_noticed(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (tmp_path / "secret").write_text("secret")

    def listen(event: object) -> None:
        if type(event).__name__ == "RunStarted":
            (a / "config.json").unlink()
            (a / "config.json").symlink_to(tmp_path / "secret")

    with pytest.raises(sm.ChangedError, match=r"config\.json"):
        sm.merge([a, b], tmp_path / "out", integers="first", listener=listen)
    assert not (tmp_path / "out").exists()
