"""Layers, kinds and distances of a report."""

from __future__ import annotations

import math

from streammerge.reporting.facts import Facts, Row, grid_of, joined, place_of, shortened


def row(name: str, distance: float | None, elems: int = 10) -> Row:
    return Row(name, (elems,), "float32", "linear", (distance,), elems)


def test_the_place_of_a_tensor() -> None:
    assert place_of("model.layers.3.mlp.experts.7.w1.weight") == ("model.layers.3", "mlp.experts.w1")
    assert place_of("h.0.attn.bias") == ("h.0", "attn.bias")
    assert place_of("lm_head.weight") == ("outside", "lm_head")
    assert place_of("steps") == ("outside", "steps")


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    grid = grid_of("a", [row(f"m.layers.{n}.w", n / 10) for n in (10, 9, 2)], 0)
    assert grid.layers == ("m.layers.2", "m.layers.9", "m.layers.10")
    assert [round(line[0] or 0, 9) for line in grid.values] == [0.2, 0.9, 1.0]
    assert shortened(grid.layers) == ["2", "9", "10"]
    assert shortened(["model.layers.0", "model.layers.1", "lm_head"]) == ["layers.0", "layers.1", "lm_head"]
    assert shortened(["h.0", "h.1", "wte"]) == ["h.0", "h.1", "wte"]
    two = ["mlp.layers.0", "conv_layers.0", "head"]
    assert shortened(two) == two


def test_distances_are_joined_by_elements() -> None:
    assert math.isclose(joined([(3.0, 1), (1.0, 3)]), math.sqrt(12 / 4))
    assert joined([]) == 0.0


def test_many_kinds_share_a_column() -> None:
    rows = [row(f"l.0.kind{chr(97 + n)}.weight", 1.0, 100 - n) for n in range(20)] + [row("l.1.kinda.weight", 0.5)]
    grid = grid_of("a", rows, 0)
    assert len(grid.kinds) == 14
    assert grid.kinds[-1] == "other"
    assert grid.values[1][-1] is None


def test_a_model_without_layers_has_a_row_for_each_tensor() -> None:
    grid = grid_of("a", [row("a", 0.1), row("b", None), row("c", 0.3, 99)], 0)
    assert grid.layers == ("c", "a")


def test_what_moved_most_stands_first() -> None:
    facts = Facts("t", "s", input_names=["a"], rows=[row("x.0.w", 0.1), row("x.1.w", 0.4), row("x.2.w", 0.2)])
    assert [layer for layer, _ in facts.moved()] == ["x.1", "x.2", "x.0"]
    assert Facts("t", "s").moved() == []
