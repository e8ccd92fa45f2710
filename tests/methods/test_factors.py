"""Methods for adapters alone are found by name, and refuse models."""

from __future__ import annotations

import pickle

import pytest
import torch

import streammerge as sm
from streammerge.methods.factors import FACTORS
from streammerge.methods.registry import find_method, list_methods, merge_tensors


def test_they_are_found_but_not_listed() -> None:
    for name, method in FACTORS.items():
        assert find_method(name) is method
        assert pickle.loads(pickle.dumps(method)) == method
        assert name not in list_methods()


def test_models_are_refused() -> None:
    for name in ("cat", "svd"):
        with pytest.raises(sm.RecipeError, match=f"{name} makes an adapter of adapters alone"):
            merge_tensors(name, torch.zeros(2), torch.zeros(2))
    with pytest.raises(sm.RecipeError, match="extract makes an adapter of one model and its base"):
        merge_tensors("extract", torch.zeros(2), base=torch.zeros(2))
