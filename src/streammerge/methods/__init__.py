"""The merge methods, one file per family.

Each module imports only modules above it. A family that no other module uses is not listed::

    contracts        requirements of a method; the decorator
    linear           weighted means, and the weighted sum that other families end in
    inner_products   weighted sums by inner products, of many small tensors at once
    exact            copies, and integers by policy
    factors          what adapters alone are merged by
    spherical        weighted sums whose weights follow from the models' inner products
    sparsify         selection of the elements of a delta; no method of its own
    task_arithmetic  sums of deltas: the TIES family
    spectral         merges by singular values
    registry         lookup of a method by name, or of a function
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A room that is a function too: ``streammerge.methods()`` answers as ``streammerge methods`` does."""

    def __call__(self, name: str | None = None) -> Any:
        from streammerge.methods.registry import methods

        return methods() if name is None else methods(name)


sys.modules[__name__].__class__ = _Callable
