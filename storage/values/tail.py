"""Tails in memory: buffers of appended bytes, flights, cargos."""

from __future__ import annotations

import enum
from bisect import bisect_right

import trio

from storage.errors import FusefsError
from storage.interfaces import Buffer

#: Appends smaller than this are gathered into one growing chunk: ten million appends of 100 bytes are not ten million objects.
SMALL = 16 * 1024
#: Bytes that are copied quicker than a view of them is made.
_LITTLE = 8 * 1024
#: A gathered chunk is closed at this size.
CHUNK = 64 * 1024


class Block:
    """Memory that the coprocess sees, which appends go to one after the other."""

    __slots__ = ("begin", "chunk", "left", "memory")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        #: Bytes of it that are not used yet, at its end.
        self.left = len(memory)
        #: The last chunk that stands in it, which begins there: it grows while it is a buffer's last.
        self.begin = 0
        self.chunk: memoryview | None = None


class ChunkBuffer:
    """Appended bytes with random reads. Positions are relative to its own start; taking from the front moves the start."""

    __slots__ = ("_chunks", "_ends", "_taken", "length")

    def __init__(self) -> None:
        self._chunks: list[Buffer] = []
        #: Invariant: _ends[i] - _taken is the position at which chunk i ends.
        self._ends: list[int] = []
        self._taken = 0
        self.length = 0

    def append(self, data: Buffer) -> None:
        """Large pieces are kept as they are (they must not change), small ones copied; except a first one that cannot change, which is all
        there ever is of most small files."""
        size = len(data)
        if size < SMALL:
            if not self._chunks:
                if type(data) is not bytes:
                    data = bytearray(data)
            else:
                last = self._chunks[-1]
                if type(last) is bytes and len(last) < SMALL:
                    last = self._chunks[-1] = bytearray(last)
                if type(last) is bytearray and len(last) < CHUNK:
                    last += data
                    self._ends[-1] += size
                    self.length += size
                    return
                data = bytearray(data)
        self._chunks.append(data)
        self._ends.append(self._taken + self.length + size)
        self.length += size

    def append_in(self, block: Block, data: Buffer) -> None:
        """As `append`, with the bytes put where the block has room left for them. What comes one after the other is one chunk: it is told,
        cut and sealed in one piece."""
        size, memory = len(data), block.memory
        start = len(memory) - block.left
        stop = start + size
        memory[start:stop] = data
        block.left -= size
        chunks = self._chunks
        if chunks and chunks[-1] is block.chunk:
            chunks[-1] = block.chunk = memory[block.begin : stop].toreadonly()
            self._ends[-1] += size
        else:
            block.begin, block.chunk = start, memory[start:stop].toreadonly()
            chunks.append(block.chunk)
            self._ends.append(self._taken + self.length + size)
        self.length += size

    def read(self, position: int, size: int) -> list[Buffer]:
        """Copies of the bytes [position, position + size), in pieces; clipped."""
        end = min(position + size, self.length)
        pieces: list[Buffer] = []
        if position < end <= position + _LITTLE:
            last = self._chunks[-1]
            start = self.length - len(last)
            if position >= start:
                # The usual case: what was appended a moment ago. Copied twice, which is less than to make a view.
                return [bytes(last[position - start : end - start])]
        i = bisect_right(self._ends, self._taken + position)
        while position < end:
            chunk = self._chunks[i]
            start = self._ends[i] - self._taken - len(chunk)
            with memoryview(chunk) as view:
                pieces.append(bytes(view[position - start : end - start]))
            position = start + len(chunk)
            i += 1
        return pieces

    def ends_with(self, data: bytes) -> bool:
        """Are these the newest bytes? False also where they stand in more than one chunk."""
        if not self._chunks:
            return False
        last = self._chunks[-1]
        return type(last) is not memoryview and last.endswith(data)

    def take(self, size: int) -> list[Buffer]:
        """Cut the first `size` bytes (at most all) off; the pieces no longer change."""
        size = min(size, self.length)
        i = bisect_right(self._ends, self._taken + size)
        taken = self._chunks[:i]
        rest = size - (self._ends[i - 1] - self._taken if i else 0)
        self._chunks = self._chunks[i:]
        self._ends = self._ends[i:]
        if rest:
            chunk = bytes(self._chunks[0]) if type(self._chunks[0]) is bytearray else self._chunks[0]
            view = memoryview(chunk)
            taken.append(view[:rest])
            self._chunks[0] = view[rest:]
        self._taken += size
        self.length -= size
        return taken


