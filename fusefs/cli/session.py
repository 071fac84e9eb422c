"""Running a command's asynchronous part: signals, errors, and a volume that nobody has mounted."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusefs.cli.output import progress_bar, say
from fusefs.cli.startup import importing
from storage.errors import FusefsError

if TYPE_CHECKING:
    import trio

    from storage import FlushReport, Volume

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal ended the command, after it had closed what it had opened."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number


def run(work: Callable[[], Awaitable[T]]) -> T:
    """`trio.run`, ended by SIGINT, SIGTERM and SIGHUP as by cancellation: volumes are closed, half-made files removed.

    A second signal ends the process the hard way; what was acknowledged survives that too. Raises Interrupted, and what `work` raises.
    """
    with importing():
        import trio

        # What nearly all work needs, while nothing has to be closed yet.
        from storage import open_volume  # noqa: F401
    return trio.run(_supervised, work)


async def _supervised(work: Callable[[], Awaitable[T]]) -> T:
    import trio

    results: list[T] = []
    received: list[int] = []

    async def watch(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                nursery.cancel_scope.cancel()
                return

    async with trio.open_nursery() as nursery:
        # Before the work, which must not meet a signal that nobody receives.
        await nursery.start(watch)
        results.append(await work())
        nursery.cancel_scope.cancel()
    if results:
        return results[0]
    # No result and no exception: the scope was cancelled, and only `watch` does that.
    raise Interrupted(received[0])


def leaves(error: BaseException) -> list[BaseException]:
    """trio reports what happened in a nursery as a group, even of one: the exceptions themselves."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


@asynccontextmanager
async def unmounted_volume(path: Path, passphrase: str, command: str, upload_rate: float | None = None) -> AsyncIterator[Volume]:
    """The volume, open in this process; what was changed is committed at the end. `command`: for whom else wants it meanwhile.
    `upload_rate`: bytes per second that may be sent to hosts; None: no limit."""
    from storage import VolumeOptions, open_volume

    options = VolumeOptions(purpose=f"fusefs {command}", upload_rate=upload_rate, scrub_interval=None)
    async with open_volume(path, passphrase=passphrase, options=options) as volume:
        yield volume


async def flush_with_bar(volume: Volume) -> None:
    """Flush to the hosts, with a bar.

    What is not there in full afterwards is said, not raised: it is committed, so safe on this machine, and the next use goes on with it.
    """
    from storage import FlushProgress

    progress = FlushProgress()
    try:
        report = await with_bar("to the hosts", partial(volume.flush, progress), lambda: (progress.bytes_done, progress.bytes_total))
    except FusefsError as error:
        say(f"warning: kept on this machine, and sent to the hosts when the volume is used next: {error}")
    else:
        tell_degraded(report)


async def with_bar(label: str, work: Callable[[], Awaitable[T]], progress: Callable[[], tuple[int, int]], *, unit: str = "") -> T:
    """Do it, with a bar meanwhile. `progress`: what is done, and what there is in all, 0 where nobody knows; `unit`: as of `progress_bar`.
    Raises what `work` raises."""

    import trio

    async def follow() -> None:
        while True:
            done, total = progress()
            advance(done, total or None)
            await trio.sleep(0.1)

    outcome: T | FusefsError
    with progress_bar(label, unit=unit) as advance:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            try:
                outcome = await work()
            except FusefsError as error:
                outcome = error  # raised outside of the nursery, which would wrap it
            nursery.cancel_scope.cancel()
    if isinstance(outcome, FusefsError):
        raise outcome
    return outcome


def tell_degraded(report: FlushReport) -> None:
    """Say what a flush could not bring to full replication."""
    if told := str(report):
        say(f"warning: {told}")
