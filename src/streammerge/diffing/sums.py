"""Sums over pairs of numbers, and the measures that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Sums:
    """Counts and float64 sums over elements of A, B and, if there is one, their base C.

    Sums are over the elements that are finite everywhere. ``nonfinite`` counts the others. ``differing``: elements whose
    values differ. ``largest``: the largest ``|b - a|``. ``aa``, ``bb``, ``ab``, ``dd``: of ``a a``, ``b b``, ``a b`` and
    ``(b - a)(b - a)``. With a base: ``cc`` of ``c c``; ``da``, ``db`` and ``dadb`` of the products of ``a - c`` and
    ``b - c``; ``changed`` counts the elements that both have changed, and ``agreeing`` those with equal signs. ``top_a``
    and ``top_b`` count the elements that are among the largest tenth of a change and not zero; ``top_both`` those in
    both.
    """

    elems: int = 0
    differing: int = 0
    nonfinite: int = 0
    largest: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    cc: float = 0.0
    da: float = 0.0
    db: float = 0.0
    dadb: float = 0.0
    changed: int = 0
    agreeing: int = 0
    top_a: int = 0
    top_b: int = 0
    top_both: int = 0

    def add(self, more: Sums) -> None:
        """Adds the sums over other elements."""
        self.elems += more.elems
        self.differing += more.differing
        self.nonfinite += more.nonfinite
        self.largest = max(self.largest, more.largest)
        self.aa += more.aa
        self.bb += more.bb
        self.ab += more.ab
        self.dd += more.dd
        self.cc += more.cc
        self.da += more.da
        self.db += more.db
        self.dadb += more.dadb
        self.changed += more.changed
        self.agreeing += more.agreeing
        self.top_a += more.top_a
        self.top_b += more.top_b
        self.top_both += more.top_both


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two changes of a common base agree. None stands for what cannot be said, because a change is zero.

    ``relative_a`` and ``relative_b``: the norm of ``A - C`` and of ``B - C``, relative to that of C. ``cosine``: of both
    changes. ``equal_signs``: the share of equal signs among the elements that both have changed. ``overlap``: how much of
    the largest tenth of a change, by magnitude, is also in the largest tenth of the other one. A tensor of n elements has
    ``max(n // 10, 1)`` largest ones; zeros do not count, and the share is that of the change that has fewer.
    """

    relative_a: float | None
    relative_b: float | None
    cosine: float | None
    equal_signs: float | None
    overlap: float | None


class Measured:
    """The measures of anything with ``sums``."""

    __slots__ = ()
    sums: Sums

    @property
    def elems(self) -> int:
        """Number of elements that were compared."""
        return self.sums.elems

    @property
    def relative(self) -> float | None:
        """The norm of ``B - A``, divided by the norm of A. Infinite if A is zero and B is not. None if the elements that
        differ have no finite difference, such as packed values."""
        sums = self.sums
        return None if sums.differing and not sums.dd else relative(sums.dd, sums.aa)

    @property
    def cosine(self) -> float | None:
        """The cosine between A and B. None if one of them is zero."""
        return cosine(self.sums.ab, self.sums.aa, self.sums.bb)

    @property
    def largest(self) -> float:
        """The largest ``|b - a|`` of two finite elements."""
        return self.sums.largest

    @property
    def share(self) -> float:
        """The share of elements that differ."""
        return self.sums.differing / self.sums.elems if self.sums.elems else 0.0

    @property
    def nonfinite(self) -> int:
        """Number of elements that are NaN or infinite in A, B or the base. Only their equality counts."""
        return self.sums.nonfinite

    def agreement_of(self) -> Agreement:
        """Returns how the changes of a base agree."""
        s = self.sums
        fewer = min(s.top_a, s.top_b)
        return Agreement(
            relative(s.da, s.cc),
            relative(s.db, s.cc),
            cosine(s.dadb, s.da, s.db),
            s.agreeing / s.changed if s.changed else None,
            s.top_both / fewer if fewer else None,
        )


def relative(square: float, of: float) -> float | None:
    """Returns the ratio of two norms, given their squares. None if a sum of squares is too large for float64."""
    if not (math.isfinite(square) and math.isfinite(of)):
        return None
    if not of:
        return math.inf if square else 0.0
    return math.sqrt(square) / math.sqrt(of)


def cosine(product: float, one: float, two: float) -> float | None:
    """Returns a cosine from -1 to 1, given the inner product and both squared norms. None if it has no value."""
    length = math.sqrt(one) * math.sqrt(two) if math.isfinite(one) and math.isfinite(two) else 0.0
    return max(-1.0, min(product / length, 1.0)) if length and math.isfinite(product) else None
