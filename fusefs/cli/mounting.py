"""`fusefs mount`, `umount` and `flush`."""

from __future__ import annotations

import os
import select
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import click

from fusefs.cli import live
from fusefs.cli.arguments import DIRECTORY_PATH, passphrase_option
from fusefs.cli.output import progress_bar, say
from fusefs.cli.passphrase import PHRASE_ENVIRONMENT, passphrase, recovery_phrase
from fusefs.cli.session import tell_degraded
from fusefs.cli.startup import importing
from fusefs.mountpoint import check_mountpoint, unmount
from fusefs.mounts import Mount, mount_at, mount_of_volume
from fusefs.options import MountOptions
from storage.errors import BadArgument, FusefsError, NoSpace, NotFound, Unavailable

if TYPE_CHECKING:
    from storage import FlushReport

#: Seconds a process that has let go of the volume may take to end.
EXIT_SECONDS = 60.0
#: Seconds after the unmount before a process that has nothing more to send is wondered about.
ELSEWHERE_SECONDS = 5.0


@click.command(short_help="Mount a volume on a directory.")
@click.argument("volume", type=DIRECTORY_PATH, metavar="VOLUME")
# None if only one is given: with --host that is the mount point.
@click.argument("mountpoint", type=DIRECTORY_PATH, required=False, metavar="MOUNTPOINT")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground, log to standard error; Ctrl-C unmounts.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, separated by commas; see docs/commands.md.")
@click.option("--log", type=click.Path(path_type=Path), metavar="FILE", help="Append the log to FILE instead of sending it to syslog.")
@click.option("--read-only", is_flag=True, help="Change nothing, here or on hosts; disturb no writer. As -o ro.")
@click.option("--repair-rate", default=None, metavar="SIZE", help="Send at most so much a second to make copies again, as in 10M.")
@click.option("--upload-rate", default=None, metavar="SIZE", help="Send at most so much a second to hosts, all in all, as in 2M.")
@click.option(
    "--host", "hosts", multiple=True, metavar="URL", help="With --read-only, instead of VOLUME: a host that holds the volume; repeat."
)
@click.option("--volume", "volume_id", default="", metavar="ID", help="With --host: which volume, where hosts hold several.")
@click.option("--superblock", default="", metavar="NAME", help="With --host: which generation or history, where somebody has to choose.")
@click.option("--phrase", "by_phrase", is_flag=True, help="With --host: use the 24 words: asked for, or in FUSEFS_PHRASE.")
@click.option("--phrase-file", type=click.Path(path_type=Path), metavar="FILE", help="With --host: the 24 words, first line of FILE.")
@passphrase_option
def mount(
    volume: Path,
    mountpoint: Path | None,
    foreground: bool,
    options: tuple[str, ...],
    log: Path | None,
    read_only: bool,
    repair_rate: str | None,
    upload_rate: str | None,
    hosts: tuple[str, ...],
    volume_id: str,
    superblock: str,
    by_phrase: bool,
    phrase_file: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Mount VOLUME on the empty directory MOUNTPOINT. Returns when it can be used; a process in the background serves it.

    \b
    Examples:
      fusefs mount ~/volume ~/mnt
      fusefs mount ~/volume ~/mnt -o link=deny,cache=512M --log ~/fusefs.log
      fusefs mount -f ~/volume ~/mnt
      fusefs mount --read-only ~/volume ~/mnt
      fusefs mount --read-only --host dir:/mnt/disk1 ~/mnt
    """
    # What is wrong with the arguments is said before anybody is asked for a passphrase.
    if read_only:
        options = (*options, "ro")
    if repair_rate is not None:
        options = (*options, f"repair_rate={repair_rate}")
    if upload_rate is not None:
        options = (*options, f"upload_rate={upload_rate}")
    parsed = MountOptions.parse(options)
    with importing():
        from fusefs.daemon import setup_logging, start_from
        from storage import ReadOnlySource, load_config
    if hosts:
        if mountpoint is not None:
            raise click.UsageError("--host takes the place of VOLUME: give only MOUNTPOINT besides.")
        if not parsed.read_only:
            raise click.UsageError("--host is for --read-only; for writing, make a volume's directory with fusefs recover.")
        mountpoint = check_mountpoint(None, volume)
        if by_phrase or phrase_file is not None or (passphrase_file is None and PHRASE_ENVIRONMENT in os.environ):
            source = ReadOnlySource(None, hosts, volume_id, phrase=recovery_phrase(phrase_file), superblock=superblock)
        else:
            source = ReadOnlySource(None, hosts, volume_id, passphrase(passphrase_file), superblock=superblock)
    else:
        if mountpoint is None:
            raise click.UsageError("Missing argument 'MOUNTPOINT'.")
        if volume_id or superblock or by_phrase or phrase_file is not None:
            raise click.UsageError("--volume, --superblock, --phrase and --phrase-file go with --host.")
        load_config(volume)
        check_mountpoint(volume, mountpoint, beside=parsed.read_only)
        source = ReadOnlySource(volume, passphrase=passphrase(passphrase_file))
    if not foreground:
        start_from(source, mountpoint, options, log, say)
        return
    with importing():
        from fusefs.serving import run
    setup_logging(True, log, parsed.debug)
    # It handles the signals itself: it unmounts while it goes on serving.
    run(source, mountpoint, parsed, _nothing, say)


def _nothing() -> None:
    return


@click.command(short_help="Send everything to the hosts and unmount.")
@click.argument("mountpoint", type=DIRECTORY_PATH)
def umount(mountpoint: Path) -> None:
    """Send everything to the hosts, unmount MOUNTPOINT, and return when its process is gone.

    Where a host is away, says what has fewer copies than it should. Plain umount(8) and fusermount3 -u lose nothing either, but
    return before it is done.

    \b
    Example:
      fusefs umount ~/mnt
    """
    mount = mount_at(mountpoint)
    if mount is None:
        # Already unmounted by umount(8), and not done: wait for it all the same, if the volume was named.
        if not live.is_served(mountpoint):
            raise NotFound(f"nothing of fusefs is mounted at {mountpoint}")
        _refuse_mounted_volume(mountpoint)
        _wait(mountpoint)
        return
    if not live.is_served(mount.volume):
        if mount_at(mountpoint) is not None:
            unmount(mount.mountpoint, lazy=True)
        say(f"{mountpoint} was a dead mount: its process had ended; what it had committed is there at the next mount")
        return
    flushed: FlushReport | None = None
    failure: FusefsError | None = None
    try:
        # While it is still mounted, so that most of the waiting can be broken off without consequences.
        flushed = _flush(mount.volume)
    except FusefsError as error:
        with live.client(mount.volume) as client:
            now = client.status().volume
        # Where the journal failed for good, staying mounted would save nothing.
        if now.local_error and not now.read_only:
            # Hosts that stay away are no reason to stay mounted: what was written is in the journal. This is.
            raise NoSpace(
                f"{mountpoint} stays mounted: what was written is not durable ({now.local_error}); free some space, then again"
            ) from error
        # Fenced, the process says so once more, at its end.
        failure = None if now.fenced else error
    try:
        report = _stop(mount) or flushed
    except (NoSpace, Unavailable) as error:
        if mount_at(mountpoint) is not None:
            raise
        what = f"{mountpoint} is unmounted; what is not on its hosts yet is kept in {mount.volume}, and goes there after the next mount"
        raise type(error)(f"{what}: {error}") from error
    if failure is not None and report is not None and not report.degraded_sectors and not report.reasons:
        failure = None  # the last flush went well
    if failure is not None:
        say(f"warning: {failure}")
    _tell(report, mount.volume)


def _refuse_mounted_volume(volume: Path) -> None:
    """BadArgument if it is mounted: its process ends when somebody unmounts it, and waiting for that would be waiting for ever."""
    mount = mount_of_volume(volume)
    if mount is None:
        return
    with live.client(volume) as client:
        phase = client.status().phase
    # Else what is mounted is a read-only view beside a process that has unmounted, and is waited for.
    if phase in ("starting", "mounted"):
        raise BadArgument(f"{volume} is a volume, mounted at {mount.mountpoint}: fusefs umount {shlex.quote(str(mount.mountpoint))}")


def _stop(mount: Mount) -> FlushReport | None:
    """Unmount and wait for the process to end. Returns the report of its last flush, None if it was gone before it could tell."""
    with live.client(mount.volume) as client, _ending(client.status().pid), progress_bar("to the hosts") as advance:
        reports: list[FlushReport | None] = []
        failures: list[BaseException] = []

        def drain() -> None:
            try:
                reports.append(client.drain(advance))
            except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
                failures.append(error)

        # Asked before the unmount, in a thread: right after it the process may have nothing left to do, and be gone.
        waiting = Thread(target=drain, daemon=True)
        waiting.start()
        unmount(mount.mountpoint)
        waiting.join(ELSEWHERE_SECONDS)
        if waiting.is_alive():
            _tell_elsewhere(mount)
            waiting.join()  # No limit: a person is told what is waited for, and may break it off; the process goes on by itself.
        if failures:
            raise failures[0]
        return reports[0]


def _tell_elsewhere(mount: Mount) -> None:
    """Unmounted here, everything sent, and still served: the kernel keeps a filesystem as long as any mount namespace has it."""
    try:
        with live.client(mount.volume) as other:
            now = other.status().volume
            pending = now.pending_bytes or now.logged_bytes or now.staging.sectors
    except FusefsError:
        return  # gone by now
    if not pending:
        say(
            f"{mount.mountpoint} is unmounted here and everything is on its hosts; another mount namespace (a container, a service) "
            "still has it mounted, and its process goes on until that lets go"
        )


@contextmanager
def _ending(pid: int) -> Iterator[None]:
    """Returns, after the body, once the process is gone. A descriptor, not a number, which might become another process's."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        # Gone already, or of another pid namespace: its letting go of the volume, which the body waits for, has to do.
        yield
        return
    try:
        yield
        select.select([process], [], [], EXIT_SECONDS)
    finally:
        os.close(process)


def _wait(volume: Path) -> None:
    """For a process that was unmounted by others and is not done."""
    with live.client(volume) as client, _ending(client.status().pid), progress_bar("to the hosts") as advance:
        report = client.drain(advance)
    _tell(report, volume)


def _tell(report: FlushReport | None, volume: Path) -> None:
    if report is None:
        raise Unavailable(f"the process that had {volume} mounted ended early; what it had committed is there at the next mount")
    tell_degraded(report)


@click.command(short_help="Send everything to the hosts; stay mounted.")
@click.argument("mountpoint", type=DIRECTORY_PATH)
def flush(mountpoint: Path) -> None:
    """Send everything written so far to the hosts; MOUNTPOINT stays mounted.

    Where a host is away, says what has fewer copies than it should.

    \b
    Example:
      fusefs flush ~/mnt
    """
    tell_degraded(_flush(live.mount_for(mountpoint).volume))


def _flush(volume: Path) -> FlushReport:
    with live.client(volume) as client, progress_bar("to the hosts") as advance:
        return client.flush(advance)
