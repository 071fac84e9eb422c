"""HostDB: what hosts have been like, and in which order to ask them.

Per host and direction: a moving average of the latency and of the throughput of *successes only*, and a failure score that grows by 1
with each failure and halves every `HALF_LIFE` seconds. A host that fails fast is not a fast host: failures touch no average.

Record under the key `q` + host number u32, a MessagePack array; lost or damaged ones cost nothing but experience:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 1 |
| 1, 2 | read latency, throughput | float or nil | seconds; bytes per second |
| 3, 4 | write latency, throughput | float or nil | the same |
| 5, 6 | reads, writes | int | successes ever |
| 7 | failed | int | failures ever |
| 8, 9 | bytes read, written | int | ever |
| 10, 11 | last error, its time | str, int | "", 0 if there was none; nanoseconds |
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from storage.interfaces import Batch, MetadataReader
from storage.metadata.keys import HOST_STATS, prefix_end, read_u32, u32
from storage.seams import Seams

log = logging.getLogger("fusefs.hosts")

RECORD_VERSION = 1
#: Seconds in which a failure counts half.
HALF_LIFE = 60.0
#: Weight of the newest sample in an average.
ALPHA = 0.2
#: Transfers up to this many bytes tell latency, larger ones throughput.
SMALL = 128 * 1024
#: Reads are compared by the time this many bytes would take, writes by a sector.
TYPICAL_READ = 256 * 1024
TYPICAL_WRITE = 4 * 1024 * 1024
#: From this failure score on, a host comes after all that have a lower one.
FAILING = 0.5
MAX_FAILURES = 64.0
#: A host nobody has read from for this many seconds counts as unknown again.
STALE = 600.0
#: Of 256 rankings, this many put an unknown host first.
EXPLORE = 16
#: A host with less free space comes after those with more.
LITTLE_SPACE = 64 * 1024 * 1024
MAX_ERROR = 500

Direction = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """For people and for tests. latency: seconds, throughput: bytes per second, None before the first success that tells it."""

    latency: float | None
    throughput: float | None
    #: Failure score now.
    failures: float
    reads: int
    writes: int
    failed: int
    bytes_read: int
    bytes_written: int
    last_error: str
    last_error_ns: int


_Average = Annotated[float, msgspec.Meta(gt=0, le=1e18)] | None
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    read_latency: _Average
    read_throughput: _Average
    write_latency: _Average
    write_throughput: _Average
    reads: _Count
    writes: _Count
    failed: _Count
    bytes_read: _Count
    bytes_written: _Count
    last_error: Annotated[str, msgspec.Meta(max_length=MAX_ERROR)]
    last_error_ns: _Count


@dataclass(slots=True)
class _Speed:
    """One direction of one host."""

    latency: float | None = None
    throughput: float | None = None
    count: int = 0
    size: int = 0
    #: As of `failed_at`; use `failures`.
    score: float = 0.0
    failed_at: float = 0.0
    #: Monotonic time of the last success; None in this process so far.
    succeeded_at: float | None = None

    def failures(self, now: float) -> float:
        return self.score * math.exp2(-max(0.0, now - self.failed_at) / HALF_LIFE)

    def seconds_for(self, size: int) -> float | None:
        """Expected time for that many bytes; None if nothing is known."""
        if self.latency is None and self.throughput is None:
            return None
        return (self.latency or 0.0) + (size / self.throughput if self.throughput else 0.0)

    def succeed(self, size: int, seconds: float, now: float) -> None:
        seconds = max(seconds, 1e-6)
        if size <= SMALL:
            self.latency = _mix(self.latency, seconds)
        else:
            # What is not latency; but never less than a quarter, where the latency known is of worse days.
            self.throughput = _mix(self.throughput, size / max(seconds - (self.latency or 0.0), seconds / 4))
        self.count += 1
        self.size += size
        self.succeeded_at = now

    def fail(self, now: float) -> None:
        self.score = min(MAX_FAILURES, self.failures(now) + 1)
        self.failed_at = now


@dataclass(slots=True)
class _Experience:
    read: _Speed = field(default_factory=_Speed)
    write: _Speed = field(default_factory=_Speed)
    failed: int = 0
    last_error: str = ""
    last_error_ns: int = 0
    dirty: bool = False


def _mix(old: float | None, sample: float) -> float:
    return sample if old is None else old + ALPHA * (sample - old)


class HostDB:
    """In memory, loaded once; `save` from time to time. Synchronous throughout, one task at a time: the event loop's."""

    def __init__(self, store: MetadataReader, seams: Seams) -> None:
        self._seams = seams
        self._hosts: dict[int, _Experience] = {}
        for key, raw in store.scan(HOST_STATS, prefix_end(HOST_STATS), 100_000):
            try:
                record = msgspec.msgpack.decode(raw, type=_Record)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                log.warning("what was known of a host's speed is damaged and forgotten: %s", error)
                continue
            if len(key) == 5 and record.version == RECORD_VERSION:
                self._hosts[read_u32(key, 1)] = _experience(record)

    # ----------------------------------------------------------------------------------------------------------------
    # Learning

    def succeeded(self, number: int, direction: Direction, size: int, seconds: float) -> None:
        """A call that moved `size` bytes of good data took `seconds`."""
        host = self._host(number)
        host.dirty = True
        self._speed(host, direction).succeed(size, seconds, self._seams.clock.monotonic())

    def failed(self, number: int, error: BaseException, directions: Iterable[Direction] = ("read", "write")) -> None:
        """A call failed, or answered something that does not verify. Changes no latency and no throughput."""
        host, now = self._host(number), self._seams.clock.monotonic()
        for direction in directions:
            self._speed(host, direction).fail(now)
        host.failed += 1
        # Paths in it need not be UTF-8, the record must be.
        host.last_error = str(error).encode("utf-8", "backslashreplace").decode("utf-8")[:MAX_ERROR]
        host.last_error_ns = self._seams.clock.time_ns()
        host.dirty = True

    # ----------------------------------------------------------------------------------------------------------------
    # Telling

    def stats(self, number: int) -> HostStatistics:
        """What is known; all zero for a host nobody has used."""
        host, now = self._hosts.get(number, _Experience()), self._seams.clock.monotonic()
        read, write = host.read, host.write
        latency = read.latency if read.latency is not None else write.latency
        throughput = read.throughput if read.throughput is not None else write.throughput
        if latency is None and throughput is not None:
            # Only large transfers so far: the time a small one would take at most.
            latency = TYPICAL_READ / throughput
        return HostStatistics(
            latency=latency,
            throughput=throughput,
            failures=max(read.failures(now), write.failures(now)),
            reads=read.count,
            writes=write.count,
            failed=host.failed,
            bytes_read=read.size,
            bytes_written=write.size,
            last_error=host.last_error,
            last_error_ns=host.last_error_ns,
        )

    def rank(self, numbers: Iterable[int]) -> list[int]:
        """Best first for reading: by expected time, those failing lately last. Now and then a host little is known of comes first."""
        now = self._seams.clock.monotonic()
        known: list[tuple[float, int]] = []
        unknown: list[tuple[int, int]] = []
        failing: list[tuple[float, int]] = []
        for number in dict.fromkeys(numbers):
            speed = self._hosts.get(number, _Experience()).read
            score, expected = speed.failures(now), speed.seconds_for(TYPICAL_READ)
            if score >= FAILING:
                failing.append((score, number))
            elif expected is None or speed.succeeded_at is None or now - speed.succeeded_at > STALE:
                unknown.append((speed.count, number))
            else:
                known.append((expected * (1 + score), number))
        best, others, last = ([number for _, number in sorted(group)] for group in (known, unknown, failing))
        if best and others and self._seams.random.token_bytes(1)[0] < EXPLORE:
            return [others[0], *best, *others[1:], *last]
        return [*best, *others, *last]

    def rank_for_write(self, numbers: Iterable[int], space: Mapping[int, int]) -> list[int]:
        """Best first for a new shard: at random, weighted by free bytes and speed; then those nearly full; last those failing lately.

        `space`: free bytes by host number, as far as known; a host that does not tell is taken to have as much as the average one. The
        weighted order is Efraimidis and Spirakis' (2006): ascending by -ln(u) / weight.
        """
        now = self._seams.clock.monotonic()
        wanted = list(dict.fromkeys(numbers))
        told = [space[number] for number in wanted if number in space]
        average = max(sum(told) / len(told), 1.0) if told else 1.0
        times = {n: seconds for n in wanted if (seconds := self._hosts.get(n, _Experience()).write.seconds_for(TYPICAL_WRITE)) is not None}
        quickest = min(times.values(), default=1.0)
        ranked: list[tuple[int, float, int]] = []
        for number in wanted:
            score = self._hosts.get(number, _Experience()).write.failures(now)
            if score >= FAILING:
                ranked.append((2, score, number))
                continue
            # A slow host gets less, down to a tenth: it still fills in the end, and its speed stays known.
            speed = max(0.1, quickest / times[number]) if number in times else 1.0
            weight = max(space.get(number, average), 1) / average * speed
            chance = (int.from_bytes(self._seams.random.token_bytes(4), "big") + 1) / 2**32
            ranked.append((1 if space.get(number, LITTLE_SPACE) < LITTLE_SPACE else 0, -math.log(chance) / weight, number))
        return [number for _, _, number in sorted(ranked)]

    def save(self, batch: Batch) -> None:
        """Put what has changed since the last call into `batch`."""
        for number, host in self._hosts.items():
            if host.dirty:
                batch.put(HOST_STATS + u32(number), msgspec.msgpack.encode(_as_record(host)))
                host.dirty = False

    def _host(self, number: int) -> _Experience:
        return self._hosts.setdefault(number, _Experience())

    @staticmethod
    def _speed(host: _Experience, direction: Direction) -> _Speed:
        return host.read if direction == "read" else host.write


def _experience(record: _Record) -> _Experience:
    # Averages of an earlier process rank nothing (`succeeded_at`) until a success of this one confirms them.
    return _Experience(
        _Speed(record.read_latency, record.read_throughput, record.reads, record.bytes_read),
        _Speed(record.write_latency, record.write_throughput, record.writes, record.bytes_written),
        record.failed,
        record.last_error,
        record.last_error_ns,
    )


def _as_record(host: _Experience) -> _Record:
    return _Record(
        version=RECORD_VERSION,
        read_latency=host.read.latency,
        read_throughput=host.read.throughput,
        write_latency=host.write.latency,
        write_throughput=host.write.throughput,
        reads=host.read.count,
        writes=host.write.count,
        failed=host.failed,
        bytes_read=host.read.size,
        bytes_written=host.write.size,
        last_error=host.last_error,
        last_error_ns=host.last_error_ns,
    )
