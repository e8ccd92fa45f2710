"""The command line as a user sees it: its output, its streams, and its exit codes."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file

from streammerge.cli.commands import SHORT
from streammerge.cli.main import cli as group
from streammerge.plugins import module_names
from streammerge.version import __version__


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merge", "absent.pth", "-o", "x.pth"], 2, "absent.pth does not exist"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "1", "-o", "x.pth"], 2, "1 weight for 2 inputs"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "a,b", "-o", "x.pth"], 2, "takes numbers joined by commas"),
        (["merge", "news.pth", "audiobook.pth", "--weights", "1,-1", "-o", "x.pth"], 2, "sum to zero"),
        (["merge", "news.pth", "-o", "x.txt"], 2, "x.txt does not say what to write"),
        (["merge", "news.pth", "-o", "audiobook.pth"], 2, "exists already"),
        (["merge", "news.pth", "-o", "./news.pth"], 4, "is one of the inputs"),
        (["merge", "news.pth", "-o", "news.pth", "--overwrite"], 4, "is one of the inputs"),
        (["merge", "news.pth", "-o", "news.pth/x.pth"], 2, "is no folder"),
        (["merge", "news.pth", "-o", "-"], 2, "cannot go to stdout (-); name a file"),
        (["merge", "news.pth"], 2, "the output has no name; add -o OUT"),
        (["convert", "news.pth"], 2, "the output has no name; add -o OUT"),
        (["convert", "news.pth", "x.pth"], 2, "got unexpected extra argument (x.pth); if it is the output, write -o x.pth"),
        (
            ["merge", "news.pth", "audiobook.pth", "--weights", "0.6", "0.4", "-o", "x.pth"],
            2,
            "0.4 was read as an input; join the weights by commas: --weights 0.6,0.4",
        ),
        (["merge", "news.pth:0.5", "audiobook.pth", "-o", "x.pth"], 2, "audiobook.pth has no weight behind it"),
        (["merge", "news.pth", "ftp://a.b/c.pth", "-o", "x.pth"], 2, "no store is known for ftp://"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "512"], 2, "512 means 512 bytes; write 512MiB or 512GiB"),
        (["merge", "news.pth", "-o", "x.pth", "--device", "cuda"], 2, "computes on CPUs, so there is no device to choose"),
        (
            ["merge", "news.pth", "-o", "x.pth", "-m", "ties", "--density", "0.5"],
            2,
            "density is a parameter of ties: -p density=0.5",
        ),
        (
            ["merge", "news.pth", "-o", "x.pth", "-m", "ties", "--densty", "0.5"],
            2,
            "no such option '--densty'; did you mean -p density=0.5, a parameter of ties?",
        ),
        (["merge", "news.pth", "-o", "x.pth", "--xyz"], 2, "no such option '--xyz'; see `streammerge merge --help`"),
        (["inspect", "news.pth", "--on-missing", "base"], 2, "it is an option of `streammerge merge`"),
        (["merge", "news.pth", "-o", "x.pth", "--method", "liner"], 2, "did you mean linear"),
        (["merge", "news.pth", "-o", "x.pth", "--dtype", "bflot16"], 2, "did you mean bfloat16"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "1MiB"], 5, "pass --memory"),
        (["merge", "news.pth", "-o", "x.pth", "--memory", "lots"], 2, "is not a size"),
        (["merge", "n*.pt", "-o", "x.pth"], 2, "nothing matches"),
        (["merge", "news.pth", "-o", "x.pth", "--last", "3"], 2, "there is only 1 checkpoint"),
        (["merge", "news.pth", "-o", "x.pth", "-p", "density=0.5"], 2, "density"),
        (["merge", "news.pth", "broken.pth", "-o", "x.pth"], 4, "broken.pth is a Git LFS pointer"),
        (["merge", "news.pth", "other.pth", "-o", "x.pth"], 4, "do not have the same tensors"),
        (["inspect", "broken.pth"], 4, "git lfs pull"),
        (["frobnicate"], 2, "there is no command frobnicate; see `streammerge --help`"),
        (["version"], 2, "there is no command version; did you mean --version?"),
        (["news.pth", "audiobook.pth"], 2, "to merge, type `streammerge merge news.pth audiobook.pth`"),
        (
            ["help", "frobnicate"],
            2,
            "there is no command frobnicate; there are clean, convert, diff, extract, finish, help",
        ),
        (["merge", "news.pth", "-o", "x.pth", "--wieghts", "1"], 2, "no such option '--wieghts'; did you mean --weights?"),
        (["merge", "newz.pth", "-o", "x.pth"], 2, "newz.pth does not exist; did you mean news.pth?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_sentence_and_its_exit_code(
    cli: Cli, tmp_path: Path, voices: tuple[Path, Path], arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "broken.pth").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pth")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = cli(*arguments, code=code)
    assert said in done.stderr
    assert done.stdout == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_short_option_takes_its_value_behind_an_equals_sign(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    cli("merge", *voices, "-o=x.pth", "-m=slerp", "-p=t=0.3", "-q")
    assert (tmp_path / "x.pth").exists()
    assert "slerp" in cli("inspect", "x.pth", "--recipe").stdout
    assert "=" not in "".join(path.name for path in tmp_path.iterdir())


def test_verbose_shows_more(cli: Cli, voices: tuple[Path, Path]) -> None:
    merged = cli("merge", *voices, "-o", "x.pth", "-v")
    assert "linear -> x.pth" in merged.stderr
    assert "linear -> x.pth" not in cli("merge", *voices, "-o", "y.pth").stderr
    assert "convert -> z.pth" in cli("convert", voices[0], "-o", "z.pth", "--verbose").stderr
    assert "float32" in cli("inspect", voices[0], "-v").stdout
    assert cli("-v").stdout == cli("-V").stdout == cli("--version").stdout


@pytest.mark.parametrize("typed", [[], ["help"], ["-h"], ["--help"]], ids=str)
def test_the_help_is_no_error(cli: Cli, tmp_path: Path, typed: list[str]) -> None:
    done = cli(*typed)
    assert done.stdout.startswith("Usage: streammerge")
    assert done.stderr == ""


def test_the_help_of_a_command_lists_options_under_headings(cli: Cli, tmp_path: Path) -> None:
    done = cli("help", "merge")
    assert done.stdout == cli("merge", "--help").stdout
    order = ["Required:", "-o, --out OUT", "What is merged, and how:", "-m, --method", "Options:", "Exit codes: 0 done"]
    assert [done.stdout.index(text) for text in order] == sorted(done.stdout.index(text) for text in order)
    example = "streammerge merge news.pth audiobook.pth --weights 0.6,0.4 -o voice.pth"
    assert done.stdout.index(example) < done.stdout.index("Required:")


@pytest.mark.parametrize(
    "typed",
    [
        ["news.pth", "audiobook.pth", "--weights", "0.6,0.4"],
        ["news.pth", "audiobook.pth", "--weight", "60%,40%"],
        ["news.pth:0.6", "audiobook.pth:40%"],
        ["news.pth", "audiobook.pth", "-p", "weight=0.6,0.4", "-m", "Average"],
        ["news.pth", "audiobook.pth", "--weights=0.6,0.4", "--merge_method", "lerp"],
    ],
    ids=" ".join,
)
def test_one_merge_has_many_spellings(cli: Cli, tmp_path: Path, voices: tuple[Path, Path], typed: list[str]) -> None:
    plain = ["merge", "news.pth", "audiobook.pth", "--weights", "0.6,0.4", "-o", "plain.safetensors", "--dtype", "float16"]
    cli(*plain)
    done = cli("merge", *typed, "--output", "new/folder/x.safetensors", "--dtype", "fp16", "-q")
    assert done.stdout == done.stderr == ""
    one, two = (load_file(tmp_path / name) for name in ("plain.safetensors", "new/folder/x.safetensors"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("how", ["json", "stdin"])
def test_a_recipe_may_be_json_or_come_on_stdin(cli: Cli, tmp_path: Path, voices: tuple[Path, Path], how: str) -> None:
    recipe = '{"merge_method": "linear", "models": ["news.pth", {"model": "audiobook.pth"}]}'
    (tmp_path / "recipe.json").write_text(recipe)
    command = [
        sys.executable,
        "-m",
        "streammerge",
        "merge",
        "-" if how == "stdin" else "recipe.json",
        "-o",
        "x.safetensors",
    ]
    subprocess.run(command, input=recipe, text=True, cwd=tmp_path, check=True, capture_output=True)
    cli("merge", "news.pth", "audiobook.pth", "-o", "y.safetensors")
    one, two = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in two)
    bad = subprocess.run(
        [*command[:4], "-", "-o", "z.safetensors"], input="[1]", text=True, cwd=tmp_path, capture_output=True
    )
    assert (bad.returncode, "stdin holds no recipe" in bad.stderr) == (2, True)


def test_a_dry_run_needs_no_output(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    assert "6 merged by linear" in cli("merge", "news.pth", "audiobook.pth", "--dry-run").stdout


def test_a_name_of_the_hub_is_found_in_its_cache(
    cli: Cli, tmp_path: Path, voices: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    repository = tmp_path / "hf/hub/models--me--voice"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.pth").write_bytes((tmp_path / "news.pth").read_bytes())
    assert "9 tensors" in cli("inspect", "me/voice").stdout
    cli("merge", "me/voice", "audiobook.pth", "-o", "x.safetensors")
    cli("convert", "me/voice", "-o", "y.safetensors")
    assert "me/voice" in cli("inspect", "x.safetensors", "--recipe").stdout


def test_a_limit_on_memory_gets_a_sentence(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    """Whether it stops torch from loading, a map of a file, or an allocation. At the end of the limits all goes well."""
    said = set()
    for kilobytes in (300_000, 700_000, 900_000, 1_200_000):
        merge = "merge news.pth audiobook.pth -m karcher -o x.pth"
        command = f"ulimit -v {kilobytes} && exec {sys.executable} -m streammerge {merge}"
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            said.add(done.stderr)
            assert "Traceback" not in done.stderr
            assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
            assert "(ulimit -v)" in done.stderr
            assert not (tmp_path / "x.pth").exists()
        (tmp_path / "x.pth").unlink(missing_ok=True)
    assert said


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    command = [sys.executable, "-m", "streammerge", "inspect", str(tmp_path / "x.pth"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "Traceback" in done.stderr


def test_a_module_ends_as_the_command_does() -> None:
    """At once: torch takes half a second to end."""
    late = "import atexit, runpy, sys; atexit.register(print, 'late'); sys.argv[1:] = ['--version']; "
    late += "runpy.run_module('streammerge', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, check=True)
    assert done.stdout == f"streammerge, version {__version__}\n"


def test_a_terminal_shows_progress_and_leaves_a_clean_screen(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "streammerge", "merge", *map(str, voices), "-o", str(tmp_path / "voice.pth")]
    subprocess.run(command, stdout=slave, stderr=slave, check=True)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:
        pass
    text = shown.decode()
    assert "memory" in text
    assert "of 512 MiB" in text
    assert "peak memory" in text.splitlines()[-2], "the last sentence takes two lines of 80 columns"


def test_the_help_tells_the_first_sentence_of_each_command() -> None:
    assert [*SHORT] == module_names("streammerge.cli.commands")
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    assert {name: command.get_short_help_str(1000) for name, command in found.items() if command} == SHORT


STRACE = shutil.which("strace")


@pytest.mark.skipif(STRACE is None or sys.version_info < (3, 11), reason="needs strace and frames in chunks")
def test_the_stack_is_not_mapped_anew_at_each_call(tmp_path: Path) -> None:
    """Calls that cross the end of a chunk of 16 KiB would map and unmap it each time, thousands of times during imports."""
    deep = "def even(): pass\ndef deep(n):\n  for _ in range(200): even()\n  n and deep(n - 1)\n"
    inside = "import streammerge.cli.main as m\nm.cli.main = lambda **options: deep(400)\nm.main()"
    maps = []
    for program in ("deep(400)", inside):
        command = [str(STRACE), "-f", "--seccomp-bpf", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=mmap"]
        subprocess.run([*command, sys.executable, "-c", deep + program], check=True, timeout=120)
        maps.append((tmp_path / "trace").read_text().count("NULL, 16384, PROT_READ|PROT_WRITE"))
    assert maps[0] > 100 > maps[1]


def test_a_current_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    words = ["streammerge", "merge", "/a.pt", "-o", "x.pt"]
    script = f"import os, sys; os.rmdir('../gone'); sys.argv = {words}; from streammerge.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the current folder was removed; go to another one (cd), and run the command there\n"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="takes rights away from root")
def test_what_may_not_be_read_is_told_before_the_merge(tmp_path: Path, cli: Cli) -> None:
    """Also a side file, which is copied last: nothing was made for it in vain."""
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(3)}, tmp_path / name / "model.safetensors")
    (tmp_path / "a/merges.txt").write_text("x")
    locked = {"a/merges.txt": "a/merges.txt", "a/model.safetensors": "a/model.safetensors", "b": "b"}
    for path, said in locked.items():
        mode = (tmp_path / path).stat().st_mode
        (tmp_path / path).chmod(0)
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        command = [*drop, sys.executable, "-m", "streammerge", "merge", "a", "b", "-o", "out/"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 4, done.stderr
        assert said in done.stderr
        assert "Permission denied" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b"]
        (tmp_path / path).chmod(mode)
