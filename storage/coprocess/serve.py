"""The coprocess's own side: a thread for each channel, which does one thing after the other. See the package.

Imports nothing that asks others (see `client`), and little: to start it takes CPU from whoever waits for the first sector.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import socket
import threading
from functools import lru_cache, partial

from storage.abandoned import Abandoned
from storage.coprocess.arena import Place
from storage.coprocess.aside import Aside, EventLoop, Loop
from storage.coprocess.wire import (
    MOST,
    Answer,
    Directory,
    Done,
    Failed,
    Go,
    Open,
    Ping,
    Put,
    Read,
    Request,
    Seal,
    Shard,
    Wanted,
    decode_request,
    encode,
)
from storage.errors import FusefsError
from storage.failpoints import NoFailpoints
from storage.hosts.tree import Tree
from storage.sealing import Opening, ShardHeader, open_blocks_into, root_of, seal

#: Only one thread seals or opens at a time: more of them take the interpreter's lock from each other, for each block, and from those that
#: put.
_working = threading.Lock()


@lru_cache(maxsize=256)
def _tree(directory: Directory) -> Tree:
    return Tree(directory.path, directory.url, NoFailpoints(), (directory.device, directory.inode))


def _open_into(key: bytes, expected: ShardHeader, first: int, blocks: memoryview, plain: memoryview) -> None:
    with _working:
        open_blocks_into(key, expected, first, blocks, plain)


class Channel:
    """One thread's."""

    def __init__(self, channel: socket.socket, memory: memoryview, parent: int, loop: Loop) -> None:
        self._channel, self._memory = channel, memory
        self._parent, self._loop = parent, loop

    def serve(self) -> None:
        """Until the other end is closed, by whatever: then nobody waits for what is being done, either."""
        aside = Aside(self._loop, os.getpid())
        try:
            with self._channel:
                while packet := self._channel.recv(MOST):
                    aside.step()
                    request = decode_request(packet)
                    if isinstance(request, Go):
                        break  # asked for nothing
                    self._channel.send(encode(self._answer(request)))
        except OSError:
            return

    def _answer(self, request: Request) -> Answer:
        try:
            if isinstance(request, Seal):
                return self._seal(request)
            if isinstance(request, Ping):
                return Done()
            if isinstance(request, Open):
                return self._open(request)
            return self._put(request) if isinstance(request, Put) else self._read(request)
        except (FusefsError, Abandoned) as error:
            # What this process has not enough of the other may have.
            cause = error.__cause__
            wants = isinstance(cause, OSError) and cause.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
            return Failed("Gone" if wants else type(error).__name__, str(error))
        except MemoryError:
            return Failed("Gone", "no memory")
        except Exception as error:  # noqa: BLE001  a bug: the other side raises it
            return Failed("", f"in the process that seals sectors: {error!r}")

    def _at(self, place: Place) -> memoryview:
        return self._memory[place[0] : place[0] + place[1]]

    def _seal(self, request: Seal) -> Done:
        return Done([self._seal_one(shard) for shard in request.shards])

    def _seal_one(self, shard: Shard) -> str:
        target = self._at(shard.sealed)
        plain = [piece if isinstance(piece, bytes) else self._at(piece) for piece in shard.plain]
        with _working:
            return root_of(seal(shard.key, ShardHeader.parse(shard.header), plain, lambda size: target[:size]))

    def _open(self, request: Open) -> Done:
        header = ShardHeader.parse(request.header)
        _open_into(request.key, header, request.first_block, self._at(request.sealed), self._at(request.plain))
        return Done()

    def _put(self, request: Put) -> Done:
        wanted = self._wanted if request.flag < 0 else partial(self._flagged, request.flag)
        return Done([_tree(request.directory).put(request.parts, self._at(request.data), request.temporary, wanted)])

    def _flagged(self, at: int) -> None:
        """As `_wanted`. Whoever has died has set no flag, but is not this process's parent any more."""
        if self._memory[at] or os.getppid() != self._parent:
            raise Abandoned

    def _wanted(self) -> None:
        """Abandoned: whoever wanted the change has given up, or is gone."""
        self._channel.send(encode(Wanted()))
        packet = self._channel.recv(MOST)
        answer = decode_request(packet) if packet else None
        if not isinstance(answer, Go) or not answer.wanted:
            raise Abandoned

    def _read(self, request: Read) -> Done:
        target = self._at(request.plain)
        opening = Opening(
            request.key, ShardHeader.parse(request.header), request.plain_offset, len(target), lambda _size: target, _open_into
        )
        size = _tree(request.directory).get_range_in(request.parts, request.offset, request.length, request.step, opening.take)
        opening.plain()
        return Done(size=size)


def serve(control: socket.socket, memory: int, size: int, parent: int) -> None:
    """Until `control`, on which new channels come, is closed at the other end, that of the process `parent`. Never returns."""
    gc.freeze()
    mapped = memoryview(mmap.mmap(memory, size, mmap.MAP_SHARED))
    os.close(memory)
    loop = EventLoop(parent)
    with control:
        control.send(encode(Done()))
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            except OSError:
                break
            if not packet:
                break
            for descriptor in descriptors:
                channel = Channel(socket.socket(fileno=descriptor), mapped, parent, loop)
                threading.Thread(target=channel.serve, daemon=True).start()
    # Nobody is left to be told of what threads are still doing.
    os._exit(0)
