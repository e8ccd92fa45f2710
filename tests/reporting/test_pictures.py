"""Pictures as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from streammerge.reporting.facts import Grid, Sample
from streammerge.reporting.pictures import curves, heat_map, throughput

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


def test_throughput_has_the_bytes_of_the_last_sample() -> None:
    samples = [Sample(0.0, 0, 0), Sample(1.0, 0, 7), Sample(1.001, 0, 5_000_000), Sample(1.002, 0, 8_000_000)]
    times, speeds = throughput(samples)
    assert times == [0.0, 1.002]  # a line needs two points
    assert speeds == pytest.approx([8 / 1.002] * 2)
    times, speeds = throughput([Sample(float(n), 0, n * 2_000_000) for n in range(9)])
    assert times == [float(n) for n in range(1, 9)]
    assert speeds == pytest.approx([2.0] * 8)


def test_curves_of_two_samples() -> None:
    ET.fromstring(curves([Sample(0.0, 1 << 20, 0), Sample(1.0, 2 << 20, 1000)], 1 << 30))
    ET.fromstring(curves([Sample(0.5, 0, 0), Sample(0.5, 0, 0)], 1 << 30))
