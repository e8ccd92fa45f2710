"""numpy is told to sort without AVX-512 on the processors where that is slower, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from streammerge.sweeps.scoring import scorer
from streammerge.tensors import instructions

ZEN_4 = b"""processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
flags\t\t: fpu avx2 avx512f avx512vl
bugs\t\t:

processor\t: 1
vendor_id\t: AuthenticAMD
"""
OTHERS = {
    "Zen 3, which has no AVX-512": ZEN_4.replace(b" avx512f avx512vl", b""),
    "Zen 5": ZEN_4.replace(b": 25", b": 26"),
    "Intel": ZEN_4.replace(b"AuthenticAMD", b"GenuineIntel"),
    "cut off": ZEN_4[:60],
    "ARM": b"processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n",
    "nothing": b"",
}
NAME = "NPY_DISABLE_CPU_FEATURES"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(NAME, "")  # so that it is put back
    monkeypatch.delenv(NAME)
    with warnings.catch_warnings():
        yield


def on(processor: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "cpuinfo"
    file.write_bytes(processor)
    monkeypatch.setattr(instructions, "_PROCESSOR", str(file))


@pytest.mark.parametrize("processor", OTHERS.values(), ids=OTHERS)
def test_other_processors_keep_their_instructions(
    processor: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(processor, tmp_path, monkeypatch)
    instructions.choose_instructions()
    assert NAME not in os.environ


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_PROCESSOR", str(tmp_path / "nothing"))
    instructions.choose_instructions()
    assert NAME not in os.environ


def test_the_choice_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(ZEN_4, tmp_path, monkeypatch)
    monkeypatch.setenv(NAME, "")
    instructions.choose_instructions()
    assert os.environ[NAME] == ""


def test_programs_of_the_user_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(ZEN_4, tmp_path, monkeypatch)
    instructions.choose_instructions()
    assert scorer(f"echo {{}} ${{#{NAME}}}")("out") == 0  # the length of the variable
    monkeypatch.setenv(NAME, "AVX2")
    assert scorer(f"echo {{}} ${{#{NAME}}}")("out") == 4


def test_numpy_is_told_and_does_not_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where warnings are errors: numpy does not know one of the two names, whichever numpy it is."""
    on(ZEN_4, tmp_path, monkeypatch)
    instructions.choose_instructions()
    assert os.environ[NAME]
    code = (
        "from streammerge.tensors.instructions import choose_instructions; choose_instructions(); import numpy as np; "
        "from numpy._core._multiarray_umath import __cpu_features__ as there; "
        "print(there.get('X86_V4', False), there.get('AVX512_SKX', False) and 'X86_V4' not in there, "
        "np.sort([3, 1, 2]).tolist())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split(None, 2) == ["False", "False", "[1, 2, 3]\n"], done.stderr


def test_a_command_chooses_before_numpy_is_there(tmp_path: Path) -> None:
    processor = tmp_path / "cpuinfo"
    processor.write_bytes(ZEN_4)
    code = (
        "import sys, os; from streammerge.tensors import instructions; from streammerge.cli.main import main; "
        f"instructions._PROCESSOR = {str(processor)!r}; sys.argv = ['streammerge', 'methods', 'slerp']\n"
        f"try: main()\nexcept SystemExit: pass\nprint('numpy' in sys.modules, os.environ.get({NAME!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False X86_V4 AVX512_SKX"
