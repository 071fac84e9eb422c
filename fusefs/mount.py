"""Serving a volume at a mount point, from start to end.

    starting    mount point checked, a previous process waited for, volume open, mounted
    mounted     requests are answered; every commit_interval what was written becomes durable
    flushing    unmounted (by umount, fusermount3, or ourselves after a signal); everything goes to the hosts
    closing     the volume is let go

SIGTERM, SIGINT and SIGHUP unmount by a child process while we go on serving: the kernel first writes the dirty pages, to us. Leaving the
loop
instead would drop them. A second signal unmounts lazily; during the last flush a signal ends it (nothing is lost: it is all committed
here).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from fusefs.control import ControlServer, MountState, listen, remove_socket
from fusefs.control_client import ControlClient
from fusefs.kernel import MountCalls, raise_read_ahead
from fusefs.mountpoint import check_mountpoint, unmount_while_serving
from fusefs.mounts import encode_source, mount_at, mount_of_volume
from fusefs.operations import Operations
from fusefs.options import MountOptions
from fusefs.scratch import Scratch
from storage import ReadOnlySource, Volume, VolumeOptions, counted, open_read_only, open_volume
from storage.errors import Busy, FusefsError, NotFound, Unavailable

log = logging.getLogger(__name__)

#: Seconds to wait for the lock of a process that is about to end.
LOCK_SECONDS = 10.0
#: Requests answered at once. Writers that wait for room hold one each.
MAX_TASKS = 200
#: Tasks for requests that are kept while nothing is asked. To begin one and end it for each fsync of several writers costs a third of the
#: whole fsync; each keeps a buffer of a megabyte, of which only what it has received takes memory.
IDLE_TASKS = 10
#: Attempts at an unmount that finds the mount busy, and the seconds between: what we do in threads may hold it for a moment.
UNMOUNT_ATTEMPTS = 3
UNMOUNT_PAUSE = 0.2

#: Seconds between two notes while metadata come from hosts.
PROGRESS_SECONDS = 10.0
#: Seconds between attempts to make what was written durable on a full local disk, after the unmount.
LOCAL_RETRY_SECONDS = 3.0

Note = Callable[[str], None]


async def serve(
    volume_path: Path, mountpoint: Path, passphrase: str, options: MountOptions, ready: Callable[[], None], note: Note = log.info
) -> None:
    """Mount, call `ready` when programs can use it, serve until it is unmounted, flush, close.

    `note` gets lines for the person who mounts. With the option `ro` as `serve_read_only`. Raises kinds of storage.errors; then nothing
    stays mounted.
    """
    path = Path(os.path.abspath(volume_path))  # noqa: ASYNC240  no I/O but getcwd
    if options.read_only:
        await serve_read_only(ReadOnlySource(path, passphrase=passphrase), mountpoint, options, ready, note)
        return
    async with _alone() as control:
        await _serve(path, mountpoint, passphrase, options, ready, note, control)


async def serve_read_only(
    source: ReadOnlySource, mountpoint: Path, options: MountOptions, ready: Callable[[], None], note: Note = log.info
) -> None:
    """As `serve`, for reading only: from a volume's directory, beside whoever writes there, or from hosts (storage.open_read_only).

    Its control socket, and metadata from hosts, are in a private directory (fusefs/scratch.py), which is what the mount has as its source.
    """
    async with _alone() as control:
        await _serve_read_only(source, mountpoint, options, ready, note, control)


class Telling:
    """Says now and then how much of the metadata has come from hosts."""

    def __init__(self, note: Note, mountpoint: Path) -> None:
        self._note, self._mountpoint = note, mountpoint
        self._due = trio.current_time() + PROGRESS_SECONDS

    def progress(self, done: int, total: int) -> None:
        """Bytes so far, and in all as far as is known."""
        now = trio.current_time()
        if now >= self._due:
            self._due = now + PROGRESS_SECONDS
            self._note(f"{self._mountpoint}: {done >> 20} of {total >> 20} MiB of metadata read from the hosts")


@asynccontextmanager
async def _alone() -> AsyncIterator[trio.Nursery]:
    """A nursery for the control socket, ended with the block; what the block raises comes out as itself, not in a group."""
    try:
        async with trio.open_nursery() as control:
            yield control
            control.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        inner: BaseException = group
        while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
            inner = inner.exceptions[0]
        if isinstance(inner, FusefsError):
            raise inner from None
        raise inner from group


def volume_options(options: MountOptions, purpose: str) -> VolumeOptions:
    """What of a mount's options the volume is opened with."""
    settings: dict[str, float | None] = {}
    if options.cache_bytes is not None:
        settings["cache"] = options.cache_bytes
    if options.staging is not None:
        settings["staging"] = options.staging
    if options.flush_interval is not None:
        settings["flush_interval"] = options.flush_interval
    if options.repair_rate is not None:
        settings["repair_rate"] = options.repair_rate
    if options.upload_rate is not None:
        settings["upload_rate"] = options.upload_rate
    if options.away_grace is not None:
        settings["away_grace"] = options.away_grace
    if options.scrub_interval is not None:
        settings["scrub_interval"] = options.scrub_interval or None
    # commit_interval None: the commits are ours, after the kernel's dirty pages have come.
    return VolumeOptions(commit_interval=None, purpose=purpose, coprocesses=True, **settings)  # type: ignore[arg-type]


