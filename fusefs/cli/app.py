"""The command group, and where every exception becomes one line on standard error and an exit status."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem, shell_complete

from fusefs.cli.notices import collecting
from fusefs.cli.output import OutputClosed, flush_output, say, standard_output, write_line
from fusefs.cli.session import Interrupted, leaves
from fusefs.cli.startup import importing
from storage.errors import FusefsError

PROGRAM = "fusefs"
#: Set by the completion script when it asks for candidates.
COMPLETE_VARIABLE = "_FUSEFS_COMPLETE"
#: Exit statuses that no kind of `storage.errors` has; the others are its `exit_status`.
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


class Home(NamedTuple):
    """Where a command stands, and what the list of commands says about it: its `short_help`, which tests/test_cli_imports.py compares."""

    module: str
    name: str
    short_help: str


#: In the order of a first acquaintance, not of the alphabet.
COMMANDS = {
    "init": Home("create", "init", "Make a new volume."),
    "mount": Home("mounting", "mount", "Mount a volume on a directory."),
    "umount": Home("mounting", "umount", "Send everything to the hosts and unmount."),
    "flush": Home("mounting", "flush", "Send everything to the hosts; stay mounted."),
    "status": Home("status", "status", "What is stored, where, and what is wrong."),
    "check": Home("check", "check", "Check the metadata, and what the hosts hold."),
    "scrub": Home("scrub", "scrub", "Look at what the hosts keep, and put right what is damaged."),
    "hosts": Home("hosts", "hosts", "List the hosts of a volume; add one, leave one, say which is lost."),
    "contracts": Home("contracts", "contracts", "List, conclude and renew contracts with hosts."),
    "repair": Home("hosts", "repair", "Make every sector good again, now."),
    "host": Home("host", "host", "For the owner of a host: take away what no contract covers."),
    "ls": Home("files", "ls", "List files, without mounting."),
    "put": Home("files", "put", "Store a new file, without mounting."),
    "append": Home("files", "append", "Append to a file, without mounting."),
    "cat": Home("files", "cat", "Write files to standard output, without mounting."),
    "rm": Home("files", "rm", "Remove files, without mounting."),
    "passwd": Home("keys", "passwd", "Change the passphrase."),
    "replication": Home("replication", "replication", "Show or set how often files are stored."),
    "worm": Home("worm", "worm", "Let a directory only grow."),
    "recover": Home("recover", "recover", "Get a volume back from its hosts."),
    "completion": Home("shell", "completion", "Print what makes a shell complete commands."),
    "help": Home("shell", "help_command", "Show help, for fusefs or for one command."),
}


def _version() -> str:
    with importing():
        from importlib.metadata import PackageNotFoundError, version
    try:
        return version("sectorfs")
    except PackageNotFoundError:
        return "(not installed)"


def _show_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:  # noqa: ARG001 - click's signature
    if wanted and not context.resilient_parsing:
        write_line(f"fusefs {_version()}")
        context.exit()


def _show_help(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:  # noqa: ARG001 - click's signature
    if wanted and not context.resilient_parsing:
        write_line(context.get_help())
        context.exit()


def _add_help_option(command: click.Command) -> None:
    """In place of click's, which raises plain OSError where standard output is closed or full."""
    command.add_help_option = False
    command.params.append(
        click.Option(
            ["-h", "--help"], is_flag=True, is_eager=True, expose_value=False, callback=_show_help, help="Show this message and exit."
        )
    )


class _InOrder(click.Group):
    """Lists commands in the order in which they were given."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


class _Commands(_InOrder):
    """Imports a command's module when somebody runs it, not before: all of them take ten times as long as one that asks a mount.

    `commands` holds stand-ins, which have a name and a short help, for whoever only lists.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(commands={name: click.Command(name, short_help=home.short_help) for name, home in COMMANDS.items()}, **settings)
        self._loaded: dict[str, click.Command] = {}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        home = COMMANDS.get(cmd_name)
        if home is None:
            return None
        if cmd_name not in self._loaded:
            with importing():
                command: click.Command = getattr(import_module(f"fusefs.cli.{home.module}"), home.name)
            for each in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
                _add_help_option(each)
            self._loaded[cmd_name] = command
        return self._loaded[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _InOrder(commands=self.commands).format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=home.short_help) for name, home in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=_Commands, context_settings={"max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version and exit.")
