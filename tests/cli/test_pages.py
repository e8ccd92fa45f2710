"""Pages of methods. That no markup is left in them: methods/suite.py."""

from __future__ import annotations

import json

import pytest

from streammerge.cli.pages import method_json, method_page, methods_table
from streammerge.methods.registry import find_method, list_methods


def test_the_table_has_a_line_for_each_method() -> None:
    head, *lines = methods_table(list(list_methods().values())).split("\n\n")[0].splitlines()
    assert head.split() == ["method", "models", "base"]
    assert [line.split()[0] for line in lines] == list(list_methods())
    columns = {line.index(line.split()[1]) for line in (head, *lines)}
    assert len(columns) == 1, "the columns stand below each other"
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert said["slerp"].startswith("2 a model")
    assert said["ties"].startswith("any required")


@pytest.mark.parametrize("name", sorted(list_methods()))
def test_a_page_names_every_parameter_and_fits(name: str) -> None:
    contract = find_method(name)
    for width in (40, 100):
        page = method_page(contract, width)
        head, _, *rest = page.splitlines()
        assert head.startswith(f"{name}: ")
        for parameter in contract.parameters.values():
            (line,) = [each for each in rest if each.startswith(f"  {parameter.name} ")]
            assert ("required" in line) == parameter.required
        prose = page.split("\n\n", 2)[2]
        assert all(len(line) <= width or line.startswith("    ") or " " not in line for line in prose.splitlines())


@pytest.mark.parametrize("name", sorted(list_methods()))
def test_as_json_a_method_is_its_contract(name: str) -> None:
    contract, said = find_method(name), json.loads(json.dumps(method_json(find_method(name))))
    assert (said["name"], tuple(said["models"]), said["base"]) == (name, contract.models, contract.base)
    assert set(said["parameters"]) == set(contract.parameters)
    for parameter in said["parameters"].values():
        assert ("default" in parameter) != parameter["required"]
