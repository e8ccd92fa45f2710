"""Reports, opened in a real browser where there is one: what they say, that they fit a phone and need no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file

import streammerge as sm

pytest.importorskip("matplotlib", reason="matplotlib, which draws the pictures, is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAYERS = 12


def model(seed: int, scale: float, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns a base with changes that grow with the layer."""
    base, make = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    made = {"model.embed_tokens.weight": torch.randn(40, 16, generator=base)}
    for layer in range(LAYERS):
        for kind, shape in (("q_proj", (16, 16)), ("up_proj", (15, 16)), ("norm", (16,))):
            name = f"model.layers.{layer}.{kind}.weight"
            made[name] = torch.randn(shape, generator=base)
            made[name] += scale * (layer + 1) ** 2 / LAYERS**2 * torch.randn(shape, generator=make)
    made["steps"] = torch.tensor(3 + seed)
    return made | more


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed, scale in (("base", 0, 0.0), ("chat", 1, 0.1), ("code", 2, 0.3)):
        more = {f"visual.{n}.w": torch.ones(3) for n in range(4)} if name == "code" else {}
        Path(name).mkdir()
        save_file(model(seed, scale, **more), f"{name}/model.safetensors", metadata={"format": "pt"})
        Path(name, "config.json").write_text(json.dumps({"model_type": "<b>x</b>"}))
    sm.merge(["chat", "code"], "out/", base="base", method="task_arithmetic", parameters={"weight": 0.5}, **ASKED)
    return tmp_path


ASKED: dict[str, Any] = {"on_missing": "base", "integers": "first", "report": "report.html"}


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)))


def test_it_says_which_layers_moved_and_what_was_not_used(merged: Path) -> None:
    page = Path("report.html").read_text()
    first = text_of(page)[:500]
    assert f"moved most, from base model.layers.{LAYERS - 1} (" in first
    assert "not used 4 of 42 tensors of code: visual.{0-3}.w (the first input lacks it)" in first
    assert page.count("<svg ") == 3 + 1 or page.count("<svg ") == 3  # a run of some milliseconds may have one sample
    assert "&lt;b&gt;" in page or "<b>x</b>" not in page


def test_distances_are_those_of_the_files(merged: Path) -> None:
    page = Path("report.html").read_text()
    made, base = load_file("out/model.safetensors"), load_file("base/model.safetensors")
    name = f"model.layers.{LAYERS - 1}.up_proj.weight"
    apart = float((made[name] - base[name]).norm() / base[name].norm())
    row = next(row for row in page.split("<tr>") if f">{name}<" in row and "task_arithmetic" in row)
    assert f'<td class="n">{apart:.3g}</td>' in row


def test_measuring_changes_no_byte(merged: Path) -> None:
    asked = {key: value for key, value in ASKED.items() if key != "report"}
    sm.merge(["chat", "code"], "plain/", base="base", method="task_arithmetic", parameters={"weight": 0.5}, **asked)
    for file in Path("plain").iterdir():
        assert file.read_bytes() == Path("out", file.name).read_bytes()


