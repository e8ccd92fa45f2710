"""Every command and program in the README runs and prints the text that the README shows.

The commands run in an environment that shows only the packages that `pip install .` installs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import click
import pytest
import torch
from benchmarks.cases import CASES
from safetensors.torch import save_file

from formats import dcp_maker
from streammerge.cli.main import cli as command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [(found[1], found[2]) for found in re.finditer(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def voice(seed: int, step: int, loss: float) -> dict[str, object]:
    parts = ("gpt.text_head", "gpt.conditioning_encoder.init", "hifigan_decoder.conv", "dvae.codebook", "torch_mel_x.mel")
    parts += tuple(f"gpt.layer.{number}" for number in range(30))
    model = OrderedDict(
        (f"xtts.{part}.weight", draw(n, 9, 4 + n) + 0.1 * draw(seed + n, 9, 4 + n)) for n, part in enumerate(parts)
    )
    losses = {"train_loss": loss, "eval_loss": loss + 0.2}
    optimizer = {"state": {0: {"exp_avg": draw(seed, 9, 4)}}, "param_groups": []}
    return {
        "config": {"model": "xtts"},
        "model": model,
        "optimizer": optimizer,
        "step": step,
        "epoch": step // 3000,
        "model_loss": losses,
    }


def language_model(folder: Path, seed: int, shards: int = 1) -> None:
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": draw(seed, 30, 8), "lm_head.weight": draw(seed + 1, 30, 8)}
    tensors |= {f"model.layers.{n}.mlp.up_proj.weight": draw(seed + 2 + n, 16, 8) for n in range(4)}
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "tie_word_embeddings": False}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with small versions of all files that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    torch.save(voice(1, 12000, 2.31), folder / "news.pth")
    torch.save(voice(20, 15500, 2.17), folder / "audiobook.pth")
    torch.save(voice(40, 9000, 2.4), folder / "best_model.pth")
    torch.save(voice(1, 1, 1.0)["model"], folder / "pytorch_model.bin")
    save_file({"w": draw(5, 3, 4), "b": draw(6, 4)}, folder / "model.safetensors", {"format": "pt"})
    for number, name in enumerate(("chat", "code", "base")):
        language_model(folder / name, 100 * number)
    language_model(folder / "big", 7, shards=2)
    (folder / "lora").mkdir()
    module = "model.layers.1.mlp.up_proj"
    factors = {
        f"base_model.model.{module}.lora_A.weight": draw(8, 2, 8),
        f"base_model.model.{module}.lora_B.weight": draw(9, 16, 2),
    }
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    mangled = f"lora_unet_{module.replace('.', '_')}"
    style = {f"{mangled}.lora_down.weight": draw(8, 2, 8), f"{mangled}.lora_up.weight": draw(9, 16, 2)}
    save_file(style, folder / "style.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in style.items()}, folder / "face.safetensors")
    loha = {f"hada_w{n}_{side}": draw(n, *((16, 2) if side == "a" else (2, 8))) for n in (1, 2) for side in "ab"}
    save_file({f"{mangled}.{part}": tensor for part, tensor in loha.items()}, folder / "loha.safetensors")
    (folder / "run").mkdir()
    for step in range(1000, 9000, 1000):
        torch.save(voice(step, step, 3 - step / 5000), folder / "run" / f"checkpoint-{step}.pt")
    for step in range(100, 700, 100):
        tensors = {f"model.{name}": tensor for name, tensor in voice(step, 1, 1.0)["model"].items()}
        dcp_maker.write(folder / "fsdp" / f"step-{step}", tensors, dcp_maker.sharded(0, 2), ranks=2)
    (folder / "mergekit-config.yml").write_text(
        "merge_method: tie\nbase_model: base/\nmodels:\n  - model: chat/\n    parameters: {weigth: 0.5}\n"
        "  - model: code/\n    parameters: {weight: 0.5}\nchat_template: chatmll\n"
    )
    return folder


@pytest.fixture(scope="session")
def bare() -> Path:
    """Makes the environment that shows the declared dependencies only, once for all test processes."""
    command, environment = [ROOT / "scripts/bare-environment"], os.environ | {"PYTHON": sys.executable}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


def run(line: str, world: Path, bare: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line of shell in this folder."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-c", line]
    return subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=300)


def alike(text: str) -> str:
    """Removes text that differs between runs and models: numbers, their units, digests."""
    text = re.sub(r"[0-9a-f]{64}", "#", text)
    return re.sub(r"\d[\d.,]*\d|\d", "#", re.sub(r"(?<=\d) (bytes|[kMGT]i?B)", " B", text))


def test_everything_runs_in_its_order(world: Path, bare: Path) -> None:
    """A reader types all commands, sessions and programs in one folder, one after the other, and saves the files shown."""
    for kind, text in BLOCKS:
        named = re.match(r"# (\S+\.(?:py|yaml))\b.*\n", text)
        if kind in ("python", "yaml") and named:
            (world / named[1]).write_text(text)
        elif kind == "bash":
            for line in filter(str.strip, text.splitlines()):
                if not line.startswith("scripts/"):
                    done = run(line, world, bare)
                    assert done.returncode == 0, f"{line}\n{done.stderr}"
        elif kind == "console":
            _check_session(text, world, bare)
        elif kind == "python":
            _check_program(text, world, bare)
    assert (world / "big.safetensors").stat().st_size > 4000 * 4096 * 4


def _check_session(session: str, world: Path, bare: Path) -> None:
    first, _, shown = session.partition("\n")
    done = run(first.removeprefix("$ "), world, bare)
    if "^C" in session:  # not interrupted here; running/test_session.py tests that
        assert done.returncode == 0, done.stderr
        return
    for line, said in zip(shown.splitlines(), (done.stderr + done.stdout).splitlines(), strict=True):
        begin = line.removesuffix("...").rstrip()
        assert alike(said).startswith(alike(begin)) if line.endswith("...") else alike(said) == alike(line)


def _check_program(program: str, world: Path, bare: Path) -> None:
    rows = "import torch\nmake_rows = lambda start, stop: torch.zeros(stop - start, 4096)\n"
    (world / "program.py").write_text(rows + program)
    done = run("python program.py", world, bare)
    assert done.returncode == 0, done.stderr


def test_they_run_with_nothing_but_the_declared_dependencies(world: Path, bare: Path) -> None:
    code = (
        "import importlib.metadata as m, json, streammerge as s, sys; "
        "names = [each.name for each in m.distributions()]; "
        "print(json.dumps([s.__file__, sys.prefix, names, m.requires('streammerge')]))"
    )
    where, prefix, names, required = json.loads(run(f'python -c "{code}"', world, bare).stdout)
    assert Path(prefix) == bare
    assert where.startswith(f"{bare}/lib/"), "installed, not read from the sources"
    installed = {name.lower().replace("_", "-") for name in names}
    asked = [(re.split("[^a-z0-9-]", each.lower(), maxsplit=1)[0], "extra ==" in each) for each in required]
    declared = {name for name, extra in asked if not extra}
    others = {name for name, extra in asked if extra} - declared
    assert {"torch", "numpy", "safetensors"} <= declared <= installed
    assert {"pytest", "coqui-tts-trainer"} <= others
    assert not others & installed


def test_every_script_is_there_and_takes_what_is_said() -> None:
    scripts = [shlex.split(line, comments=True) for line in COMMANDS if line.startswith("scripts/")]
    assert {words[0] for words in scripts} == {"scripts/demo", "scripts/test", "scripts/bench", "scripts/peers"}
    assert all(os.access(ROOT / words[0], os.X_OK) for words in scripts)
    for words in scripts:
        for case in (word for word in words[1:] if words[0] == "scripts/bench" and not word.startswith("--")):
            assert case == "site" or any(case in each.name for each in CASES), case
    for row in re.findall(r"`(tests/\w+\.py) ([\w-]+)", README):
        assert row[1] == "TARGET" or row[1] in (ROOT / row[0]).read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)|scripts/test (tests/\S+)`", README):
        assert (ROOT / "".join(path)).exists(), path


def test_every_option_that_is_named_exists() -> None:
    context = click.Context(command_line)
    commands = [command_line.get_command(context, name) for name in command_line.list_commands(context)]
    known = {name for command in commands if command for each in command.params for name in each.opts}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"`(--[\w-]+)", prose))
    assert named > {"--memory", "--polite", "--on-missing"}
    assert named <= known


@pytest.mark.slow
def test_the_demo_and_the_installation_run_in_a_clean_copy(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "copy")], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    options = {"cwd": tmp_path / "copy", "env": environment, "capture_output": True, "text": True, "timeout": 1500}
    done = subprocess.run(["scripts/demo"], **options)
    assert done.returncode == 0, done.stderr
    assert "equals the float64 mean rounded once: True" in done.stdout
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "own")], check=True)
    pip = [str(tmp_path / "own/bin/pip"), "install", "--quiet", "-c", "constraints.txt", "."]
    assert subprocess.run(pip, **options).returncode == 0
    torch.save(voice(1, 1, 1.0), tmp_path / "copy/news.pth")
    merge = [str(tmp_path / "own/bin/streammerge"), "merge", "news.pth", "news.pth", "-o", "voice.pth"]
    assert subprocess.run(merge, **options).returncode == 0
