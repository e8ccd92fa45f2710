"""Options of the commands, made from the classes of ``streammerge.options``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_options_come_from_the_environment_too(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    environment = os.environ | {"STREAMMERGE_PLAN_MEMORY": "64MiB"}
    command = [sys.executable, "-m", "streammerge", "plan", *map(str, voices)]
    assert "of 64.0 MiB" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
