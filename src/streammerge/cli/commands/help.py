"""``streammerge help``."""

from __future__ import annotations

import click

from streammerge.cli import options


@click.command(cls=options.GroupedCommand, epilog="")
@click.argument("command", required=False)
@click.pass_context
def help(ctx: click.Context, command: str | None) -> None:
    """Show the help of streammerge, or of one command."""
    above = ctx.find_root()
    group = above.command
    if command is None or not isinstance(group, click.Group):
        click.echo(above.get_help())
        return
    found = group.get_command(above, command)
    if found is None:
        raise click.UsageError(f"there is no command {command}; there are {', '.join(group.list_commands(above))}")
    with click.Context(found, info_name=command, parent=above) as inner:
        click.echo(found.get_help(inner))