async def _serve(
    volume_path: Path,
    mountpoint: Path,
    passphrase: str,
    options: MountOptions,
    ready: Callable[[], None],
    note: Note,
    control: trio.Nursery,
) -> None:
    mountpoint = await trio.to_thread.run_sync(check_mountpoint, volume_path, mountpoint)
    await _wait_for_previous(volume_path, note)
    opened_with = volume_options(options, f"mounted on {mountpoint}")
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_volume(volume_path, passphrase=passphrase, wait_lock=LOCK_SECONDS, options=opened_with) as volume:
            # Whoever mounts is told of what is wrong from the start: hosts that cannot be used, and what cannot be read without them.
            for warning in dict.fromkeys([*volume.standing_warnings(), *volume.renewal.warnings()]):
                note(f"warning: {warning}")
            await _serve_open(volume, volume_path, mountpoint, options, ready, control, signals)
    log.info("%s: closed", volume_path)


async def _serve_read_only(
    source: ReadOnlySource, mountpoint: Path, options: MountOptions, ready: Callable[[], None], note: Note, control: trio.Nursery
) -> None:
    mountpoint = await trio.to_thread.run_sync(partial(check_mountpoint, source.path, mountpoint, beside=True))
    if source.path is not None:
        try:
            await _wait_for_previous(source.path, note)
        except Busy:
            pass  # mounted for writing, and stays so: what the hosts have is shown
    # The cache for writes is of no use, and there is nothing to commit.
    options = replace(options, read_only=True, writeback=False)
    opened_with = VolumeOptions(commit_interval=None, purpose=f"mounted read-only on {mountpoint}")
    if options.cache_bytes is not None:
        opened_with = replace(opened_with, cache=options.cache_bytes)
    scratch = await trio.to_thread.run_sync(Scratch.make)
    try:
        # Before signals are taken in hand: reading metadata from hosts can take long, and is simply broken off.
        told = Telling(note, mountpoint)
        async with open_read_only(source, scratch=scratch.path, options=opened_with, progress=told.progress) as volume:
            note(f"{mountpoint} shows {volume.view}")
            for warning in volume.standing_warnings():
                note(f"warning: {warning}")
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                await _serve_open(volume, scratch.path, mountpoint, options, ready, control, signals)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(scratch.remove)
    log.info("%s: closed", mountpoint)


