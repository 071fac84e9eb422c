"""Steps of tasks that keep the event loop to themselves for too long: with the mount option `debug`, each is a line in the log.

While one task runs no request is answered. Two kinds of lines:

    slow step       computed for more than LIMIT. Measured in CPU time of the event loop's thread: not how long it was kept waiting by other
                    processes, or by other threads for the interpreter's lock
    waiting step    was there for more than WAITED longer than it computed: it waited for a disk in a system call, for the interpreter's
                    lock, or for a core. Which of them cannot be seen, so that on a busy machine there are some that are nobody's fault.
                    (What the event loop waits for on purpose, storage/metadata/flushing.py keeps shorter than that.)

and one at the end, which says how many there were of how many. A step costs two looks at each of two clocks, and nothing without `debug`.
"""

from __future__ import annotations

import gc
import logging
from time import perf_counter, thread_time

import trio

from fusefs.receiver import Receiver

log = logging.getLogger(__name__)

#: Seconds of CPU time that a step may take.
LIMIT = 0.001
#: Seconds that a step may be kept waiting without a line. Longer than a process that shares the core gets it for (3 ms by default).
WAITED = 0.005


class SlowSteps(trio.abc.Instrument):
    """Give it to `trio.run` as an instrument."""

    def __init__(self) -> None:
        self._begun = self._begun_at = 0.0
        #: Seconds of this step in which the collector of cycles ran.
        self._collecting = 0.0
        #: All steps, and their seconds of CPU time.
        self.steps, self.seconds = 0, 0.0
        #: Those above LIMIT.
        self.count, self.slow_seconds = 0, 0.0
        #: Those that waited for more than WAITED.
        self.waiting = 0

    def before_run(self) -> None:
        gc.callbacks.append(self._collected)
        Receiver.listeners.append(self._rests)

    def after_run(self) -> None:
        gc.callbacks.remove(self._collected)
        Receiver.listeners.remove(self._rests)
        log.info(
            "the event loop took %d steps, %.3f s of CPU time; %d of them more than %g ms, %.3f s; %d waited for more than %g ms",
            *(self.steps, self.seconds, self.count, LIMIT * 1000, self.slow_seconds, self.waiting, WAITED * 1000),
        )

    def _rests(self, asleep: bool) -> None:
        """A task sleeps within its step, because nobody else has anything to do: that ends one, and waking begins another."""
        task = trio.lowlevel.current_task()
        if asleep:
            self.after_task_step(task)
        else:
            self.before_task_step(task)

    def _collected(self, phase: str, _info: object) -> None:
        self._collecting += thread_time() * (1 if phase == "stop" else -1)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self._collecting = 0.0
        self._begun_at = perf_counter()
        self._begun = thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = thread_time() - self._begun
        waited = perf_counter() - self._begun_at - took
        self.steps += 1
        self.seconds += took
        if took > LIMIT:
            self.count += 1
            self.slow_seconds += took
            # Where it stands after the step: what took so long came right before.
            cycles = f" ({self._collecting * 1000:.1f} of them the collector of cycles)" if self._collecting > LIMIT / 4 else ""
            log.warning("slow step: %s kept the event loop for %.1f ms of CPU time%s, %s", task.name, took * 1000, cycles, _place(task))
        if waited > WAITED:
            self.waiting += 1
            of = ((took + waited) * 1000, took * 1000)
            log.info("waiting step: %s kept the event loop for %.1f ms, of which %.1f of CPU time, %s", task.name, *of, _place(task))


def _place(task: trio.lowlevel.Task) -> str:
    """The innermost function of ours in which the task waits now."""
    if task.name.startswith("pyfuse-"):
        return f"after the handler of {Receiver.last_handler}"
    place = "until its end"
    for frame, line in task.iter_await_frames():
        module = frame.f_globals.get("__name__", "?")
        if module.split(".")[0] in ("fusefs", "storage"):
            place = f"until {module}.{frame.f_code.co_name}:{line}"
    return place
