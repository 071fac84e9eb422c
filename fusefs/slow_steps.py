"""Steps of tasks that keep the event loop to themselves for too long: with the mount option `debug`, each is a line in the log.

While one task runs no request is answered. A step is measured in CPU time of the event loop's thread: what it computes, not how long it was
kept waiting by other processes, or by other threads for the interpreter's lock. (So the flush of a small commit on the event loop does not
count, which storage/metadata/flushing.py keeps short.)
"""

from __future__ import annotations

import gc
import logging
from time import thread_time

import trio

from fusefs.receiver import Receiver

log = logging.getLogger(__name__)

#: Seconds of CPU time that a step may take.
LIMIT = 0.001


class SlowSteps(trio.abc.Instrument):
    """Give it to `trio.run` as an instrument."""

    def __init__(self) -> None:
        self._begun = 0.0
        #: Seconds of this step in which the collector of cycles ran.
        self._collecting = 0.0
        #: Steps above LIMIT.
        self.count = 0

    def before_run(self) -> None:
        gc.callbacks.append(self._collected)
        Receiver.listeners.append(self._rested)

    def after_run(self) -> None:
        gc.callbacks.remove(self._collected)
        Receiver.listeners.remove(self._rested)

    def _rested(self) -> None:
        """Nobody had to wait for the rest of the step: another begins."""
        task = trio.lowlevel.current_task()
        self.after_task_step(task)
        self.before_task_step(task)

    def _collected(self, phase: str, _info: object) -> None:
        self._collecting += thread_time() * (1 if phase == "stop" else -1)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self._collecting = 0.0
        self._begun = thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = thread_time() - self._begun
        if took > LIMIT:
            self.count += 1
            # Where it stands after the step: what took so long came right before.
            cycles = f" ({self._collecting * 1000:.1f} of them the collector of cycles)" if self._collecting > LIMIT / 4 else ""
            log.warning("slow step: %s kept the event loop for %.1f ms of CPU time%s, %s", task.name, took * 1000, cycles, _place(task))


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
