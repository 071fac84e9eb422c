"""Receiving requests with few system calls and task switches: what pyfuse3's main loop waits with.

pyfuse3 has a task for each request under way, and one more, whose turn it is to wait for the next. With trio's own lock and `wait_readable`
each request costs two passes of the scheduler, an epoll_ctl, two epoll_waits (each of them lets go of the interpreter's lock and takes it
back), and hands the turn to another task. Here, while requests keep coming:

    the turn        stays with the task that has it as long as its handlers answer without waiting. A handler that waits passes it on
                    (`guard`, which sees the first step of each handler), and so does a task that ends.
    readiness       is looked at with one poll(2). After an answer the next request of the same program is some microseconds away, so it is
                    looked for during SPIN seconds before the task goes to sleep: to be woken costs both sides more than that.
    the scheduler   gets its pass after BURST seconds at the latest, so that timers, threads' results and other tasks are not kept
                    waiting; but not where nobody else has anything to do: then the task sleeps right here, in one poll(2) for the next
                    request and for all that trio waits for.
    afterwards      what a handler leaves to be done once its answer is sent (the next page of a listing) is done before the next request
                    is looked for.

pyfuse3 takes these from its module's attribute `trio`, which exists to be replaced (pyfuse3.asyncio does). `Receiver` stands in for
the part of trio it uses.

Measured with the null filesystem of scripts/benchmarks on two cores: docs/performance.md.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, ClassVar, cast

import pyfuse3
import trio

from fusefs.awake import QUIET, Awake

#: Seconds of requests one after the other until trio's scheduler gets a pass. Shorter than what one step of a task may take (1 ms).
BURST = 0.0003
#: Seconds in which the next request is looked for before the task sleeps. A program's next system call comes 5 to 15 us after its answer.
SPIN = 0.00002
#: Seconds after which the task that sleeps for the next request lets the scheduler have its pass, whatever there is.
REST = 0.02


def events_of_trio() -> int | None:
    """The descriptor that is readable when something has come that trio waits for, threads' results included. None where it is not found.

    trio keeps it to itself, so that another version may have none; then every request that has to be waited for takes a pass.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT
    except ImportError:
        return None
    events = getattr(getattr(getattr(GLOBAL_RUN_CONTEXT, "runner", None), "io_manager", None), "_epoll", None)
    return events.fileno() if isinstance(events, select.epoll) else None


def deadlines_of_trio() -> Callable[[], float]:
    """Seconds until some task of trio's is to be woken by a deadline: as `trio.lowlevel.current_statistics` says, which counts all else for
    that (2 us instead of 0.6). Where a version of trio keeps deadlines elsewhere, that has to do."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        next_deadline, now = GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline, GLOBAL_RUN_CONTEXT.runner.clock.current_time
    except (ImportError, AttributeError):
        return lambda: trio.lowlevel.current_statistics().seconds_to_next_deadline
    return lambda: next_deadline() - now()


class _Ready:
    """Awaited, it is there at once: no checkpoint."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        # One for all: it has nothing to give, and does not change.
        return _NOTHING


_NOTHING = cast("Generator[Any, Any, None]", iter(()))
_READY = _Ready()


