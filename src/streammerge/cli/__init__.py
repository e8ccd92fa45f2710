"""The command line: arguments in; plan, progress and errors out. What things mean is decided elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from streammerge.choices import EMA_CHOICES
from streammerge.cli import options
from streammerge.cli.signals import Stopped, stoppable
from streammerge.cli.streams import open_standard_streams
from streammerge.cli.terminal import say, width
from streammerge.errors import RecipeError, StreammergeError, printable
from streammerge.version import __version__

if TYPE_CHECKING:
    from streammerge.planning import Plan
    from streammerge.run import Result

# What a command needs is imported in it, so that --help waits for nothing.


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "auto_envvar_prefix": "STREAMMERGE"}
)
@click.version_option(__version__, prog_name="streammerge")
def cli() -> None:
    """Merge model checkpoints larger than memory.

    An INPUT is a .safetensors, .pth, .pt, .bin or .ckpt file, a folder with one checkpoint or with shards and their
    index, or a quoted glob. A recipe, which is a mergekit configuration, stands in place of all inputs. Nothing in an
    input is ever executed.
    """


@cli.command()
@options.merging
@options.out
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@options.running
def merge(
    inputs: tuple[str, ...],
    out: str,
    dry_run: bool,
    overwrite: bool,
    no_resume: bool,
    polite: bool,
    no_progress: bool,
    form: str,
    debug: bool,
    **wishes: Any,
) -> None:
    """Merge checkpoints into one.

    \b
    streammerge merge news.pth audiobook.pth --weights 0.6,0.4 -o voice.pth
    streammerge merge 'run/checkpoint-*.pt' --last 5 -o average.safetensors
    streammerge merge recipe.yaml -o merged/
    """
    from streammerge import api
    from streammerge.cli.progress import Progress

    arguments = _arguments(wishes)
    if dry_run:
        _show_plan(api.plan(inputs, out, **arguments), form)
        return
    with Progress(form, enabled=not no_progress) as progress:
        result = api.merge(
            inputs, out, overwrite=overwrite, resume=not no_resume, polite=polite, listener=progress, **arguments
        )
    _report(result, form)


@cli.command()
@options.merging
@click.option("-o", "--out", type=click.Path(), metavar="OUT", help="The output, by whose name its container is planned.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["human", "json", "yaml", "quiet"]),
    default="human",
    help="How to report; yaml: the recipe of this command.",
)
@options.debug
def plan(inputs: tuple[str, ...], out: str | None, form: str, debug: bool, **wishes: Any) -> None:
    """Show what merge would do; nothing is written."""
    from streammerge import api

    _show_plan(api.plan(inputs, out, **_arguments(wishes)), form)


@cli.command()
@click.argument("path", type=click.Path(), metavar="INPUT")
@options.out
@click.option("--dtype", metavar="DTYPE", help="Recast floating-point tensors.")
@click.option(
    "--drop", multiple=True, metavar="PATTERN", help="Leave out tensors whose names match, like 'dvae.*'; repeatable."
)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Keep only tensors whose names match; repeatable.")
@click.option("--strip-prefix", default="", metavar="PREFIX", help="Remove PREFIX from the names that begin with it.")
@click.option("--extras", type=click.Path(), metavar="FILE.json", help="Write what is not a tensor there, readable.")
@options.selection
@options.resources
@options.writing
@options.receipt_hash
@options.running
def convert(path: str, out: str, no_resume: bool, no_progress: bool, form: str, debug: bool, **wishes: Any) -> None:
    """Convert .pth to safetensors or back; recast, shrink, shard.

    \b
    streammerge convert pytorch_model.bin -o model.safetensors
    streammerge convert best_model.pth -o small.pth --drop 'dvae.*'
    """
    from streammerge import api
    from streammerge.cli.progress import Progress

    with Progress(form, enabled=not no_progress) as progress:
        result = api.convert(path, out, resume=not no_resume, listener=progress, **wishes)
    _report(result, form)


@cli.command()
@click.argument("out", type=click.Path(), metavar="OUT")
@click.option("--sample", metavar="SHARE", help="How much of the values is computed again; 100% for all.  [default: 5%]")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Chooses the sample.")
@click.option("--inputs", type=click.Path(), metavar="DIR", help="Where the inputs are.  [default: here, or beside OUT]")
@click.option("--own-methods", is_flag=True, help="Let the recipe name methods that are your own code.")
@options.resources
@options.output
@options.debug
def verify(out: str, form: str, debug: bool, **wishes: Any) -> None:
    """Check that an output is what its recipe says.

    Its structure; the checksum of every byte; and, where the inputs are at hand, a sample of its values, computed again
    in float64.
    """
    from streammerge import api
    from streammerge.cli import render

    verified = api.verify(out, **wishes)
    if form == "json":
        click.echo(_json(render.verified_json(verified)))
    elif form == "human":
        say(render.verified_text(verified))


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="PATH...")
@click.option("--tensors", is_flag=True, help="List names, dtypes, shapes and offsets.")
@click.option("--recipe", is_flag=True, help="Print the recipe by which it was merged, as YAML.")
@options.selection
@options.output
@options.debug
def inspect(paths: tuple[str, ...], tensors: bool, recipe: bool, form: str, debug: bool, **wishes: Any) -> None:
    """Show what a checkpoint is and holds; nothing in it is executed."""
    from streammerge.checkpoint import open_checkpoint
    from streammerge.cli import render
    from streammerge.inputs import expand

    state_dict, ema = wishes["state_dict"], wishes["ema"] or EMA_CHOICES[0]
    indexes = [open_checkpoint(path, state_dict, ema) for path in expand(list(paths))]
    if recipe:
        click.echo("---\n".join(render.recipe_text(index) for index in indexes), nl=False)
        return
    if form == "json":
        shown = [render.index_json(index, tensors) for index in indexes]
        click.echo(_json(shown[0] if len(shown) == 1 else shown, indent=2))
    elif form == "human":
        say("\n\n".join(render.index_text(index, tensors) for index in indexes))


@cli.command()
@click.argument("name", required=False, shell_complete=options.complete_method)
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to report.")
@options.debug
def methods(name: str | None, form: str, debug: bool) -> None:
    """List the merge methods, or show one: parameters, formula, paper."""
    from streammerge.cli import pages
    from streammerge.methods.registry import find_method
    from streammerge.methods.registry import methods as all_methods

    chosen = list(all_methods().values()) if name is None else [find_method(name)]
    if form == "json":
        shown = [pages.method_json(method) for method in chosen]
        click.echo(_json(shown if name is None else shown[0], indent=2))
    else:
        say(pages.methods_table(chosen) if name is None else pages.method_page(chosen[0], width()))


def _arguments(wishes: dict[str, Any]) -> dict[str, Any]:
    """What was typed, as the arguments of :func:`api.plan`; a method's parameters are arguments beside the others."""
    from inspect import signature

    from streammerge import api

    taken = ({*signature(api.plan).parameters} | {*signature(api.merge).parameters}) - {"normalize"}
    made = {key: value for key, value in wishes.items() if key not in ("weights", "no_normalize", "parameters")}
    made["weights"] = None if wishes["weights"] is None else _numbers("--weights", wishes["weights"])
    if wishes["no_normalize"]:
        made["normalize"] = False
    given: set[str] = set()
    for parameter in wishes["parameters"]:
        name, equals, value = parameter.partition("=")
        if not equals:
            raise RecipeError(f"-p {printable(parameter)}: write it as NAME=VALUE")
        if name in given or (name == "weight" and made["weights"] is not None):
            raise RecipeError(f"-p {printable(name)} is given twice")
        given.add(name)
        if name == "weight" and "," in value:
            made["weights"] = _numbers("-p weight", value)
        elif name in taken:
            raise RecipeError(f"-p {printable(name)}: that is an option of the command, not a parameter of a method")
        else:
            made[name] = value.split(",") if "," in value else value
    return made


