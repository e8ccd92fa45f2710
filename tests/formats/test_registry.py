"""Formats by name."""

from __future__ import annotations

from types import ModuleType

from streammerge.formats.registry import FORMATS, name_of, others


def test_formats_of_this_package_are_its_modules() -> None:
    assert set(FORMATS.built_in) >= {"safetensors", "torch_legacy", "torch_tar", "torch_zip"}
    assert not set(FORMATS.built_in) & {"base", "registry", "folder"}


def test_every_format_is_asked_once_but_those_asked_before() -> None:
    found = [each for each in others(("safetensors", "torch_zip")) if isinstance(each, ModuleType)]
    assert {name_of(each) for each in found} == set(FORMATS.built_in) - {"safetensors", "torch_zip"}
    assert len(found) == len({*map(id, found)})