async def _serve_open(
    volume: Volume,
    home: Path,
    mountpoint: Path,
    options: MountOptions,
    ready: Callable[[], None],
    control: trio.Nursery,
    signals: AsyncIterator[int],
) -> None:
    """An open volume, until it is unmounted and flushed. `home`: the directory for the control socket, and source of the mount."""
    state = MountState(volume, mountpoint, options.text())
    listener = listen(home)
    try:
        control.start_soon(ControlServer(state).run, listener)
        async with trio.open_nursery() as nursery:
            stopper = Stopper(state)
            nursery.start_soon(stopper.obey, signals)
            await _mounted(volume, home, state, options, ready)
            await stopper.last_flush(volume)
            nursery.cancel_scope.cancel()
    finally:
        # While the lock is ours: the next process makes a socket of its own by this name.
        remove_socket(home)
        state.phase = "closing"
        state.finished.set()


async def _wait_for_previous(volume: Path, note: Note) -> None:
    """If a process that was unmounted still flushes this volume, say so and wait for its end. Busy if it is still mounted."""

    def wait() -> None:
        try:
            with ControlClient.connect(volume) as client:
                status = client.status()
                other = mount_of_volume(volume)
                if other is not None or status.phase == "starting":
                    raise Busy(f"{volume} is in use by process {status.pid}, which has it mounted on {status.mountpoint}")
                # Not "mounted" by its own word: it may not have noticed yet, or a program may keep a file open after a lazy unmount.
                left = status.volume.pending_bytes + status.volume.logged_bytes + status.volume.staging.bytes
                note(
                    f"the previous mount of {volume} is not done yet: process {status.pid} has {counted(left, 'byte')} to bring to the "
                    "hosts; waiting for it"
                )
                try:
                    client.drain()
                except FusefsError as error:
                    note(f"the previous mount of {volume} could not bring everything to the hosts: {error}")
        except (NotFound, Unavailable, EOFError, ConnectionError):
            return  # nobody is there, or not any more; the lock tells for certain

    if (volume / "control.sock").exists():
        # A person may give up waiting.
        await trio.to_thread.run_sync(wait, abandon_on_cancel=True)


async def _mounted(volume: Volume, home: Path, state: MountState, options: MountOptions, ready: Callable[[], None]) -> None:
    """From mount(2) to the end of the loop. Whatever happens, nothing is mounted when it returns or raises."""
    kernel = MountCalls(state.mountpoint)
    operations = Operations(volume, options, kernel)
    state.open_handles = operations.handles.__len__
    state.write_back = lambda: operations.coherence.write_back(_log_refused)
    try:
        pyfuse3.init(operations, os.fspath(state.mountpoint), options.kernel_options(encode_source(home)))
    except (RuntimeError, OSError, UnicodeError) as error:
        raise Unavailable(f"{state.mountpoint} could not be mounted ({error}){_hint(options)}") from error
    try:
        async with trio.open_nursery() as nursery:
            operations.coherence.start(nursery)
            nursery.start_soon(_announce, state, ready)
            if not options.read_only:
                nursery.start_soon(_commits, volume, operations, options.commit_interval)
                volume.store.more_coming = operations.receiver.waiting
            volume.host_io.quick.more_coming = operations.receiver.waiting
            with operations.receiver.receiving():
                await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=MAX_TASKS)
            state.phase = "flushing"
            nursery.cancel_scope.cancel()
    finally:
        # Only takes away what is still ours: libfuse looks whether the kernel has closed the connection.
        pyfuse3.close(unmount=True)
    log.info("%s: unmounted", state.mountpoint)


