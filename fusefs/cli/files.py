"""`fusefs ls`, `put`, `append`, `cat` and `rm`: the Files interface from a shell, on a volume that is not mounted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusefs.cli.arguments import passphrase_option, upload_rate_option, volume_argument
from fusefs.cli.live import refuse_if_mounted
from fusefs.cli.output import Advance, human_time, mode_letters, out_is_terminal, progress_bar, say, write_bytes, write_record
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import flush_with_bar, run, unmounted_volume
from storage.errors import BadArgument, FusefsError, IOFailure, IsADirectory, NotFound, NotPermitted

if TYPE_CHECKING:
    from storage import Volume

#: Bytes read and handed on at a time.
CHUNK = 1024 * 1024

STDIN = "-"


@click.command(short_help="List files, without mounting.")
@volume_argument
@click.argument("prefix", default="")
@click.option("-l", "long", is_flag=True, help="Also show mode, bytes and time of the last change.")
@passphrase_option
def ls(volume: Path, prefix: str, long: bool, passphrase_file: Path | None) -> None:
    """List the files of VOLUME whose names start with PREFIX.

    Names are whole paths, in order within each directory.

    \b
    Examples:
      fusefs ls ~/volume
      fusefs ls -l ~/volume logs/2026-
    """
    refuse_if_mounted(volume)
    secret = passphrase(passphrase_file)

    async def work() -> None:
        async with unmounted_volume(volume, secret, "ls") as opened:
            async for name, size in opened.files.entries(prefix):
                text = ""
                if long:
                    attributes = opened.namespace.attributes(_inode(opened, name))
                    text = f"{mode_letters(attributes.mode)} {size:>15} {human_time(attributes.mtime_ns)} "
                write_record(text, name)

    run(work)


def _inode(volume: Volume, name: str) -> int:
    ino = 1
    for part in os.fsencode(name).split(b"/"):
        ino = volume.namespace.lookup(ino, part)
    return ino


@click.command(short_help="Store a new file, without mounting.")
@volume_argument
@click.argument("local", metavar="LOCAL")
@click.argument("name", metavar="NAME")
@upload_rate_option
@passphrase_option
def put(volume: Path, local: str, name: str, upload_rate: int | None, passphrase_file: Path | None) -> None:
    """Store the file LOCAL (- is standard input) as the new file NAME of VOLUME.

    NAME must not exist; directories in it are made. With a / at its end, LOCAL's own name is added. If anything fails, or is
    interrupted, no NAME is left behind. Returns when the file is on its hosts, or says why it is not there yet.

    \b
    Examples:
      fusefs put ~/volume backup.tar.zst backups/today.tar.zst
      pg_dump shop | fusefs put ~/volume - dumps/shop.sql
    """
    _store(volume, local, _target(local, name), passphrase_file, command="put", existing=False, upload_rate=upload_rate)


@click.command(short_help="Append to a file, without mounting.")
@volume_argument
@click.argument("name", metavar="NAME")
@click.argument("local", metavar="[LOCAL]", default=STDIN)
@upload_rate_option
@passphrase_option
def append(volume: Path, name: str, local: str, upload_rate: int | None, passphrase_file: Path | None) -> None:
    """Append the file LOCAL, or standard input, to the file NAME of VOLUME, which is made if it is missing.

    Returns when the bytes are on their hosts, or says why they are not there yet. If it is interrupted, what was appended so far stays.

    \b
    Examples:
      echo "$(date) backup done" | fusefs append ~/volume logs/backup.log
      fusefs append ~/volume logs/all.log today.log
    """
    _store(volume, local, _target(local, name), passphrase_file, command="append", existing=None, upload_rate=upload_rate)


def _target(local: str, name: str) -> str:
    if not name.endswith("/"):
        return name
    if local == STDIN:
        raise BadArgument(f"{name!r} ends in / and standard input has no name to add: give the whole name")
    return name + Path(local).name


def _store(
    volume: Path, local: str, name: str, passphrase_file: Path | None, *, command: str, existing: bool | None, upload_rate: int | None
) -> None:
    refuse_if_mounted(volume)
    with _source(local) as (descriptor, total):
        secret = passphrase(passphrase_file)

        async def work() -> None:
            async with unmounted_volume(volume, secret, command, upload_rate) as opened:
                with progress_bar(f"{command} {name}", total) as advance:
                    await _append_all(opened, descriptor, local, name, existing, advance, total)
                await flush_with_bar(opened)

        run(work)


async def _append_all(
    volume: Volume, descriptor: int, local: str, name: str, existing: bool | None, advance: Advance, total: int | None
) -> None:
    """All of the descriptor at the end of `name`, committed. A file that must be new is whole or not there at all."""
    import trio

    fd = await volume.files.open(name, existing=existing, write=True, read=False)
    try:
        try:
            done = 0
            async for data in _chunks(descriptor, local):
                await volume.files.append(fd, data)
                done += len(data)
                advance(done, total)
            await volume.files.commit(fd)
        finally:
            with trio.CancelScope(shield=True):
                await volume.files.close(fd)
    except BaseException:
        if existing is False:
            with trio.CancelScope(shield=True):
                await volume.files.delete(name)
        raise


async def _chunks(descriptor: int, local: str) -> AsyncIterator[bytes]:
    import trio

    while True:
        # Abandoned when cancelled: nobody can interrupt a read of a terminal or a pipe. os.read, not a buffered file, whose lock
        # the abandoned thread would take with it into the interpreter's exit.
        with _local_errors(local):
            data = await trio.to_thread.run_sync(partial(os.read, descriptor, CHUNK), abandon_on_cancel=True)
        if not data:
            return
        yield data


@contextmanager
def _source(local: str) -> Iterator[tuple[int, int | None]]:
    """(descriptor, size in bytes if it is known), opened before anything else is touched."""
    if local == STDIN:
        yield 0, _size(0)
        return
    with _local_errors(local):
        descriptor = os.open(local, os.O_RDONLY)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectory(f"{local} is a directory: mount the volume and copy it with cp -r")
        yield descriptor, _size(descriptor)
    finally:
        os.close(descriptor)


def _size(descriptor: int) -> int | None:
    try:
        info = os.fstat(descriptor)
    except OSError:
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


@contextmanager
def _local_errors(local: str) -> Iterator[None]:
    """What the local file system says, as a kind of `storage.errors`."""
    what = "standard input" if local == STDIN else local
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{what} does not exist") from None
    except PermissionError:
        raise NotPermitted(f"{what} may not be read by this user") from None
    except OSError as error:
        kind = BadArgument if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBADF) else IOFailure
        raise kind(f"{what} cannot be read: {error.strerror}") from error


@click.command(short_help="Write files to standard output, without mounting.")
@volume_argument
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@passphrase_option
def cat(volume: Path, names: tuple[str, ...], passphrase_file: Path | None) -> None:
    """Write the files NAME... of VOLUME to standard output, one after the other.

    Every byte is verified before it is written; a damaged one ends the command.

    \b
    Example:
      fusefs cat ~/volume backups/today.tar.zst | tar --zstd -x
    """
    refuse_if_mounted(volume)
    secret = passphrase(passphrase_file)

    async def work() -> None:
        async with unmounted_volume(volume, secret, "cat") as opened:
            for name in names:
                await _write_out(opened, name)

    run(work)


async def _write_out(volume: Volume, name: str) -> None:
    import trio

    fd = await volume.files.open(name, existing=True)
    try:
        size, offset = await volume.files.size_of(fd), 0
        with progress_bar(f"cat {name}", size, show=not out_is_terminal()) as advance:
            while offset < size:
                data = await volume.files.read_at(fd, offset, min(CHUNK, size - offset))
                await trio.to_thread.run_sync(write_bytes, data, abandon_on_cancel=True)
                offset += len(data)
                advance(offset, size)
    finally:
        with trio.CancelScope(shield=True):
            await volume.files.close(fd)


@click.command(short_help="Remove files, without mounting.")
@volume_argument
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@passphrase_option
def rm(volume: Path, names: tuple[str, ...], passphrase_file: Path | None) -> None:
    """Remove the files NAME... from VOLUME. What cannot be removed is said, and the others are removed all the same.

    Directories stay, empty ones too: mount the volume and use rmdir.

    \b
    Example:
      fusefs rm ~/volume backups/2024.tar.zst
    """
    refuse_if_mounted(volume)
    secret = passphrase(passphrase_file)

    async def work() -> None:
        failures: list[FusefsError] = []
        async with unmounted_volume(volume, secret, "rm") as opened:
            for name in names:
                try:
                    await opened.files.delete(name)
                except FusefsError as error:
                    failures.append(error)
            await opened.commit()
        for failure in failures[:-1]:
            say(str(failure))
        if failures:
            raise failures[-1]

    run(work)
