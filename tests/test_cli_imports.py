"""A command imports what it works with and no more: everybody waits for it, each time. What is counted are modules, not seconds."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from fusefs.cli import app
from tests.cli_runner import environment, fusefs
from tests.test_cli_mount import Demo, demo

__all__ = ["demo"]

#: What takes long to import, and what needs it.
HEAVY = {
    "trio": "a volume that is opened here",
    "storage.wiring": "a volume that is opened here",
    "lmdb": "a volume that is opened here",
    "cryptography": "a volume that is opened here",
    "pyfuse3": "serving a mount",
    "fusefs.mount": "serving a mount",
    "rich": "a terminal",
    "obstore": "a host that is an object store",
    "storage.hosts.objectstore": "a host that is an object store",
    "boto3": "a host on S3",
    "botocore": "a host on S3",
    "pyeclib": "sectors cut into shards",
}
OPENING = {"trio", "storage.wiring", "lmdb", "cryptography"}

SCRIPT = """
import sys
from fusefs.cli import main
status = main(sys.argv[1:])
print("", *(name for name in sys.modules), file=sys.stderr)
sys.exit(status)
"""


def imported(*arguments: str | Path, expect: int = 0) -> set[str]:
    """Which of HEAVY a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        env=environment({"FUSEFS_NEW_PASSPHRASE": "another"}),
        timeout=60,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return HEAVY.keys() & done.stderr.decode().splitlines()[-1].split()


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["help"], ["help", "mount"], ["status", "--help"], ["recover", "-h"], ["completion", "bash"]],
    ids=" ".join,
)
def test_what_needs_no_volume_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(*arguments) == set()


def test_what_asks_a_mount_imports_nothing_heavy(demo: Demo) -> None:
    demo.mount()
    at = demo.mountpoint
    commands: list[list[str | Path]] = [["status", at], ["hosts", at], ["contracts", at], ["replication", at], ["repair", at]]
    commands += [["scrub", at], ["flush", at], ["worm", at], ["umount", at]]
    assert {str(command[0]): imported(*command) for command in commands} == {str(command[0]): set() for command in commands}


def test_a_volume_on_directories_is_opened_without_the_libraries_of_other_hosts(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    # Creation offers storage's whole, and still no more than its hosts need.
    assert imported("init", volume) == OPENING
    assert imported("ls", volume) == OPENING
    assert imported("status", volume) == OPENING
    assert imported("check", volume) == OPENING
    assert imported("passwd", volume) <= OPENING


def test_mounting_leaves_to_the_process_that_serves_what_serving_needs(demo: Demo) -> None:
    assert not imported("mount", demo.volume, demo.mountpoint) & {"pyfuse3", "fusefs.mount", "rich", "obstore", "boto3", "pyeclib"}
    fusefs("umount", demo.mountpoint)


@pytest.mark.parametrize("name", app.COMMANDS)
def test_the_list_of_commands_says_what_each_command_says_of_itself(name: str) -> None:
    home = app.COMMANDS[name]
    command = getattr(import_module(f"fusefs.cli.{home.module}"), home.name)
    assert isinstance(command, click.Command)
    assert (command.name, command.short_help) == (name, home.short_help)


def test_every_command_is_listed() -> None:
    stems = {path.stem for path in Path(app.__file__).parent.glob("*.py")} - {"__init__", "app"}
    made = [value for stem in stems for value in vars(import_module(f"fusefs.cli.{stem}")).values() if isinstance(value, click.Command)]
    inner = {name for group in made if isinstance(group, click.Group) for name in group.commands}
    assert {command.name for command in made} - inner == app.COMMANDS.keys()
