"""What each method asks for, without importing torch: plans are made from this."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.errors import RecipeError


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A method's contract. ``function`` is where its code is, as ``module:name`` below ``streammerge.methods``.

    ``compute`` is the dtype it computes in unless the recipe says otherwise; float64 inputs always raise it to float64.
    """

    name: str
    function: str
    summary: str
    per_model: tuple[str, ...] = ()
    least_models: int = 1
    compute: str = "float32"


METHODS = {
    method.name: method
    for method in (
        MergeMethod(
            "linear",
            "linear:linear",
            "weighted mean of the models",
            per_model=("weight",),
            # A running sum costs no more in float64, and is then the exact mean rounded once.
            compute="float64",
        ),
    )
}


def find_method(name: str) -> MergeMethod:
    """The method of that name; RecipeError with the nearest one otherwise."""
    if name in METHODS:
        return METHODS[name]
    import difflib

    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(sorted(METHODS))}"
    raise RecipeError(f"unknown merge method {name!r}; {hint}")
