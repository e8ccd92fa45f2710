"""Pictures as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from streammerge.reporting.facts import Grid, Sample
from streammerge.reporting.pictures import curves, heat_map

pytest.importorskip("matplotlib", reason="matplotlib, which draws the pictures, is not installed")


@pytest.mark.parametrize(("layers", "kinds"), [(1, 1), (3, 2), (80, 14)])
def test_a_heat_map_is_sound_and_has_the_colour_of_its_page(layers: int, kinds: int) -> None:
    values = tuple(tuple(None if (n + k) % 5 == 4 else n * k / 7 for k in range(kinds)) for n in range(layers))
    grid = Grid('"a" & b', tuple(f"m.layers.{n}" for n in range(layers)), tuple(f"kind{k}" for k in range(kinds)), values)
    made = heat_map(grid)
    ET.fromstring(made)
    assert "currentColor" in made
    assert all(f"kind{k}" in made for k in range(kinds))
    assert heat_map(grid) == made  # no time and no random number stands in it


def test_curves_of_two_samples() -> None:
    ET.fromstring(curves([Sample(0.0, 1 << 20, 0), Sample(1.0, 2 << 20, 1000)], 1 << 30))
    ET.fromstring(curves([Sample(0.5, 0, 0), Sample(0.5, 0, 0)], 1 << 30))
