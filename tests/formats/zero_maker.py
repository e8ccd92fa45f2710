"""Checkpoints in the layout of DeepSpeed 0.19, without DeepSpeed: partitions, paddings, frozen and shared parameters.

The layouts were compared with those that DeepSpeed itself writes.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


class ZeroStageEnum(enum.IntEnum):
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class Model:
    """``trained``: the float32 parameters of each group of the optimizer. ``frozen`` and ``buffers``: in any dtype.
    ``tied``: alias -> name. ``half``: the dtype of the computation."""

    trained: list[Tensors]
    frozen: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    half: torch.dtype = torch.bfloat16

    @property
    def expected(self) -> Tensors:
        """The tensors that zero_to_fp32 makes, and the frozen ones of stage 1."""
        named = {name: tensor for group in self.trained for name, tensor in group.items()}
        floats = {n: t.float() if t.is_floating_point() else t for n, t in self.buffers.items()}
        return floats | self.frozen | named | {alias: named[name] for alias, name in self.tied.items()}


def model(seed: int = 1, half: torch.dtype = torch.bfloat16) -> Model:
    make = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    return Model(
        [
            {"emb.weight": drawn(11, 5), "fc1.weight": drawn(7, 5), "scale": drawn(), "fc2.weight": drawn(5, 7)},
            {"fc1.bias": drawn(7), "one": drawn(1), "fc2.bias": drawn(5)},
        ],
        {"frozen.weight": drawn(3, 7).to(half), "frozen.bias": drawn(3).to(half)},
        {"table": drawn(4).to(half), "steps": torch.tensor(7)},
        {"head.weight": "emb.weight"},
        half,
    )


def _model_states(model: Model, stage: int, ranks: int, rank: int) -> dict[str, Any]:
    module: OrderedDict[str, torch.Tensor] = OrderedDict(model.buffers)
    whole = {name: tensor for group in model.trained for name, tensor in group.items()}
    for name, tensor in (*whole.items(), *model.frozen.items()):
        module[name] = torch.empty(0, dtype=model.half) if stage == 3 else tensor.to(model.half)
    for alias, name in model.tied.items():
        module[alias] = module[name]
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in model.trained]
    fragments = None
    if stage == 2:
        fragments = OrderedDict(model.frozen)
    elif stage == 3:
        fragments = OrderedDict((name, _part(tensor, ranks, rank)) for name, tensor in model.frozen.items())
    return {
        "module": module,
        "buffer_names": list(model.buffers),
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in model.frozen.items()),
        "shared_params": dict(model.tied),
        "frozen_param_fragments": fragments,
        "global_steps": 12,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }


def _part(tensor: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Returns a rank's part of a parameter at stage 3: as long as the others', padded."""
    length = math.ceil(tensor.numel() / ranks)
    padded = torch.full((length * ranks,), 99.0, dtype=tensor.dtype)
    padded[: tensor.numel()] = tensor.flatten()
    return padded[rank * length : (rank + 1) * length].clone()


def _groups_of_stage2(model: Model, ranks: int, paddings: list[list[int]] | None) -> list[list[torch.Tensor]]:
    """Returns the parts of each group by rank: the group as one flat tensor, padded to a multiple of 2 * ranks."""
    made = []
    for number, group in enumerate(model.trained):
        flat = []
        for place, tensor in enumerate(group.values()):
            flat += [tensor.flatten(), torch.full((paddings[number][place] if paddings else 0,), 98.0)]
        whole = torch.cat(flat)
        whole = torch.cat([whole, torch.full((-whole.numel() % (2 * ranks),), 97.0)])
        made.append([part.clone() for part in whole.chunk(ranks)])
    return made


def write(
    folder: Path,
    model: Model,
    stage: int,
    ranks: int = 3,
    bf16: bool = False,
    sub_groups: int = 1 << 60,
    paddings: list[list[int]] | None = None,
) -> Path:
    """Writes the folder of a run, with ``latest`` and one step."""
    step = folder / "global_step12"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step12")
    for rank in range(ranks if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(_model_states(model, stage, ranks, rank), step / name)
    groups = None if stage == 3 else _groups_of_stage2(model, ranks, paddings)
    for rank in range(ranks):
        state: dict[str, Any] = {"zero_stage": ZeroStageEnum(stage), "partition_count": ranks}
        if groups is not None:
            state |= {
                "single_partition_of_fp32_groups": [parts[rank] for parts in groups],
                "partition_count": [ranks] * len(groups),
                "base_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(5)}}},
            }
            if paddings:
                state["param_alignment_paddings"] = paddings
            if stage == 1 and bf16:
                del state["zero_stage"]
        else:
            parts = [_part(tensor, ranks, rank) for group in model.trained for tensor in group.values()]
            state["fp32_flat_groups"] = _sub_groups(parts, sub_groups)
        prefix = "bf16_zero" if bf16 else "zero"
        torch.save({"optimizer_state_dict": state}, step / f"{prefix}_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def _sub_groups(parts: list[torch.Tensor], most: int) -> list[torch.Tensor]:
    made: list[list[torch.Tensor]] = [[]]
    for part in parts:
        if made[-1] and sum(p.numel() for p in made[-1]) + part.numel() > most:
            made.append([])
        made[-1].append(part)
    return [torch.cat(group) for group in made]


def write_universal(folder: Path, model: Model, bare: bool, ranks: int = 3) -> Path:
    """Writes a universal checkpoint. ``bare``: as it is made from stage 3, without shapes in the files."""
    stage = 3 if bare else 2
    for group in model.trained:
        for name, tensor in group.items():
            (folder / "zero" / name).mkdir(parents=True)
            torch.save(tensor.flatten() if bare else {"param": tensor, "cat_dim": 0}, folder / "zero" / name / "fp32.pt")
            torch.save(tensor.flatten(), folder / "zero" / name / "exp_avg.pt")
    for rank in range(ranks if bare else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if bare else "mp_rank_00_model_states.pt"
        torch.save(_model_states(model, stage, ranks, rank), folder / name)
    return folder
