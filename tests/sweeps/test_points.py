"""The merges of a sweep: grids, draws, averages, and their names."""

from __future__ import annotations

import pytest

import streammerge as sm
from streammerge.sweeps.points import Point, points_of, space_of, whole_numbers

TWO = ["a", "b"]


def test_a_range_has_decimal_steps_and_its_end() -> None:
    made = points_of(space_of({"t": "0.2:0.8:0.1", "k": 3}), TWO)
    assert [each.settings["t"] for each in made] == ["0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"]
    assert made[0].arguments == {"parameters": {"t": "0.2", "k": 3}}
    assert made[0].name == "t_0.2"


def test_all_combinations_are_made() -> None:
    made = points_of(space_of({"t": ["1", "2"], "u": "0:1:0.5"}, weights=[[1, 0], [0.5, 0.5]]), TWO)
    assert len(made) == 12
    assert made[-1].name == "weight_0.5_0.5-t_2-u_1"
    assert made[-1].arguments["weights"] == [0.5, 0.5]


def test_draws_follow_from_the_seed_and_are_within_the_range() -> None:
    made = [points_of(space_of({"t": "0.2:0.4"}, draws=50, seed=seed), TWO) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    values = [float(each.settings["t"]) for each in made[0]]
    assert len(set(values)) == 50
    assert 0.2 <= min(values) < 0.25
    assert 0.35 < max(values) <= 0.4
    weights = [each.arguments["weights"] for each in points_of(space_of({}, draws=40), ["a", "b", "c"])]
    assert all(len(each) == 3 and abs(sum(each) - 1) < 1e-9 and min(each) >= 0 for each in weights)


def test_averages_end_at_epochs() -> None:
    inputs = [f"epoch-{n}.pt" for n in (9, 10, 2, 8)]
    made = points_of(space_of({}, epochs=[9, 10], averages=[1, 3, 4]), inputs)
    assert [each.name for each in made] == [
        "epoch_9-avg_1",
        "epoch_9-avg_3",
        "epoch_10-avg_1",
        "epoch_10-avg_3",
        "epoch_10-avg_4",
    ]
    assert made[3].inputs == ("epoch-8.pt", "epoch-9.pt", "epoch-10.pt")
    with pytest.raises(sm.RecipeError, match="no input has the number 7"):
        points_of(space_of({}, epochs=[7]), inputs)


def test_names_are_file_names() -> None:
    assert Point({"t": "a/b ?*"}).name == "t_a_b___"
    long = Point({"weight": ",".join(["0.123456"] * 40)})
    assert len(long.name) < 120
    assert long.name != Point({"weight": ",".join(["0.123456"] * 41)}).name


def test_whole_numbers() -> None:
    assert whole_numbers("epochs", "5") == [5]
    assert whole_numbers("epochs", "1:4") == [1, 2, 3, 4]
    assert whole_numbers("epochs", "10:30:10") == [10, 20, 30]
    for wrong in ("", "4:1", "a", "1:5:0", "1:99999999"):
        with pytest.raises(sm.RecipeError, match="takes a number or a range"):
            whole_numbers("epochs", wrong)