def _json(data: Any, **form: Any) -> str:
    import json

    return json.dumps(data, **form)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{option} takes numbers joined by commas, like 0.6,0.4, not {printable(text)}") from error


def _show_plan(plan: Plan, form: str) -> None:
    if form == "json":
        click.echo(_json(plan.to_json(), indent=2))
    elif form == "yaml":
        from streammerge.recipe import to_yaml

        click.echo(to_yaml(plan.recipe.to_dict()), nl=False)
    elif form == "human":
        say(str(plan))


def _report(result: Result, form: str) -> None:
    from streammerge.cli import render

    if form == "json":
        click.echo(_json(render.result_json(result)))
    elif form == "human":
        for note in result.notes:
            say(f"note: {note}", err=True)
        for warning in result.warnings:
            say(f"warning: {warning}", err=True)
        say(render.result_text(result))


def main() -> None:
    """Runs the command line; every error of streammerge's own is one sentence and its exit code."""
    open_standard_streams()
    debug = "--debug" in sys.argv
    try:
        with stoppable():
            cli.main(prog_name="streammerge", standalone_mode=False)
    except Stopped as stopped:
        if sys.stderr.isatty():
            click.echo(err=True)  # the terminal has shown ^C
        say(f"error: {stopped.word}; {stopped.outcome}", err=True)
        sys.stderr.flush()
        # All is cleaned up; torch can abort when the interpreter is taken down under a starting thread.
        os._exit(stopped.exit_code)
    except click.ClickException as error:
        _fail(_usage(error), error.exit_code)
    except StreammergeError as error:
        if debug:
            _print_traceback()
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (OSError, MemoryError) as error:
        if debug:
            _print_traceback()
        _fail(printable(error if not isinstance(error, OSError) or error.filename else error.strerror or error, 1000), 1)


def run() -> None:
    """The installed command: :func:`main`, and the end of its process: taking torch down would cost half a second."""
    code: Any = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    if code is not None and not isinstance(code, int):
        sys.exit(code)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code or 0)


def _usage(error: click.ClickException) -> str:
    """What is wrong with a command, in one sentence."""
    said, near = error.format_message().partition(" (Did you mean")[0].rstrip("."), ""
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        from difflib import get_close_matches

        best = get_close_matches(error.option_name, error.possibilities, n=1) or error.possibilities
        near = f"; did you mean {best[0]}?"
    elif isinstance(error, click.UsageError) and error.ctx:
        near = f"; see `{error.ctx.command_path} --help`"
    return said[:1].lower() + said[1:] + near


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def _fail(message: str, code: int) -> None:
    say(f"error: {message}", err=True)
    sys.exit(code)
