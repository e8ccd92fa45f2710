"""Weights of a run's checkpoints, the oldest first, that stand in for a decay of the learning rate.

Warmup-Stable and Merge (2507.17634): the mean of checkpoints with weights c_0..c_(n-1) equals a run whose steps between
checkpoint i - 1 and i are multiplied by w_i = c_i + ... + c_(n-1). So a decay that falls from w(0) = 1 gives
c_i = w(i / n) - w((i + 1) / n), where the last weight is w((n - 1) / n) and the first is what is missing to 1. ``linear``,
``minus-sqrt`` and ``cosine`` are named by the decay, not by the form of the weights. ``wma`` and ``ema`` are the weighted
and the exponential moving averages of Pre-trained Model Averaging (2505.12082).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from streammerge.errors import RecipeError, listed, printable

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
"""The share of the learning rate that is left at a part x of the decay, for x from 0 to 1."""


def schedule_weights(schedule: str, count: int) -> list[float]:
    """Returns the weights of ``count`` checkpoints, the oldest first. They sum to 1.

    ``linear`` (equal weights), ``minus-sqrt``, ``cosine``, ``wma`` (weights in the proportion 1, 2, ..., n) or ``ema:D``
    with a decay D (:func:`exponential_weights`). Raises RecipeError for other names.
    """
    name, colon, number = schedule.partition(":")
    if name in DECAYS and not colon:
        return _decay_weights(DECAYS[name], count)
    if name == "wma" and not colon:
        return [(place + 1) * 2 / (count * (count + 1)) for place in range(count)]
    if name == "ema":
        try:
            decay = float(number)
        except ValueError:
            raise RecipeError(f"`schedule` ema needs its decay, like ema:0.99, not {printable(schedule)}") from None
        return exponential_weights(decay, count)
    known = [*DECAYS, "wma", "ema:0.99"]
    raise RecipeError(f"`schedule` takes {listed(known)}, not {printable(schedule)}")


def exponential_weights(decay: float, count: int) -> list[float]:
    """Returns the weights of the average that starts as the oldest of ``count`` checkpoints. Each later one changes it to
    decay x average + (1 - decay) x checkpoint. They sum to 1."""
    if not 0 <= decay < 1:
        raise RecipeError(f"the decay of an exponential moving average is a number from 0 to below 1, not {decay:g}")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - place) for place in range(1, count)]


def _decay_weights(decay: Callable[[float], float], count: int) -> list[float]:
    left = [decay(place / count) for place in range(1, count)] + [0.0]
    later = [here - after for here, after in pairwise(left)]
    return [1 - sum(later), *later]
