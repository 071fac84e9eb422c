"""This process's side: starts the coprocess, and asks it. For threads: on the event loop only what the arena does."""

from __future__ import annotations

import atexit
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

from storage import errors
from storage.abandoned import Abandoned
from storage.buffers import aligned
from storage.coprocess.arena import Arena, Place
from storage.coprocess.wire import MOST, Directory, Done, Failed, Go, Open, Put, Read, Request, Seal, Wanted, decode_answer, encode
from storage.interfaces import Buffer, RangeOpening
from storage.sealing import ShardHeader, open_blocks_into, root_of, seal, sealed_length

log = logging.getLogger("fusefs.coprocess")

#: Bytes from which on it is worth asking: for less, asking takes as long as doing it.
LEAST = 256 * 1024
#: Pieces of a sector's plaintext that are told one by one, where they stand in the arena already.
PIECES = 64
#: Seconds in which it seals or opens a sector, however busy the machine is.
TIMEOUT = 30
#: Seconds until another is started, where one has died or could not be started.
PAUSE = 30.0


class Gone(Exception):
    """It does not answer: what it was asked for is to be done here."""


class _Running:
    """One coprocess, from its start to its end."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process, self.control = process, control
        self.ready = False
        #: Channels on which nobody asks now.
        self.idle: deque[socket.socket] = deque()

    def look(self) -> bool:
        """Has it said that it is there? OSError: it has ended."""
        if not self.ready and select.select([self.control], [], [], 0)[0]:
            if not self.control.recv(MOST):
                raise OSError("it ended before it was there")
            self.ready = True
        return self.ready

    def close(self) -> None:
        """It ends, whatever it is doing."""
        while self.idle:
            self.idle.pop().close()
        self.control.close()
        self.process.kill()


class Coprocess:
    """See the package. One for each process: `COPROCESS`."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        #: False: everything is done here. With one core there is nothing to be gained.
        self.wanted = len(os.sched_getaffinity(0)) > 1
        #: Guards what follows.
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._not_before = 0.0
        #: Killed, and perhaps not ended yet.
        self._ending: list[subprocess.Popen[bytes]] = []
        #: For what is opened here: each thread wants the interpreter's lock for each block, and the event loop wants it, too.
        self._opening = threading.Lock()

    # ---- its life

    @property
    def there(self) -> bool:
        """Can it be asked now?"""
        running = self._running
        return self.wanted and running is not None and running.ready

    def start(self) -> bool:
        """Start it, unless it is there; until it says that it is, what is to be done is done here. Does not wait for it. True: it is."""
        if self.there:
            return True
        if not self.wanted or monotonic() < self._not_before:
            return False
        with self._lock:
            if self._running is None:
                self._start()
                return False
            try:
                return self._running.look()
            except OSError as error:
                self._end(self._running, str(error))
                return False

    def _start(self) -> None:
        """With the lock."""
        self._ending = [process for process in self._ending if process.poll() is None]
        file = self.arena.file
        if file is None or not sys.executable:
            self.wanted = False
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The very modules this process has, wherever it was started, and whatever is in the directory it was started in.
        paths = [path for path in sys.path if os.path.isabs(path)]
        code = (
            f"import sys; sys.path[:] = {paths!r}; from storage.coprocess.serve import main; main({theirs.fileno()}, {file[0]}, {file[1]})"
        )
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", code],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), file[0]),
                    # Signals from a terminal are for this process.
                    start_new_session=True,
                    # Passphrases are none of its business.
                    env={name: value for name, value in os.environ.items() if not name.startswith("FUSEFS_")},
                )
            except OSError as error:
                ours.close()
                self._not_before = monotonic() + PAUSE
                log.warning("no second process can be started (%s): threads seal and open sectors", error)
                return
        self._running = _Running(process, ours)

    def _end(self, running: _Running, why: str) -> None:
        """With the lock: it is of no use any more. Nothing happens where that is known."""
        if self._running is not running:
            return
        log.warning("the process that seals sectors is gone (%s): threads do it, and another is started in a moment", why)
        self._running = None
        self._not_before = monotonic() + PAUSE
        running.close()
        self._ending.append(running.process)

    def close(self) -> None:
        """It ends; it is started again when it is wanted."""
        with self._lock:
            running, self._running = self._running, None
            if running is not None:
                running.close()
                # Killed, it ends at once, unless a disk hangs: then nobody waits for it.
                try:
                    running.process.wait(1.0)
                except subprocess.TimeoutExpired:
                    self._ending.append(running.process)

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        running, self._running = self._running, None
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._not_before, self._ending = 0.0, []
        if running is not None:
            for channel in (*running.idle, running.control):
                channel.close()
            # Not this process's child: nobody is to wait for it.
            running.process.returncode = 0
        self.arena.forget()

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        running = self._running
        return None if running is None else running.process.pid

    # ---- asking

    def _channel(self) -> tuple[_Running, socket.socket]:
        running = self._running
        if running is None or not running.ready:
            raise Gone
        try:
            return running, running.idle.pop()
        except IndexError:
            pass
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(running.control, [b"c"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                with self._lock:
                    self._end(running, str(error))
                raise Gone from error
        return running, ours

    def ask(self, request: Request, *, limit: int = 0, wanted: Callable[[], None] | None = None) -> Done:
        """Its answer; raises what it says that went wrong, and what `wanted` raises where it asks that. Gone: it is not there any more, or
        has not answered within `limit` seconds. 0: for as long as it takes, as a disk may; whoever waits for this thread gives up himself.
        """
        running, channel = self._channel()
        try:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", limit, 0))
            channel.send(encode(request))
            answer = _received(channel)
            while isinstance(answer, Wanted):
                go = wanted is None or _is(wanted)
                channel.send(encode(Go(go)))
                answer = _received(channel)
        except OSError as error:
            channel.close()
            with self._lock:
                self._end(running, str(error))
            raise Gone from error
        except BaseException:
            channel.close()
            raise
        running.idle.append(channel)
        if self._running is not running:
            # It was closed meanwhile, and this channel was not among the others.
            running.close()
        if isinstance(answer, Failed):
            raise _error(answer)
        return answer

    # ---- what it is asked for

    def seal(self, key: bytes, header: ShardHeader, data: Sequence[Buffer]) -> tuple[Buffer, str]:
        """The sealed shard of `data`, and its root. As `sealing.seal`."""
        total = header.plaintext_length
        if total >= LEAST and self.start():
            plain, sealed = self._places(data, total), self.arena.lend(sealed_length(total))
            target = self.arena.place(sealed)
            if plain is not None and target is not None:
                places, _held = plain
                try:
                    return sealed.toreadonly(), self.ask(Seal(places, target, key, header.encode()), limit=TIMEOUT).name
                except Gone as error:
                    log.debug("sealed here: %s", error)
        made = seal(key, header, data, self.arena.lend if total >= LEAST else aligned)
        return made, root_of(made)

    def _places(self, data: Sequence[Buffer], total: int) -> tuple[list[Place], memoryview | None] | None:
        """Where `data` stands in the arena, copied there if it has to be (then what was lent for it); None: nowhere."""
        if len(data) <= PIECES:
            places = [self.arena.place(piece) for piece in data]
            there = [place for place in places if place is not None]
            if len(there) == len(data):
                return there, None
        copy = self.arena.lend(total)
        place = self.arena.place(copy)
        return None if place is None or sum(map(len, data)) != total or not self.arena.fill(copy, data) else ([place], copy)

    def open_into(self, key: bytes, expected: ShardHeader, first: int, blocks: memoryview, plain: memoryview) -> None:
        """As `sealing.open_blocks_into`."""
        if len(blocks) >= LEAST and (target := self.arena.place(plain)) is not None and self.start():
            source = self._places([blocks], len(blocks))
            if source is not None:
                try:
                    self.ask(Open(source[0][0], target, first, key, expected.encode()), limit=TIMEOUT)
                    return
                except Gone as error:
                    log.debug("opened here: %s", error)
        with self._opening:
            open_blocks_into(key, expected, first, blocks, plain)

    def put(self, directory: Directory, parts: list[str], data: Buffer, temporary: str, wanted: Callable[[], None]) -> str | None:
        """As `Tree.put`. None: it is to be done here, and may have been done."""
        place = self.arena.place(data) if len(data) >= LEAST else None
        if place is None or not self.start():
            return None
        try:
            return self.ask(Put(directory, parts, place, temporary), wanted=wanted).name
        except Gone:
            return None

    def read(self, directory: Directory, parts: list[str], offset: int, length: int, step: int, opening: RangeOpening) -> int | None:
        """As `Tree.get_range_in` with `opening.take`. None: it is to be done here."""
        place = self.arena.place(opening.target) if length >= LEAST else None
        if place is None or not self.start():
            return None
        request = Read(directory, parts, offset, length, step, place, opening.offset, opening.key, opening.header)
        try:
            size = self.ask(request).size
        except Gone:
            return None
        opening.done()
        return size


def _received(channel: socket.socket) -> Done | Failed | Wanted:
    """OSError: nothing came, or will come."""
    packet = channel.recv(MOST)
    if not packet:
        raise OSError("it has ended")
    answer: Wanted | Done | Failed = decode_answer(packet)
    return answer


def _is(wanted: Callable[[], None]) -> bool:
    try:
        wanted()
    except Abandoned:
        return False
    return True


def _error(answer: Failed) -> Exception:
    if answer.kind == Abandoned.__name__:
        return Abandoned(answer.message)
    kind = getattr(errors, answer.kind, None)
    if isinstance(kind, type) and issubclass(kind, errors.FusefsError):
        return kind(answer.message)
    return RuntimeError(answer.message)


COPROCESS = Coprocess(Arena())
atexit.register(COPROCESS.close)
os.register_at_fork(after_in_child=COPROCESS.forget)
