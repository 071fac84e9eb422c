"""`fusefs replication`: how often, or as which code, what is below a directory is stored."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from fusefs.cli import live
from fusefs.cli.arguments import passphrase_option
from fusefs.cli.output import human_bytes, printable, progress_bar, say, write_line, write_table
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run, unmounted_volume, with_bar
from fusefs.cli.startup import importing
from fusefs.mounts import Mount, find_mount
from storage import counted, parse_replication
from storage.errors import BadArgument, NotFound, NotPermitted

if TYPE_CHECKING:
    from storage import ReplicationStatus, RewriteStatus, Volume

#: Takes the place of a SPEC.
INHERIT = "inherit"
ROOT = 1


@click.command(short_help="Show or set how often files are stored.")
@click.argument("path", metavar="PATH|VOLUME[:NAME]")
@click.argument("spec", required=False, default=None, metavar="[SPEC|inherit]")
@click.option("--now", is_flag=True, help="Also what is there: every file below, or the file PATH itself.")
@click.option("--background", is_flag=True, help="With --now: do not wait until everything has been moved.")
@click.option("--json", "as_json", is_flag=True, help="What holds and what is stored how, as one JSON object, for programs.")
@passphrase_option
def replication(path: str, spec: str | None, now: bool, background: bool, as_json: bool, passphrase_file: Path | None) -> None:
    """Store what is created below the directory PATH from now on as SPEC; without SPEC, show what holds there.

    SPEC is a number of copies ("3"), or data+parity ("4+2": six shards on six hosts, any four of which are enough). "inherit" takes back
    what was set: then what is above holds again, in the end the volume's. PATH is a directory on a mounted volume, or a file with --now;
    of a volume that is not mounted, VOLUME:NAME.

    --now moves what is there, and waits; interrupted, or with --background, it goes on by itself while the volume is mounted, also after
    a crash. Directories below lose what was set for them. What is read, appended or renamed meanwhile is none the worse for it. Exit
    status 1: some could not be moved yet, and it says why.

    \b
    Examples:
      fusefs replication ~/mnt/photos 3
      fusefs replication ~/mnt/archive 4+2 --now
      fusefs replication ~/volume:archive
    """
    if spec is None and now:
        raise click.UsageError("--now needs SPEC")
    if background and not now:
        raise click.UsageError("--background goes with --now")
    if as_json and spec is not None:
        raise click.UsageError("--json goes without SPEC")
    wanted = None if spec is None else "" if spec == INHERIT else str(parse_replication(spec))
    mount = find_mount(Path(path))
    if mount is not None:
        _mounted(mount, path, wanted, now, not background, as_json)
        return
    volume, name = _split(path)
    live.refuse_if_mounted(volume)
    secret = passphrase(passphrase_file)
    if wanted is None:
        _show(run(partial(_look_unmounted, volume, secret, name)), as_json)
    else:
        _tell(run(partial(_set_unmounted, volume, secret, name, wanted, now, not background)), now and not background)


def _mounted(mount: Mount, path: str, wanted: str | None, now: bool, wait: bool, as_json: bool) -> None:
    # A volume's own directory stands for the root of what it has.
    ino = _inode(mount, mount.mountpoint if os.path.realpath(path) == os.path.realpath(mount.volume) else Path(path))
    with live.client(mount.volume) as client:
        if wanted is None:
            _show(client.replication(ino), as_json)
            return
        with progress_bar("moving what is stored", show=now and wait) as advance:
            outcome = client.replicate(ino, wanted, now=now, wait=wait, progress=advance)
    _tell(outcome, now and wait)


def _inode(mount: Mount, path: Path) -> int:
    try:
        found = os.stat(path)
        root = os.stat(mount.mountpoint)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise NotPermitted(f"{path} cannot be looked at: {error.strerror}") from None
    if found.st_dev != root.st_dev:
        raise BadArgument(f"{path} is on another file system than {mount.mountpoint}, which is mounted below")
    return found.st_ino


def _split(path: str) -> tuple[Path, str]:
    """VOLUME[:NAME]: the first colon behind which it is no path any more, but a name in the volume before it."""
    with importing():
        from storage import KEY_FILE
    at = len(path)
    for at in [at for at, character in enumerate(path) if character == ":"] + [len(path)]:
        if os.path.exists(os.path.join(path[:at], KEY_FILE)):
            return Path(os.path.abspath(path[:at])), path[at + 1 :]
    raise NotFound(f"{path} is neither on a mounted volume nor the directory of a volume")


def _find(volume: Volume, name: str) -> int:
    ino = ROOT
    for part in os.fsencode(name).split(b"/"):
        if part:
            ino = volume.namespace.lookup(ino, part)
    return ino


async def _look_unmounted(path: Path, secret: str, name: str) -> ReplicationStatus:
    async with unmounted_volume(path, secret, "replication") as volume:
        return await volume.namespace.stored(_find(volume, name))


async def _set_unmounted(path: Path, secret: str, name: str, wanted: str, now: bool, wait: bool) -> RewriteStatus:

    async with unmounted_volume(path, secret, "replication") as volume:
        await volume.set_replication(_find(volume, name), wanted, now=now)
        if not (now and wait):
            return volume.rewrite_status()

        async def work() -> RewriteStatus:
            outcome = await volume.rewrite()
            await volume.flush()
            return outcome

        def progress() -> tuple[int, int]:
            now = volume.rewrite_status()
            return now.bytes, now.bytes + now.pending_bytes

        return await with_bar("moving what is stored", work, progress)


def _tell(outcome: RewriteStatus, waited: bool) -> None:
    if not (outcome.files or outcome.directories):
        return
    what = f"{counted(outcome.files, 'file')}, {human_bytes(outcome.pending_bytes)}"
    if not waited:
        say(f"{what}: still to be moved to another replication, in the background of the mount")
        return
    say(f"{what}: not moved to another replication yet, which is tried again: {outcome.trouble or 'see fusefs status'}")
    click.get_current_context().exit(1)


def _show(now: ReplicationStatus, as_json: bool) -> None:
    if as_json:
        write_line(json.dumps(msgspec.to_builtins(now), indent=2))
        return
    inherited = f"inherited from {now.source}" if now.source else "inherited, the volume's"
    write_line(printable(f"{now.path}: {now.replication}, {'its own' if now.own else inherited}"))
    if now.below:
        write_line()
        rows = [
            (one.replication, f"{one.files:,}", human_bytes(one.bytes), human_bytes(one.misplaced) if one.misplaced else "-")
            for one in now.below
        ]
        write_table(("replication", "files", "bytes", "still to be moved"), rows, right=(1, 2, 3))
