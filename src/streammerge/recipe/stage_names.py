"""A stage of a recipe as one of its models, as text: ``<stage NAME>``, which no path is mistaken for."""

from __future__ import annotations

import re

_STAGE = r"<stage ([^<>]+)>"
STAGE_NAME = r"[^<>+/\\\0\n]+"
"""What a stage may be called. A plus sign stands between a model and its adapters."""


def stage_text(name: str) -> str:
    """Returns the text by which a recipe names a stage as a model, once its names are told from paths."""
    return f"<stage {name}>"


def stage_of(text: str) -> str | None:
    """Returns the name of the stage that a model is; None for any other model."""
    found = re.fullmatch(_STAGE, text)
    return found[1] if found else None
