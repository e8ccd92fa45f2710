"""Refusal of checkpoints that several ranks wrote in parts, with the command that makes one checkpoint of them."""

from __future__ import annotations

from streammerge.errors import FormatError, printable
from streammerge.stores.base import Location

_TO_TORCH = "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth`"
_PART = ".distcp"


def refuse_distributed(folder: Location) -> None:
    """Raises FormatError if a folder, or a folder in it, holds a distributed checkpoint."""
    where, children = printable(folder), folder.children()
    names = [path.name for path in children]
    if _is_distributed(names):
        raise FormatError(
            f"{where} is a torch.distributed.checkpoint folder, which is not read yet; run "
            f"{_TO_TORCH.format(folder=where)} and give the result"
        )
    inner = [(path, [each.name for each in path.children()]) for path in children if path.is_folder()]
    parts = [path for path, of in inner if _is_distributed(of)]
    parts.sort(key=lambda path: (path.name.startswith("optim"), path.name))  # FSDP writes the optimizer's state too
    if parts:
        weights = printable(parts[0])
        raise FormatError(
            f"{where} holds its weights in {weights}, a torch.distributed.checkpoint folder (FSDP), which is not read yet; "
            f"run `accelerate merge-weights {weights} OUTPUT` or {_TO_TORCH.format(folder=weights)} and give the result"
        )
    of_steps = [name for path, of in inner if path.name.startswith("global_step") for name in of]
    here = any(name.endswith("_model_states.pt") or "zero_pp_rank_" in name for name in names)
    if here or any(name.endswith("_states.pt") for name in of_steps):
        raise FormatError(
            f"{where} is a DeepSpeed checkpoint, which is not read yet; run the `zero_to_fp32.py` that DeepSpeed puts "
            "into it (`python zero_to_fp32.py . OUTPUT`) and give the result"
        )


def refuse_part(path: Location) -> None:
    """Raises FormatError for a file that is one rank's part of a distributed checkpoint."""
    if path.name.endswith(_PART):
        folder = printable(path.parent)
        raise FormatError(
            f"{printable(path)} is one rank's part of the distributed checkpoint in {folder}; run "
            f"{_TO_TORCH.format(folder=folder)} and give the result"
        )


def _is_distributed(names: list[str]) -> bool:
    return ".metadata" in names and any(name.endswith(_PART) for name in names)
