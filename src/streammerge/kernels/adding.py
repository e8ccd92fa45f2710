"""Multiples and quotients in less time, with the bits of a product that is rounded and then added, and of a division.

torch adds a multiple by ``add_(alpha=...)`` or a product by ``addcmul_``, and fuses either on some machines: the product is
then not rounded, and the sum has other last bits than elsewhere. But ``addcmul_`` multiplies from the left, first by its
``value``. With the factor as the value and 1 as the last operand, what can be fused is a product with 1, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CHECKED = 1003
"""Numbers that are added to see how torch does it: whole vectors of them, and a rest."""

_MOST_EXPONENT = 100
"""Powers of two up to this one, and their reciprocals, are normal numbers of float32 and float64."""


def add_scaled(total: torch.Tensor, values: torch.Tensor, factor: float) -> torch.Tensor:
    """Adds the rounded products of the values and a factor to the total, in place. The values may be changed."""
    if factor == 1:
        return total.add_(values)
    if _in_one(total.dtype, factor):
        return total.addcmul_(values, _one(total.dtype), value=factor)
    return total.add_(values.mul_(factor))


class Multiples:
    """Adds the rounded products of the same values and each of several factors to several totals, in one call."""

    def __init__(self, factors: Sequence[float], dtype: torch.dtype) -> None:
        self._factors = list(factors)
        self._ones = [_one(dtype)] * len(self._factors)
        self._in_one = all(_in_one(dtype, factor) for factor in self._factors)

    def add_to(self, totals: list[torch.Tensor], values: torch.Tensor) -> None:
        """Adds in place. ``totals``: as many as the factors. The values stay as they are."""
        import torch

        if self._in_one:
            torch._foreach_addcmul_(totals, [values] * len(self._ones), self._ones, self._factors)
            return
        for total, factor in zip(totals, self._factors, strict=True):
            total.add_(values * factor)


def exact_reciprocal(divisor: float) -> float | None:
    """Returns a factor that makes the same numbers as a division, None if there is none. A division takes three times as
    long. Powers of two have one: product and quotient are then the same number before it is rounded."""
    fraction, exponent = math.frexp(divisor)
    return 1 / divisor if abs(fraction) == 0.5 and abs(exponent) <= _MOST_EXPONENT else None


def _in_one(dtype: torch.dtype, factor: float) -> bool:
    """Whether one operation adds such a product. A factor that is NaN would hand on its bits in place of the value's."""
    import torch

    return math.isfinite(factor) and abs(factor) <= torch.finfo(dtype).max and rounds_products(dtype)


@cache
def _one(dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.ones((), dtype=dtype)


@cache
def rounds_products(dtype: torch.dtype) -> bool:
    """Whether torch does here what this module expects of it. Adds numbers in both ways, and compares their bits: some of
    one size, where a fused sum would be another one, and some of any size, with subnormal ones, infinities and NaN."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    bits = torch.int64 if dtype == torch.float64 else torch.int32

    def numbers() -> torch.Tensor:
        similar = torch.randn(_CHECKED, generator=drawn, dtype=dtype)
        words = torch.randint(-(2**31), 2**31, (_CHECKED * dtype.itemsize // 4,), generator=drawn).to(torch.int32)
        special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype).repeat(_CHECKED // 15)
        made = torch.cat([similar, words.view(dtype), special])
        return made[torch.randperm(len(made), generator=drawn)]

    for factor in (1 / 3, -0.7, 1e30, 1e-30, 0.0):
        total, values = numbers(), numbers()
        wanted = total.clone().add_(values * factor)
        made = total.addcmul_(values, _one(dtype), value=factor)
        if not torch.equal(made.view(bits), wanted.view(bits)):
            return False
    return True
