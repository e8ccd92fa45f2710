"""Options about what is checked, compared and shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streammerge.options.base import OptionKind, Options, option
from streammerge.options.values import PATH, TRUTH, WHOLE, share

if TYPE_CHECKING:
    from streammerge.stores.locations import PathLike

    Checkpoint = PathLike | Mapping[str, Any]


class Verifying(Options):
    """What is verified."""

    sample: str | float | None = option(
        "How much of the values is computed again; 100% for all.",
        OptionKind("a share like 5%", share),
        metavar="SHARE",
        otherwise="5% if the inputs are available",
    )
    seed: int = option("Chooses the sample.", WHOLE, default=0, metavar="N")
    inputs: PathLike | None = option(
        "The folder that holds the inputs.", PATH, metavar="DIR", otherwise="here, or beside the output"
    )
    own_methods: bool = option("Let the recipe name methods that are your own code.", TRUTH, default=False)


class Comparing(Options):
    """What is compared."""

    base: Checkpoint | None = option(
        "Their common ancestor C: compares what A and B have changed in it.", PATH, metavar="C"
    )


class Reporting(Options):
    """What is shown besides."""

    report: PathLike | None = option(
        "Write a page with pictures there, which a browser opens offline; needs streammerge[report].",
        PATH,
        metavar="FILE.html",
    )


class Gathering(Options):
    """What is gathered besides."""

    statistics: bool = option(
        "Measure how far the output lies from its inputs while merging, into OUT.statistics.json, so that a later report "
        "reads no input.",
        TRUTH,
        default=False,
    )


class Showing(Options):
    """What a report shows."""

    inputs: PathLike | None = option(
        "The folder that holds the inputs.", PATH, metavar="DIR", otherwise="here, or beside the output"
    )
    compare: bool = option(
        "False: do not read the inputs, whose distances to the output are then not shown.",
        TRUTH,
        default=True,
        negated=True,
    )
    exact: bool = option(
        "Compare all elements, also where the merge has measured a sample.",
        TRUTH,
        default=False,
    )
    overwrite: bool = option("Replace a report.", TRUTH, default=False)
