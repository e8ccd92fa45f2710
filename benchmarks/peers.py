"""Other tools with the same task, each at its default and at its lowest-memory settings. scripts/peers installs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Case

_ROOT = Path(__file__).parent.parent
_TOOLS = Path(__file__).parent / "tools"
_MERGEKIT = _ROOT / ".peers/mergekit/bin/mergekit-pytorch"
_SD_MECHA = _ROOT / ".peers/sd-mecha/bin/python"
_SPARSE = ("ties", "dare_linear", "dare_ties", "della", "breadcrumbs")
_BASED = (*_SPARSE, "task_arithmetic", "model_stock", "sce", "arcee_fusion")


@dataclass(frozen=True, slots=True)
class Peer:
    """``command(case, inputs, folder)`` makes a case's output in an empty folder; ``methods``: the methods to measure."""

    name: str
    installed: Path
    command: Callable[[Case, Sequence[Path], Path], list[str]]
    methods: tuple[str, ...]


def _mergekit(*options: str) -> Callable[[Case, Sequence[Path], Path], list[str]]:
    def command(case: Case, inputs: Sequence[Path], folder: Path) -> list[str]:
        weights = (0.5, 0.3, 0.2) if case.peers == "linear" and len(inputs) == 3 else (1.0,) * len(inputs)
        models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(inputs, weights, strict=True)]
        recipe: dict[str, object] = {"merge_method": case.peers, "models": models, "dtype": "bfloat16"}
        if case.peers in _BASED:
            recipe |= {"base_model": str(inputs[0]), "models": models[1:]}
        if case.peers in _SPARSE:
            recipe["parameters"] = {"density": 0.5}
        if case.peers == "sce":
            recipe["parameters"] = {"select_topk": 0.5}
        if case.peers == "slerp":
            recipe |= {"base_model": str(inputs[0]), "parameters": {"t": 0.4}}
        configuration = folder / "recipe.yml"
        configuration.write_text(json.dumps(recipe))  # JSON is YAML
        return [str(_MERGEKIT), str(configuration), str(folder / "out"), *options]

    return command


def _sd_mecha(buffer_bytes: int) -> Callable[[Case, Sequence[Path], Path], list[str]]:
    def command(case: Case, inputs: Sequence[Path], folder: Path) -> list[str]:
        script = str(_TOOLS / "sd_mecha_merge.py")
        return [str(_SD_MECHA), script, str(folder / "out.safetensors"), str(buffer_bytes), *map(str, inputs)]

    return command


def _whole_file(case: Case, inputs: Sequence[Path], folder: Path) -> list[str]:
    return [sys.executable, str(_TOOLS / "whole_file.py"), str(folder / "out.safetensors"), *map(str, inputs)]


_ALL = ("linear", "slerp", "nuslerp", "karcher", *_BASED)
PEERS = (
    Peer("mergekit 0.1.5", _MERGEKIT, _mergekit(), _ALL),
    Peer("mergekit, 200 MB shards", _MERGEKIT, _mergekit("--lazy-unpickle", "--out-shard-size", "200M"), ("linear",)),
    Peer("sd-mecha 1.1.8", _SD_MECHA, _sd_mecha(512 << 20), ("linear",)),
    Peer("sd-mecha, 16 MiB buffer", _SD_MECHA, _sd_mecha(16 << 20), ("linear",)),
    Peer("whole-file script", Path(sys.executable), _whole_file, ("linear",)),
)
