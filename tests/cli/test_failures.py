"""Errors as a sentence and as JSON, of whole commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file

from streammerge.cli import main
from streammerge.cli.failures import add_note, notes_of, wants_json

COMMANDS = [
    (("inspect", "absent.pth"), "RecipeError", 2, "absent.pth does not exist"),
    (("merge", "absent.pth", "-o", "x.pth"), "RecipeError", 2, "absent.pth does not exist"),
    (("merge", "a.safetensors"), "UsageError", 2, "the output has no name; add -o OUT"),
    (("merge", "a.safetensors", "--denisty", "0.5", "-o", "x.pth"), "UsageError", 2, "no such option"),
    (("merge",), "UsageError", 2, "missing argument 'INPUT...'"),
    (("plan", "a.safetensors", "--memory", "lots"), "RecipeError", 2, "'lots' is not a size"),
    (("merge", "a.safetensors", "nan.safetensors", "-o", "x.pth"), "VerifyError", 3, "--allow-nonfinite"),
    (("convert", "text.pth", "-o", "x.safetensors"), "FormatError", 4, "text.pth"),
    (("merge", "a.safetensors", "-o", "text.pth"), "RecipeError", 2, "--overwrite"),
    (("merge", "a.safetensors", "-o", "a.safetensors"), "FormatError", 4, "is one of the inputs"),
    (("verify", "a.safetensors"), "VerifyError", 3, "a.safetensors"),
    (("methods", "tie"), "RecipeError", 2, "did you mean ties?"),
    (("runs", "absent"), "RecipeError", 2, "absent"),
]


@pytest.mark.parametrize(("command", "kind", "code", "words"), COMMANDS, ids=str)
def test_a_program_reads_one_object(
    command: tuple[str, ...], kind: str, code: int, words: str, tmp_path: Path, cli: Cli
) -> None:
    save_file({"w": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    save_file({"w": torch.full((3, 4), float("nan"))}, tmp_path / "nan.safetensors")
    (tmp_path / "text.pth").write_text("no checkpoint")
    plain = cli(*command, code=code)
    assert plain.stdout == ""
    done = cli(*command, "--format", "json", code=code)
    said = json.loads(done.stdout)
    assert said.keys() == {"error"}
    assert said["error"].keys() == {"class", "exit_code", "message", "notes"}
    assert (said["error"]["class"], said["error"]["exit_code"]) == (kind, code)
    assert words in said["error"]["message"]
    assert plain.stderr.strip().endswith(f"error: {said['error']['message']}"), "the sentence that people read"
    assert json.loads(done.stderr.splitlines()[-1]) == {"event": "Failed", **said["error"]}
    assert all(json.loads(line)["event"] for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("typed", "environment", "wanted"),
    [
        (["merge", "--format", "json"], {}, True),
        (["merge", "--format=json", "a"], {}, True),
        (["merge", "--format", "json", "--format", "human"], {}, False),
        (["merge", "--", "--format", "json"], {}, False),
        (["merge", "json"], {}, False),
        (["merge", "a"], {"STREAMMERGE_MERGE_FORMAT": "json"}, True),
        (["plan", "a"], {"STREAMMERGE_MERGE_FORMAT": "json"}, False),
        (["merge", "--format", "human"], {"STREAMMERGE_MERGE_FORMAT": "json"}, False),
        (["--format"], {}, False),
        ([], {}, False),
    ],
)
def test_what_asks_for_json(typed: list[str], environment: dict[str, str], wanted: bool) -> None:
    assert wants_json(typed, environment) is wanted


def test_notes_stand_beside_an_error() -> None:
    error = ValueError("x")
    assert notes_of(error) == []
    add_note(error, "one")
    add_note(error, "two")
    assert notes_of(error) == ["one", "two"]


def test_a_mistake_of_the_program_is_one_object_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its traceback on stderr: stdout is always one object."""

    def broken(*_: object, **__: object) -> None:
        raise StopIteration("nothing left")

    monkeypatch.setattr(main.cli, "main", broken)
    monkeypatch.setattr(sys, "argv", ["streammerge", "merge", "--format", "json"])
    with pytest.raises(StopIteration):
        main.main()
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == {"class": "StopIteration", "exit_code": 1, "message": "nothing left", "notes": []}