def cli() -> None:
    """An encrypted, append-only filesystem on hosts nobody needs to trust.

    \b
    A first volume:
      fusefs init ~/volume              makes it, and prints its recovery phrase
      fusefs mount ~/volume ~/mnt       from now on cp, cat, tail, rsync ... work in ~/mnt
      fusefs status ~/mnt               what is stored, and where
      fusefs umount ~/mnt               returns when everything is on its hosts

    The passphrase comes from --passphrase-file FILE, else from the environment variable FUSEFS_PASSPHRASE, else it is asked for.
    """


_add_help_option(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: of `sys.argv`); returns its exit status and never raises, whatever happens."""
    # A core dump would put keys and file contents on the local disk in the clear. The mount in the background inherits the limit.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for stream in (sys.stdout, sys.stderr):
        # File names are any bytes: showing one must not fail in the C locale, nor for a byte that is not UTF-8.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status: int
    try:
        if instruction := os.environ.get(COMPLETE_VARIABLE):
            with standard_output():
                status = shell_complete(cli, {}, PROGRAM, COMPLETE_VARIABLE, instruction)
        else:
            status = _run(list(sys.argv[1:] if arguments is None else arguments))
        # Here, not at interpreter exit: a full disk behind standard output is an error like any other.
        flush_output()
    except BaseException as error:  # noqa: BLE001 - the last line of defence: nothing may end in a traceback
        status = _report(error)
    return status


def _run(arguments: list[str]) -> int:
    try:
        with collecting() as collected, cli.make_context(PROGRAM, arguments) as context:
            # `status` shows what was collected in its own way.
            context.obj = collected
            cli.invoke(context)
            collected.tell()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    return 0


def _report(error: BaseException) -> int:
    """Say what happened, in one line; returns the exit status."""
    status, message = _verdict(error)
    try:
        if status == BUG and os.environ.get("FUSEFS_DEBUG") == "1":
            traceback.print_exception(error)
        if message:
            say(message)
        flush_output()
    except (OSError, FusefsError, OutputClosed):
        # Standard output or standard error is closed or full: nobody is left to tell. What is still buffered goes nowhere,
        # so that the interpreter has nothing to complain about when it exits.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
    return status


def _verdict(error: BaseException) -> tuple[int, str]:
    """(exit status, message; "" to say nothing)."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        names = error.ctx.command_path.split()[1:]
        return error.exit_code, f"a command is missing; see {' '.join(('fusefs help', *names))}"
    if isinstance(error, click.ClickException):
        return error.exit_code, _usage_message(error)
    leaf = min(leaves(error), key=_rank)
    if isinstance(leaf, FusefsError):
        return leaf.exit_status, str(leaf)
    if isinstance(leaf, Interrupted):
        return leaf.exit_status, "interrupted"
    if isinstance(leaf, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED, "interrupted"
    if isinstance(leaf, OutputClosed):
        return BROKEN_PIPE, ""
    hint = "" if os.environ.get("FUSEFS_DEBUG") == "1" else " (FUSEFS_DEBUG=1 shows where)"
    return BUG, f"this is a bug in fusefs, please report it: {type(leaf).__name__}: {leaf}{hint}"


def _rank(error: BaseException) -> int:
    """Which of several to tell: that somebody stopped it, then a bug, which must not hide behind an error it caused, then the rest."""
    if isinstance(error, (KeyboardInterrupt, Interrupted, click.Abort)):
        return 0
    if isinstance(error, OutputClosed):
        return 3
    return 2 if isinstance(error, FusefsError) else 1


def _usage_message(error: click.ClickException) -> str:
    """click's message in one line, with the command it is about and where to read more."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    path = context.command_path
    _, _, name = path.partition(" ")
    return f"{name + ': ' if name else ''}{message} (see {path} --help)"
