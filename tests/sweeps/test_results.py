"""Tables, CSV and the record of a sweep."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

from streammerge.stores.locations import parse
from streammerge.sweeps.results import (
    Made,
    SweepResult,
    csv_text,
    epoch_table,
    ranked,
    read_record,
    table_lines,
    write_record,
)

MADE = [
    Made("t_0.2", {"t": "0.2"}, "out/t_0.2.pth", "x", "made", 0.5),
    Made("t_0.4", {"t": "0.4"}, "out/t_0.4.pth", "y", "removed", 0.25),
    Made("t_0.6", {"t": "0.6"}, "out/t_0.6.pth", "z", "made", None),
]


def test_the_best_stand_first() -> None:
    assert [each.score for each in ranked(MADE, lowest=False)] == [0.5, 0.25]
    assert [each.score for each in ranked(MADE, lowest=True)] == [0.25, 0.5]
    lines = table_lines(MADE, lowest=False)
    assert lines[0].split() == ["t", "score", "state", "output"]
    assert [line.split()[0] for line in lines[1:]] == ["0.2", "0.4", "0.6"]
    assert "out/t_0.4.pth" not in lines[2]


def test_the_csv_has_every_row() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(MADE))))
    assert [row["t"] for row in rows] == ["0.2", "0.4", "0.6"]
    assert [row["score"] for row in rows] == ["0.5", "0.25", ""]


def test_a_record_comes_back_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    folder = parse(str(tmp_path))
    write_record(folder, MADE)
    assert read_record(folder) == {each.name: each for each in MADE}
    for wrong in ("", "[]", '{"outputs": [{"name": 1}]}', "\xff"):
        (tmp_path / "sweep.json").write_text(wrong, encoding="latin-1")
        assert read_record(folder) == {}


def test_a_table_of_epochs() -> None:
    made = [
        Made("", {"epoch": str(e), "avg": str(a)}, "", score=e / a) for e in (9, 10) for a in (1, 2) if (e, a) != (9, 2)
    ]
    assert epoch_table(made) == ["epoch \\ avg   1  2", "          9   9", "         10  10  5"]
    assert epoch_table(MADE) == []


def test_a_notebook_shows_the_table() -> None:
    made = [replace(MADE[0], out="<b>"), *MADE[1:], *(Made(f"t_{n}", {"t": str(n)}, f"out/{n}") for n in range(60))]
    found = SweepResult(parse("out"), tuple(made), tuple(made[:2]), 1, 10, 20, 0.5, 1 << 20, 1 << 20, 1 << 29)
    shown = found._repr_html_()
    assert "2 outputs of 63 merges" in shown
    assert "10 bytes in 1 round over the inputs" in shown
    assert shown.index("&lt;b&gt;") < shown.index("t_0.4") < shown.index("out/t_0.6.pth")
    assert "the first 50 of 63" in shown
    assert shown.count("<tr>") == 4 + 1 + 50