class FlightState(enum.Enum):
    FLYING = 1
    #: The sector is durable, an earlier flight of the value is not: extents go in order (I2).
    WAITING = 2
    PARKED = 3
    LANDED = 4
    #: The value was freed meanwhile.
    DROPPED = 5


class Flight:
    """A piece of a value's tail on its way into a sector. Its bytes stay readable until it has landed."""

    __slots__ = ("cargo", "length", "offset", "parts", "position", "state", "tail")

    def __init__(self, tail: Tail, offset: int, parts: list[Buffer], length: int) -> None:
        self.tail = tail
        self.offset = offset
        self.parts = parts
        self.length = length
        self.position = 0
        self.state = FlightState.FLYING
        self.cargo: Cargo | None = None

    @property
    def end(self) -> int:
        return self.offset + self.length

    def read(self, offset: int, stop: int) -> list[Buffer]:
        """The bytes [offset, stop) of the value, clipped to this flight, in pieces."""
        pieces: list[Buffer] = []
        at = self.offset
        for part in self.parts:
            if at >= stop:
                break
            low, high = max(offset - at, 0), min(stop - at, len(part))
            if low < high:
                pieces.append(part if low == 0 and high == len(part) else memoryview(part)[low:high])
            at += len(part)
        return pieces


class Cargo:
    """The flights that share a sector."""

    __slots__ = ("done", "error", "flights", "length", "replication", "sector_id", "table_bytes")

    def __init__(self, replication: str) -> None:
        self.replication = replication
        self.flights: list[Flight] = []
        self.length = 0
        self.table_bytes = 0
        self.sector_id = 0
        self.error: FusefsError | None = None
        #: Set when the flights have stopped flying: waiting, landed, parked or dropped. A new event for each attempt.
        self.done = trio.Event()

    def add(self, flight: Flight, table_bytes: int) -> None:
        flight.position = self.length
        flight.cargo = self
        self.flights.append(flight)
        self.length += flight.length
        self.table_bytes += table_bytes


class Tail:
    """What is known in memory of one value. Bytes: extents up to `sealed` | flights | buffer."""

    __slots__ = ("block", "buffer", "flights", "handed", "journaled", "logged", "owner", "published", "replication", "sealed", "value_id")

    def __init__(self, value_id: int, owner: int, replication: str, sealed: int) -> None:
        self.value_id = value_id
        self.owner = owner
        self.replication = replication
        #: Invariant: sealed <= journaled <= size, where the journal holds [sealed, journaled) once a commit is durable.
        self.sealed = sealed
        self.journaled = sealed
        #: The highest that `journaled` ever was: when a tail is written to the journal once more, the older copy stands until then.
        self.handed = sealed
        #: Up to here the log on the hosts has what is not in extents (as the publisher was given it).
        self.logged = sealed
        #: Up to here a majority of the hosts is known to have it in the log.
        self.published = sealed
        #: Few: what the budget of all tails allows for. A deque takes 600 bytes, and most tails are small files without any.
        self.flights: list[Flight] = []
        self.buffer = ChunkBuffer()
        #: Where large appends go.
        self.block: Block | None = None

    @property
    def buffer_start(self) -> int:
        return self.flights[-1].end if self.flights else self.sealed

    @property
    def size(self) -> int:
        # As `buffer_start`, which is asked for most often.
        return (self.flights[-1].end if self.flights else self.sealed) + self.buffer.length

    def read(self, start: int, stop: int) -> list[Buffer]:
        """The bytes [start, stop) of the value, in pieces; they must lie between `sealed` and `size`."""
        pieces: list[Buffer] = []
        for flight in self.flights:
            if flight.end > start and flight.offset < stop:
                pieces.extend(flight.read(start, stop))
        low, high = max(start - self.buffer_start, 0), stop - self.buffer_start
        if high > low:
            pieces.extend(self.buffer.read(low, high - low))
        return pieces

    @property
    def empty(self) -> bool:
        """True if everything is in extents."""
        return not self.flights and not self.buffer.length

    def first_flying(self, upto: int) -> Flight | None:
        """The first flight that may still land and holds bytes below `upto`; one behind a parked flight cannot land, and does not count."""
        for flight in self.flights:
            if flight.offset >= upto or flight.state is FlightState.PARKED:
                return None
            if flight.state is FlightState.FLYING:
                return flight
        return None