def _hint(options: MountOptions) -> str:
    """The usual reasons for which fusermount3 refuses; what it says itself goes to standard error."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "; /dev/fuse is not open to this user: root can chmod 666 it"
    if options.others_allowed and os.geteuid() != 0:
        return "; -o allow_other needs user_allow_other in /etc/fuse.conf"
    if os.geteuid() != 0:
        return "; is the package fuse3 installed, and the mount point yours?"
    return ""


def _log_refused(error: OSError) -> None:
    log.error("the kernel could not write back all that programs wrote: %s", error)


async def _announce(state: MountState, ready: Callable[[], None]) -> None:
    """Once the kernel gets an answer from us the mount is usable."""

    def look() -> str:
        os.statvfs(state.mountpoint)
        # Whoever comes first begins at the root, and most begin with looking for names: what is done for the first time takes several times
        # as long, so it is done here. No more than one reply, however many entries there are. What is damaged is for others to meet.
        with suppress(OSError), os.scandir(state.mountpoint) as entries:
            next(entries, None)
        mount = mount_at(state.mountpoint)
        return mount.device if mount is not None else ""

    device = await trio.to_thread.run_sync(look)
    if device and os.geteuid() == 0:
        await trio.to_thread.run_sync(raise_read_ahead, device)
    state.phase = "mounted"
    log.info("%s: mounted on %s", state.volume.path, state.mountpoint)
    ready()


async def _commits(volume: Volume, operations: Operations, interval: float) -> None:
    """Every `interval` seconds: the kernel's dirty pages come, then everything is committed."""
    while True:
        await volume.seams.clock.sleep(interval)
        await operations.coherence.periodic(_log_refused)
        try:
            await volume.commit()
        except FusefsError as error:
            log.error("what was written lately is not durable yet: %s", error)


class Stopper:
    """What signals and `fusefs umount` ask for."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._flush_scope = trio.CancelScope()
        state.unmount = self.unmount

    async def unmount(self) -> None:
        """Unmount while serving; returns once the kernel has. Busy."""
        await self._unmount(lazy=False)

    async def _unmount(self, *, lazy: bool) -> None:
        for attempt in range(1, UNMOUNT_ATTEMPTS + 1):
            try:
                await unmount_while_serving(self._state.mountpoint, lazy)
            except Busy:
                if attempt == UNMOUNT_ATTEMPTS:
                    raise
                await trio.sleep(UNMOUNT_PAUSE)
            else:
                return

    async def obey(self, signals: AsyncIterator[int]) -> None:
        """Handle signals until cancelled. `signals` is trio's receiver."""
        count = 0
        async for number in signals:
            count += 1
            name = signal.Signals(number).name
            if self._state.phase not in ("starting", "mounted"):
                log.warning("%s: the last flush is broken off; what is not on the hosts yet is kept in %s", name, self._state.volume.path)
                self._flush_scope.cancel()
                continue
            lazy = count > 1
            log.info("%s: unmounting %s%s", name, self._state.mountpoint, " as soon as nobody uses it" if lazy else "")
            try:
                await self._unmount(lazy=lazy)
            except FusefsError as error:
                log.error("%s; a second signal unmounts as soon as nobody uses it", error)

    async def last_flush(self, volume: Volume) -> None:
        """After the unmount: everything to the hosts, or as far as they answer, or until a signal."""
        state = self._state
        state.phase = "flushing"
        with self._flush_scope:
            while True:
                try:
                    report = await volume.flush(state.final_progress)
                except FusefsError as error:
                    status = await volume.status()
                    if status.local_error and not status.read_only:
                        # Not even safe on this machine: to end now would lose it.
                        log.error("%s: not durable yet: %s; free some space; trying again", volume.path, error)
                        await volume.seams.clock.sleep(LOCAL_RETRY_SECONDS)
                        continue
                    state.final_error = error
                    log.error(
                        "not everything could be brought to the hosts: %s; it is kept in %s and goes there after the next mount",
                        error,
                        volume.path,
                    )
                else:
                    state.final_report = report
                    if told := str(report):
                        log.warning("%s", told)
                break
        if self._flush_scope.cancelled_caught:
            state.final_error = Unavailable(f"the flush was broken off; what is not on the hosts yet is kept in {volume.path}")
