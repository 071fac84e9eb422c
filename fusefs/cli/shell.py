"""`fusefs completion` and `fusefs help`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from fusefs.cli.app import COMPLETE_VARIABLE, PROGRAM
from fusefs.cli.output import write_line


@click.command(short_help="Print what makes a shell complete commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete fusefs commands with the TAB key.

    \b
    Examples:
      fusefs completion bash > ~/.local/share/bash-completion/completions/fusefs
      fusefs completion zsh  > "${fpath[1]}/_fusefs"
      fusefs completion fish > ~/.config/fish/completions/fusefs.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    # `source_vars` and the template, not `source()`: that one runs bash to see its version, and this only prints a file.
    script = kind(context.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE)
    write_line((script.source_template % script.source_vars()).rstrip("\n"))


@click.command(name="help", short_help="Show help, for fusefs or for one command.")
@click.argument("names", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def help_command(context: click.Context, names: tuple[str, ...]) -> None:
    """Show help, for fusefs or for one of its commands."""
    root = context.find_root()
    command: click.Command = root.command
    shown = click.Context(command, info_name=PROGRAM, **command.context_settings)
    for name in names:
        found = command.get_command(shown, name) if isinstance(command, click.Group) else None
        if found is None:
            raise click.UsageError(f"there is no command {name!r}; fusefs help lists them")
        command = found
        shown = click.Context(command, info_name=name, parent=shown)
    write_line(command.get_help(shown))