def test_it_needs_nothing_but_itself(merged: Path) -> None:
    page = Path("report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # pictures do not share the parts that they refer to
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_a_report_of_an_output_reads_its_receipt(merged: Path) -> None:
    assert str(sm.report("out", "later.html")) == "later.html"
    now, later = (text_of(Path(name).read_text()) for name in ("report.html", "later.html"))
    assert "not used 4 of 42 tensors of code: visual.{0-3}.w (the first input lacks it)" in later[:500]
    most = re.compile(r"moved most, from base (.*?) \(")
    assert most.findall(now)[0] == most.findall(later)[0]
    with pytest.raises(sm.RecipeError, match="exists already"):
        sm.report("out", "later.html")
    sm.report("out", "later.html", compare=False, overwrite=True)
    assert "The distances are not known" in text_of(Path("later.html").read_text())
    with pytest.raises(sm.RecipeError, match="leave one out"):
        sm.report("out", "exact.html", compare=False, exact=True)
    shutil.rmtree("chat"), shutil.rmtree("base"), shutil.rmtree("code")
    sm.report("out", "alone.html")
    assert "was not found here" in text_of(Path("alone.html").read_text())


def test_all_elements_are_compared_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        save_file({"w": torch.randn(300, 300, generator=torch.Generator().manual_seed(number))}, f"{name}.safetensors")
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", weights=[0.9, 0.1], statistics=True)
    made, a = load_file("out.safetensors")["w"], load_file("a.safetensors")["w"]
    apart = f'<td class="n">{float((made - a).norm() / a.norm()):.3g}</td>'
    sm.report("out.safetensors", "sample.html")
    sample = Path("sample.html").read_text()
    assert "estimated while merging, from a sample" in sample
    assert apart not in sample
    sm.report("out.safetensors", "exact.html", exact=True)
    exact = Path("exact.html").read_text()
    assert "from a sample" not in exact
    assert apart in exact


def test_a_comparison_has_a_report_too(merged: Path, cli: Cli) -> None:
    cli("diff", "chat", "code", "--base", "base", "--report", "diff.html", code=1)
    text = text_of(Path("diff.html").read_text())
    assert f"moved most, from A model.layers.{LAYERS - 1} (" in text[:600]
    assert "4 only in B" in text[:900]
    assert "The changes " in text[:300]


def test_the_commands(merged: Path, cli: Cli) -> None:
    assert "wrote page.html" in cli("report", "out", "-o", "page.html").stdout
    assert "exists already" in cli("report", "out", "-o", "page.html", code=2).stderr
    cli("merge", "chat", "base", "-o", "two.safetensors", "--integers", "first", "--report", "two.html")
    assert "everything was used" in text_of(Path("two.html").read_text())


def test_a_report_replaces_only_a_report(merged: Path, cli: Cli) -> None:
    """Whatever may be replaced, a page takes neither the place of an input nor that of an output."""
    one, two = sorted(Path().glob("c*/model.safetensors"))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for typed in (
        ["diff", "chat", "code", "--report", one],
        ["diff", "chat", "code", "--report", "chat/config.json"],
        ["report", "out", "-o", "out/model.safetensors", "--overwrite"],
        [
            "merge",
            one,
            two,
            "-o",
            "n.safetensors",
            "--report",
            one,
            "--overwrite",
            "--on-missing",
            "base",
            "--integers",
            "first",
        ],
    ):
        assert "is no report, and would be lost; choose another name" in cli(*typed, code=2).stderr
    for page in ("n.safetensors", "chat/page.html"):
        said = cli("merge", "chat", "base", "-o", "n.safetensors", "--integers", "first", "--report", page, code=2).stderr
        assert f"--report {page} is, or lies in, an input or the output" in said
    for page in ("chat", "file/page.html"):
        Path("file").touch()
        cli("merge", "chat", "base", "-o", "n.safetensors", "--integers", "first", "--report", page, "--overwrite", code=2)
    assert {path: path.read_bytes() for path in before} == before
    assert not Path("n.safetensors").exists()
    for _ in range(2):
        cli("diff", "chat", "code", "--report", "new/folder/diff.html", code=1)
    assert text_of(Path("new/folder/diff.html").read_text())


def test_a_place_where_no_report_can_be_written_is_told_before_the_merge(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: Path(path).name != "locked" and access(path, *a, **k))
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    with pytest.raises(sm.RecipeError, match=r"cannot write beside locked/new/page\.html: Permission denied"):
        sm.merge(["chat", "base"], "none.safetensors", integers="first", report="locked/new/page.html")
    assert not Path("none.safetensors").exists()


def test_a_home_that_cannot_be_written_is_no_matter(merged: Path) -> None:
    """matplotlib then takes a temporary folder, which goes with the process, and says nothing."""
    Path("tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "streammerge", "report", "out", "-o", "page.html", "--no-compare"],
        env={**os.environ, "HOME": "/proc/nothing", "TMPDIR": str(merged / "tmp"), "MPLCONFIGDIR": "/proc/nothing"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert not list(Path("tmp").iterdir())


def test_without_the_extra_the_command_says_what_to_install(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(sm.RecipeError, match=r"pip install 'streammerge\[report\]'"):
        sm.merge(["chat", "base"], "none.safetensors", integers="first", report="none.html")
    assert not Path("none.safetensors").exists()


def opened(page: Path, width: int, *more: str) -> str:
    """Returns the page as a browser of this width has it. Its title says how wide it is, and the colour of its paper."""
    script = (
        "<script>const d = document.documentElement; document.querySelectorAll('details').forEach(e => e.open = true);"
        "document.title = d.scrollWidth + ' ' + getComputedStyle(document.body).backgroundColor + ' ' +"
        "[...document.querySelectorAll('figure svg')].map(e => Math.round(e.getBoundingClientRect().width)).join(',')"
        "</script></body>"
    )
    frame = page.with_name("frame.html")
    page.with_name("inner.html").write_text(page.read_text().replace("</body>", script))
    frame.write_text(
        f"<!doctype html><body><iframe id=f src=inner.html style='width:{width}px;height:3000px;border:0'></iframe><script>"
        "onload = () => { document.title = document.getElementById('f').contentDocument.title }</script>"
    )
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *more]
    command += [f"--user-data-dir={page.parent}/browser", "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    found = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert found, done.stderr[-500:]
    return found[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_scrolling_sideways(merged: Path, width: int) -> None:
    scroll, paper, pictures = re.fullmatch(r"(\d+) (rgb\([^)]*\)) ([\d,]*)", opened(merged / "report.html", width)).groups()  # type: ignore[union-attr]
    assert int(scroll) <= width
    assert paper == "rgb(255, 255, 255)"
    assert all(300 <= int(each) <= width for each in pictures.split(","))
    dark = opened(merged / "report.html", width, "--blink-settings=preferredColorScheme=0")
    assert "rgb(20, 24, 28)" in dark
