"""This process's side: starts a coprocess, asks it, and notices when it is gone. For threads; on the event loop only what says so."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from time import monotonic

from storage.coprocess.arena import Arena
from storage.coprocess.asked import Asked, Gone
from storage.coprocess.process import Process
from storage.coprocess.wire import MOST, Done, Ping, Request, encode

log = logging.getLogger("fusefs.coprocess")

#: Bytes from which on it is worth asking: for less, asking takes as long as doing it.
LEAST = 256 * 1024
#: Seconds in which it seals or opens a sector, or says that it is well, however busy the machine is.
TIMEOUT = 30
#: Seconds until another is started, where one has died or could not be started: twice as many each time, up to an hour.
PAUSE, PAUSE_MOST = 30.0, 3600.0


#: This process is short of something.
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Coprocess:
    """See the package. What each kind is asked for: `sealer` and `disks`."""

    #: What it is called, for ps(1), and what it does, for messages.
    name: str
    work: str

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        #: False: everything is done here. With one core there is nothing to be gained.
        self.wanted = several_cores()
        #: Guards what follows.
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._not_before = 0.0
        self._pause = 0.0
        #: Killed, and perhaps not ended yet; with what may not be lent again until they are.
        self._ending: list[tuple[Process, object]] = []

    # ---- its life

    @property
    def there(self) -> bool:
        """Can it be asked now? Also for the event loop: nothing here waits."""
        process = self._process
        if not self.wanted or process is None:
            return False
        if not process.ready and self._lock.acquire(blocking=False):
            try:
                if self._process is process and process.look():
                    self._pause = 0.0
            except OSError as error:
                # Whoever starts it anew says so.
                log.debug("%s", error)
            finally:
                self._lock.release()
        return process.ready

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        process = self._process
        return None if process is None else process.popen.pid

    def start(self) -> bool:
        """Start it, unless it is there; until it says that it is, what is to be done is done here. Does not wait for it. True: it is."""
        if self.there:
            return True
        if not self.wanted or monotonic() < self._not_before:
            return False
        with self._lock:
            if self._process is None:
                self._start()
                return False
            try:
                if self._process.look():
                    self._pause = 0.0
                return self._process.ready
            except OSError as error:
                self._end(self._process, str(error))
                return False

    def _start(self) -> None:
        """With the lock."""
        self._ending = [each for each in self._ending if not each[0].ended()]
        memory = self.arena.file
        if memory is None or not sys.executable or hasattr(sys, "frozen"):
            self.wanted = False
            return
        try:
            self._process = Process(self.name, memory)
        except (OSError, ValueError) as error:
            self._put_off()
            log.warning("no process that %s can be started (%s): threads do it", self.work, error)

    def _put_off(self) -> None:
        self._pause = min(2 * self._pause or PAUSE, PAUSE_MOST)
        self._not_before = monotonic() + self._pause

    def _end(self, process: Process, why: str) -> None:
        """With the lock: it is of no use any more. Nothing happens where that is known."""
        if self._process is not process:
            return
        self._process = None
        self._put_off()
        process.close()
        self._ending.append((process, None))
        said = process.last_words()
        log.warning(
            "the process that %s is gone (%s%s): threads do it, and another is started in %.0f s",
            self.work,
            why,
            f": {said}" if said else "",
            self._pause,
        )

    def close(self) -> None:
        """It ends; it is started again when it is wanted."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.close()
            # Killed, it ends at once, unless a disk hangs: then nobody waits for it.
            if not process.ended(1.0):
                with self._lock:
                    self._ending.append((process, None))

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        self._not_before, self._pause, self._ending = 0.0, 0.0, []
        if process is not None:
            process.forget()
        self.arena.forget()

    # ---- asking

    def ask(self, request: Request, held: object, *, limit: int = 0, wanted: Callable[[], None] | None = None) -> Done:
        """Its answer. `held`: what was lent for it, and is not to be lent again while the process may still write there.

        Raises what it says that went wrong, and Abandoned where it asks and `wanted` raises that. Gone: it is not there any more, cannot do
        it, or has not answered within `limit` seconds. 0: for as long as it takes, as a disk may; whoever waits for this thread gives up
        himself, and one that is not well is noticed.
        """
        return self.begin(request, held, limit=limit, wanted=wanted).answer()

    def begin(self, request: Request, held: object, *, limit: int = 0, wanted: Callable[[], None] | None = None) -> Asked:
        """As `ask`, up to where the answer is to be waited for. For the event loop, too: nothing here waits. Gone: it was not sent."""
        try:
            packet = encode(request)
        except UnicodeEncodeError as error:
            raise Gone(f"no message can say that: {error}") from error
        process, channel = self._channel()
        try:
            # There is room for it: on a channel there is one at a time.
            channel.send(packet)
        except OSError as error:
            channel.close()
            with self._lock:
                self._end(process, str(error))
            raise Gone(str(error)) from error
        return Asked(self, process, channel, held, limit, wanted)

    def answered(self, process: Process, channel: socket.socket) -> None:
        """See `Asker`."""
        process.idle.append(channel)
        if self._process is not process:
            # It was closed meanwhile, and this channel was not among the others.
            process.close()

    def give_up(self, process: Process, channel: socket.socket, why: str, held: object) -> None:
        """See `Asker`."""
        channel.close()
        with self._lock:
            self._end(process, why)
        # Not with the lock, for which the event loop may wait.
        if not process.ended(1.0):
            # It could not be killed, or hangs in the kernel.
            with self._lock:
                self._ending.append((process, held))

    def forsake(self, process: Process, channel: socket.socket, held: object) -> None:
        """See `Asker`."""
        channel.close()
        with self._lock:
            self._end(process, "nobody can wait for it")
            self._ending.append((process, held))

    def _channel(self) -> tuple[Process, socket.socket]:
        process = self._process
        if process is None or not process.ready:
            raise Gone("it is not there")
        try:
            # Without the lock: if the process ends meanwhile, or has, the channel says so.
            return process, process.idle.pop()
        except IndexError:
            pass
        with self._lock:
            if self._process is not process:
                raise Gone("it is not there any more")
            try:
                return process, process.new_channel()
            except OSError as error:
                # Of descriptors there may be more in a moment; if it has ended, whoever waits for it finds that out.
                if error.errno not in _SHORT:
                    self._end(process, str(error))
                raise Gone(str(error)) from error

    def is_well(self, process: Process) -> bool:
        """See `Asker`. What hangs on a disk keeps no other channel from answering."""
        with self._lock:
            if self._process is not process:
                return False
            try:
                channel = process.new_channel()
            except OSError as error:
                # Of descriptors there may be more in a moment.
                return error.errno in _SHORT
        with channel:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", TIMEOUT, 0))
            try:
                channel.send(encode(Ping()))
                return bool(channel.recv(MOST))
            except OSError:
                return False


def several_cores() -> bool:
    """Has this process more than one?"""
    return len(os.sched_getaffinity(0)) > 1
