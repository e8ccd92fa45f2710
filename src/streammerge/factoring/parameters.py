"""The parameters of a method for each tensor of a merge of adapters: filters and gradients, as those of models.

A gradient runs over the layers that the adapters have, since nothing else is known of the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.planning.parameters import filled
from streammerge.recipe.model import Recipe
from streammerge.recipe.settings import Chain, Setting, is_same_for_all
from streammerge.tensors.layers import depths, layer_of, position


class Parameters:
    """What a recipe says about the parameters of its method. ``tensors``: the tensors of the base that adapters change.

    ``fixed``: whether all tensors have the same. Raises RecipeError for a filter or a gradient of what is no parameter.
    """

    def __init__(self, recipe: Recipe, tensors: Iterable[str]) -> None:
        self._depths = depths(tensors)
        known = recipe.merge_method.parameters
        self._others = {name: _constant(name, said) for name, said in recipe.parameters.items() if name not in known}
        self._chains = []
        for parameter in known.values():
            owners = [each.parameters for each in recipe.models] if parameter.per_model else [{}]
            chains = [Chain(parameter, (own, recipe.parameters)) for own in owners]
            self._chains.append((parameter, chains))
        self.fixed = all(chain.fixed for _, chains in self._chains for chain in chains)

    def of(self, tensor: str) -> dict[str, Any]:
        """Returns the given parameters for a tensor, those of each model as a list. Raises RecipeError for invalid ones."""
        t, given = self._position(tensor), dict(self._others)
        for parameter, chains in self._chains:
            try:
                found = [chain.at(tensor, t) for chain in chains]
            except RecipeError as error:  # both ends of a gradient are valid, but the value between them is not
                raise RecipeError(f"{printable(tensor)}: {error}") from error
            value = filled(parameter, found) if parameter.per_model else found[0]
            if value is not None:
                given[parameter.name] = list(value) if parameter.per_model else value
        return given

    def _position(self, tensor: str) -> float:
        layer = layer_of(tensor)
        return 0.0 if layer is None else position(layer.number, self._depths[layer.stack])


def _constant(name: str, setting: Setting) -> Any:
    if not is_same_for_all(setting):
        raise RecipeError(f"{printable(name)} is the same for all layers of an adapter; give one value, without a filter")
    return setting[0].value
