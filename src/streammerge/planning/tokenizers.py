"""Handles a recipe that says whose tokenizer the output has. It is accepted if all models have one vocabulary, and
refused otherwise."""

from __future__ import annotations

from streammerge.checkpoints.vocabularies import same_vocabulary, vocabulary_of
from streammerge.errors import RecipeError, printable
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe
from streammerge.stores.locations import resolved

_NO_MODEL = ("base", "union")
_WHAT_ELSE = "merge the tokenizers first, or leave this out and take the output's tokenizer as it is"


def asked_for(recipe: Recipe) -> str | None:
    """Returns whose tokenizer a recipe asks for."""
    return recipe.tokenizer_source or (recipe.tokenizer.source if recipe.tokenizer else None)


def differing_vocabularies(recipe: Recipe, indexes: Indexes) -> list[str]:
    """Returns a warning about each model whose tokenizer numbers its tokens in another way than the first model's."""
    folders = [index for index in indexes.values() if index.path.is_folder()]
    if len(folders) < 2 or asked_for(recipe):
        return []
    first, *others = folders
    ours, said = vocabulary_of(first.path), []
    for index in others if ours else ():
        if same_vocabulary(ours, vocabulary_of(index.path)) is False:
            said.append(
                f"the tokenizers of {printable(first.path)} and {printable(index.path)} give tokens other numbers, so rows "
                "of their embeddings that are merged belong to different tokens"
            )
    return said


def check_tokenizers(recipe: Recipe, indexes: Indexes) -> list[str]:
    """Returns a note about the tokenizer if the recipe asks for one.

    Raises RecipeError if the models have several vocabularies, since their embeddings would have to be put into another
    order, or if the tokenizer that is asked for is not the one that the output takes.
    """
    asked = asked_for(recipe)
    if not asked:
        return []
    key = "tokenizer_source" if recipe.tokenizer_source else "tokenizer"
    opened = list(indexes.values())
    first, ours = opened[0], vocabulary_of(opened[0].path)
    if ours is None:
        raise RecipeError(
            f"{recipe.at((key,))}{printable(first.path)}, whose files the output takes, has no tokenizer that can be read; "
            f"{_WHAT_ELSE}"
        )
    for index in opened[1:]:
        if not same_vocabulary(ours, vocabulary_of(index.path)):
            raise RecipeError(
                f"{recipe.at((key,))}{key} is supported only where all models have one vocabulary, and the tokenizers of "
                f"{printable(first.path)} and {printable(index.path)} differ, or one is absent; {_WHAT_ELSE}"
            )
    if asked not in _NO_MODEL and resolved(asked) != resolved(str(first.path)):
        raise RecipeError(
            f"{recipe.at((key,))}the output takes the tokenizer of {printable(first.path)}, which has the same vocabulary; "
            f"leave {key} out, and copy the files of {printable(asked)} if they differ in other things"
        )
    return [f"all models have one vocabulary, so the output has the tokenizer of {printable(first.path)} as it is"]
