"""`fusefs worm`: from now on a directory only grows."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import click

from fusefs.cli import live
from fusefs.cli.arguments import DIRECTORY_PATH
from fusefs.cli.output import say
from storage.errors import BadArgument, NotADirectory, NotFound, NotPermitted


@click.command(short_help="Let a directory only grow.")
@click.argument("path", type=DIRECTORY_PATH, metavar="PATH")
def worm(path: Path) -> None:
    """Let nothing under the directory PATH be removed, replaced or renamed any more.

    PATH lies on a mounted volume. New files can be made in it, and files appended to. This cannot be undone.

    \b
    Example:
      fusefs worm ~/mnt/archive
    """
    mount = live.mount_for(path)
    try:
        found = os.stat(path)
        root = os.stat(mount.mountpoint)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise NotPermitted(f"{path} cannot be looked at: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectory(f"{path} is not a directory: only directories can be worm")
    if found.st_dev != root.st_dev:
        raise BadArgument(f"{path} is on another file system than {mount.mountpoint}, which is mounted below")
    with live.client(mount.volume) as client:
        client.worm(found.st_ino)
    say(f"nothing under {path} can be removed, replaced or renamed any more")