class Turn:
    """Whose turn it is to wait for a request. Stands in for `trio.Lock`.

    Unlike a lock it is not handed to the next in line when it is free: whoever comes first takes it, and `pass_on` wakes one of those who
    wait. Invariant: while tasks wait for it, one has it, or runs (and so comes back, waits, or ends: `pass_on`).
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[trio.lowlevel.Task] = deque()

    def __aenter__(self) -> Awaitable[None]:
        if not self._taken:
            self._taken = True
            return _READY
        return self._wait()

    def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> Awaitable[None]:
        self._taken = False
        if kind is not None:
            self.pass_on()
        return _READY

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()

        def leave(_: Callable[[], object]) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        while self._taken:
            self._waiting.append(task)
            # Ends with the mount: whoever has the turn comes back, waits in a handler, or ends, and each of these passes it on.
            await trio.lowlevel.wait_task_rescheduled(leave)
        self._taken = True

    def pass_on(self) -> None:
        """The task that had the turn is about to wait for something else, or to end. Nothing happens where somebody has it already."""
        if not self._taken and self._waiting:
            trio.lowlevel.reschedule(self._waiting.popleft())


class _Nursery:
    """Of pyfuse3's tasks: one that ends passes its turn on."""

    def __init__(self, nursery: trio.Nursery, turn: Turn) -> None:
        self._nursery, self._turn = nursery, turn

    def start_soon(self, run: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None:
        async def whole() -> None:
            try:
                await run(*args)
            finally:
                self._turn.pass_on()

        self._nursery.start_soon(whole, name=name)


class _Runnable(trio.abc.Instrument):
    """The tasks that could run now. trio's own count leaves out those of the round that is under way."""

    def __init__(self) -> None:
        self.tasks: set[trio.lowlevel.Task] = set()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.tasks.discard(task)


class Receiver:
    """One for each mount. `received` around `pyfuse3.main`."""

    ClosedResourceError = trio.ClosedResourceError
    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    #: The handler begun last: for fusefs/slow_steps.py, as pyfuse3's tasks show no frames. A process has one mount.
    last_handler: ClassVar[str] = ""
    #: To be told, with True, when a task is about to sleep without a pass of the scheduler, because nobody else has anything to do, and
    #: with False when it woke: for fusefs/slow_steps.py, too.
    listeners: ClassVar[list[Callable[[bool], object]]] = []

    def __init__(self, awake: Awake | None = None) -> None:
        self.awake = Awake() if awake is None else awake
        self._turn = Turn()
        #: What pyfuse3 looks for in `trio.lowlevel` is here as well.
        self.lowlevel = self
        #: Call it when a handler is about to wait.
        self.pass_on = self._turn.pass_on
        self._poll: Callable[[float], list[tuple[int, int]]] | None = None
        #: As `_poll`, also of what trio waits for.
        self._either: Callable[[float], list[tuple[int, int]]] | None = None
        self._deadline: Callable[[], float] = lambda: 0.0
        self._runnable = _Runnable()
        self._until = 0.0
        self._afterwards: Callable[[], None] | None = None
        # With one core, whoever is to send the next request cannot run while it is looked for.
        self._spin = SPIN if len(os.sched_getaffinity(0)) > 1 else 0.0

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """pyfuse3's main loop waits as the module says."""
        module: Any = pyfuse3
        module.trio = self
        trio.lowlevel.add_instrument(self._runnable)
        try:
            with self.awake.opened():
                yield
        finally:
            trio.lowlevel.remove_instrument(self._runnable)
            module.trio = trio

    def waiting(self) -> bool:
        """Has a request come that nobody has received yet?"""
        return self._poll is not None and bool(self._poll(0))

    def afterwards(self, work: Callable[[], None]) -> None:
        """For a handler: to be done once its answer has been sent, before the next request is looked for, while kernel and program are busy
        with the answer. `work` does not raise, takes less than a step may, and may be left undone: of two the later replaces the first."""
        self._afterwards = work

    # ---- what pyfuse3 looks for in its `trio`

    def Lock(self) -> Turn:
        return self._turn

    def open_nursery(self) -> AbstractAsyncContextManager[_Nursery]:
        return self._open_nursery()

    @asynccontextmanager
    async def _open_nursery(self) -> Any:
        async with trio.open_nursery() as beside:
            beside.start_soon(self.awake.watch)
            async with trio.open_nursery() as nursery:
                yield _Nursery(nursery, self._turn)
            beside.cancel_scope.cancel()

    def wait_readable(self, fd: int) -> Awaitable[None]:
        work = self._afterwards
        if work is not None:
            self._afterwards = None
            work()
        poll = self._poll
        if poll is not None:
            now = perf_counter()
            if now < self._until:
                # Also where the connection has ended, which receiving then tells.
                if poll(0):
                    return _READY
                end = now + self._spin
                while perf_counter() < end:
                    if poll(0):
                        return _READY
            if self._rest(fd):
                return _READY
        return self._sleep(fd)

    def _rest(self, fd: int) -> bool:
        """Sleep right here for as long as nobody else has anything to do: a pass of the scheduler takes as long as a request.

        True: the next request has come, and nothing else; a burst begins."""
        if self._either is None or self._runnable.tasks:
            return False
        limit = min(REST, self._deadline())
        if limit < 0.001:
            return False
        for listener in self.listeners:
            listener(True)
        held = self.awake.held
        came = self._either((min(limit, QUIET) if held else limit) * 1000)
        for listener in self.listeners:
            listener(False)
        if held and not came:
            self.awake.release()
        if len(came) != 1 or came[0][0] != fd:
            return False
        self._until = perf_counter() + BURST
        return True

    async def _sleep(self, fd: int) -> None:
        """A pass of the scheduler, at least."""
        if self._poll is None:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            self._poll = poll.poll
            events = events_of_trio()
            if events is not None:
                either = select.poll()
                either.register(fd, select.POLLIN)
                either.register(events, select.POLLIN)
                self._either = either.poll
                self._deadline = deadlines_of_trio()
        await trio.lowlevel.wait_readable(fd)
        self._until = perf_counter() + BURST
