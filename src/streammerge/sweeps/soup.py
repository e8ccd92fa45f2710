"""Greedy soups (Wortsman et al., arXiv:2203.05482): a model joins the mean only if the score does not get worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streammerge.sweeps.making import Maker
from streammerge.sweeps.points import Point
from streammerge.sweeps.results import Made
from streammerge.sweeps.scoring import Score

_ROUND = "round"
_MODELS = "models"


def greedy_soup(
    maker: Maker,
    inputs: Sequence[str],
    score: Score,
    lowest: bool,
    earlier: dict[str, Made],
    done: Callable[[list[Made]], None],
    remove: Callable[[Made], None],
) -> list[Made]:
    """Returns the inputs with their scores, then each mean that was tried. All but the best mean are removed again.

    ``inputs``: the models, which are scored themselves. ``earlier``: scores of an earlier run.
    """
    sign = -1 if lowest else 1
    models: list[Made] = []
    for path in inputs:
        known = earlier.get(f"input {path}")
        value = known.score if known is not None and known.score is not None else score(path)
        models.append(Made(f"input {path}", {_MODELS: path}, path, state="there", score=value))
        done(models)
    order = sorted(range(len(inputs)), key=lambda number: -sign * (models[number].score or 0.0))
    taken, best = [order[0]], models[order[0]].score or 0.0
    tried: list[Made] = []
    current: Made | None = None
    for turn, number in enumerate(order[1:], start=1):
        wanted = [*taken, number]
        chosen = tuple(inputs[n] for n in wanted)
        settings = {_ROUND: str(turn), _MODELS: "+".join(str(n + 1) for n in wanted)}
        point = Point(settings, {"parameters": {}}, chosen)
        (made,) = maker.make([point], earlier, lambda outputs: done([*models, *tried, *outputs]))
        if made.score is None:
            made.score = score(made.out)
        tried.append(made)
        if sign * made.score >= sign * best:
            if current is not None:
                remove(current)
            taken, best, current = wanted, made.score, made
        else:
            remove(made)
        done([*models, *tried])
    return [*models, *tried]
