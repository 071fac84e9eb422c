"""HostDB: what hosts have been like, and in which order to ask them.

Per host and direction: a moving average of the latency and of the throughput of *successes only*, and a failure score that grows by 1
with each failure and halves every `HALF_LIFE` seconds. A host that fails fast is not a fast host: failures touch no average. For reads
also how the times are distributed: `slow_after` says when a read is slower than nearly all before it were, `stalled_after` when it hangs.
A read that was given up because another host was quicker is no failure and no success: it counts as having taken at least that long, where
that makes the host look worse, and else not at all. One given up because it hung counts against the host's rank as a failure does.

Record under the key `q` + host number u32, a MessagePack array; lost or damaged ones cost nothing but experience:

| # | field | type | meaning |
|---|---|---|---|
| 0 | version | int | 2; 1 ends with field 11 |
| 1, 2 | read latency, throughput | float or nil | seconds; bytes per second |
| 3, 4 | write latency, throughput | float or nil | the same |
| 5, 6 | reads, writes | int | successes ever |
| 7 | failed | int | failures ever |
| 8, 9 | bytes read, written | int | ever |
| 10, 11 | last error, its time | str, int | "", 0 if there was none; nanoseconds |
| 12 | latencies | array | of reads up to `SMALL`, seconds: hosts/histogram.py |
| 13 | transfers | array | of larger reads, seconds per MiB: the same |
| 14 | days | array | requests and bytes per day: hosts/days.py |
| 15, 16 | hedged, overtaken | int | reads for which another host was asked because this one was slow; those that the other won |
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from storage.hosts.days import Day, DayRecords, Days
from storage.hosts.histogram import Histogram, Weights
from storage.interfaces import Batch, MetadataReader
from storage.metadata.keys import HOST_STATS, prefix_end, read_u32, u32
from storage.seams import Seams

log = logging.getLogger("fusefs.hosts")

RECORD_VERSION = 2
_READABLE = (1, 2)
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
#: From so many samples on their distribution is believed.
ENOUGH = 20
#: The share of reads that are not called slow.
USUAL = 0.95
#: Seconds after which a small read hangs where too little is known of the host, and at least; larger ones have their bytes' time besides.
STALL = 2.0
#: Bytes per second for that.
SLOWEST = 1024 * 1024
#: A host known to be slow hangs when it takes so many times its slow time.
PATIENCE = 4.0
#: Reads that hung count up to so many, so that a hundred at once are not a hundred minutes of distrust.
MAX_STALLS = 4.0
_MIB = 1024 * 1024

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
    #: Of small reads, seconds: half of them, and 95 of 100, were not slower. None before the first.
    median: float | None
    p95: float | None
    #: As `throughput`, of reads and of writes alone.
    read_throughput: float | None
    write_throughput: float | None
    #: Score of reads that hung, now.
    stalls: float
    hedged: int
    overtaken: int
    #: Oldest first.
    days: list[Day]


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
    latencies: Weights = []
    transfers: Weights = []
    days: DayRecords = []
    hedged: _Count = 0
    overtaken: _Count = 0


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
    #: Reads only.
    latencies: Histogram = field(default_factory=Histogram)
    transfers: Histogram = field(default_factory=Histogram)
    #: As `score` and `failed_at`, of reads that hung.
    stalls: float = 0.0
    stalled_at: float = 0.0

    def failures(self, now: float) -> float:
        return self.score * math.exp2(-max(0.0, now - self.failed_at) / HALF_LIFE)

    def trouble(self, now: float) -> float:
        """Failures, and reads that hung."""
        return self.failures(now) + self.hung(now)

    def hung(self, now: float) -> float:
        return self.stalls * math.exp2(-max(0.0, now - self.stalled_at) / HALF_LIFE)

    def seconds_for(self, size: int) -> float | None:
        """Expected time for that many bytes; None if nothing is known."""
        if self.latency is None and self.throughput is None:
            return None
        return (self.latency or 0.0) + (size / self.throughput if self.throughput else 0.0)

    def succeed(self, size: int, seconds: float, now: float) -> None:
        seconds = max(seconds, 1e-6)
        if size <= SMALL:
            self.latency = _mix(self.latency, seconds)
            self.latencies.add(seconds)
        else:
            transfer = self._transfer(seconds)
            self.throughput = _mix(self.throughput, size / transfer)
            self.transfers.add(transfer * _MIB / size)
        self.count += 1
        self.size += size
        self.succeeded_at = now

    def _transfer(self, seconds: float) -> float:
        """What is not latency; but never less than a quarter, where the latency known is of worse days."""
        return max(seconds - (self.latency or 0.0), seconds / 4)

    def slow_after(self, size: int, share: float) -> float | None:
        """Seconds that `share` of the reads of that size do not exceed; None where too little is known."""
        small = self.latencies.quantile(share) if self.latencies.samples >= ENOUGH else None
        if size <= SMALL:
            return small
        each = self.transfers.quantile(share) if self.transfers.samples >= ENOUGH else None
        return None if each is None else (small or 0.0) + each * size / _MIB

    def give_up(self, size: int, seconds: float, now: float) -> bool:
        """It would have taken longer than `seconds`. What is known only ever gets worse by it. True if it hung."""
        seconds = max(seconds, 1e-6)
        # Somewhat less, for whoever waited that long by another clock, or for a few bytes less.
        stalled = seconds >= 0.9 * stalled_after(size, self.slow_after(size, USUAL))
        if size <= SMALL:
            # Of an unknown host a lower bound says nothing, unless it hung.
            if self.latency is not None:
                self.latency = max(self.latency, _mix(self.latency, seconds))
            elif stalled:
                self.latency = max(seconds, TYPICAL_READ / self.throughput if self.throughput else 0.0)
            _add_slow(self.latencies, seconds)
        else:
            transfer = self._transfer(seconds)
            if size / transfer < self.throughput if self.throughput is not None else stalled:
                self.throughput = _mix(self.throughput, size / transfer)
            _add_slow(self.transfers, transfer * _MIB / size)
        if stalled:
            self.stalls = min(MAX_STALLS, self.hung(now) + 1)
            self.stalled_at = now
        return stalled

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
    days: Days = field(default_factory=Days)
    hedged: int = 0
    overtaken: int = 0
    #: Something was learned since it was saved; counting alone is no reason to save, or saving would be one to publish, and so on.
    dirty: bool = False
    counted: bool = False


#: What is known of a host nobody has used. Nobody changes it.
_NOBODY = _Experience()


def stalled_after(size: int, usual: float | None) -> float:
    """Seconds after which a read of so many bytes hangs, `usual` being what is slow for the host, if that is known."""
    least = STALL + size / SLOWEST
    return least if usual is None else max(least, PATIENCE * usual)


def _add_slow(known: Histogram, sample: float) -> None:
    """A lower bound: of those among the usual ones nobody knows where they belong, of those above them that they belong above."""
    usual = known.quantile(USUAL)
    if usual is not None and sample > usual:
        known.add(sample)


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
            if len(key) == 5 and record.version in _READABLE:
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

    def gave_up(self, number: int, size: int, seconds: float) -> bool:
        """A read of `size` bytes was given up after `seconds`. No failure, and never an improvement. True if it hung."""
        host, now = self._host(number), self._seams.clock.monotonic()
        host.dirty = True
        return host.read.give_up(size, seconds, now)

    def hedged(self, number: int) -> None:
        """The host was slow, and another was asked as well."""
        self._host(number).hedged += 1

    def overtaken(self, number: int) -> None:
        """And the other was quicker."""
        self._host(number).overtaken += 1

    def requested(self, number: int, sent: int, received: int) -> None:
        """A request went to the host, whatever came of it; bytes. For people: nothing is ranked by it."""
        host = self._host(number)
        host.days.add(self._seams.clock.time_ns(), sent, received)
        host.counted = True

    # ----------------------------------------------------------------------------------------------------------------
    # Telling

    def slow_after(self, number: int, size: int, share: float = USUAL) -> float | None:
        """Seconds that `share` of the host's reads of that size do not exceed; None while it is unknown."""
        host = self._hosts.get(number)
        return None if host is None else host.read.slow_after(size, share)

    def stalled_after(self, number: int, size: int) -> float:
        """Seconds after which a read of that size is taken to hang: never soon, and late where the host is known to be slow."""
        return stalled_after(size, self.slow_after(number, size))

    def troubled(self, number: int) -> bool:
        """Has it failed, or hung, lately, so that it is asked last?"""
        host = self._hosts.get(number)
        return host is not None and host.read.trouble(self._seams.clock.monotonic()) >= FAILING

    def stats(self, number: int) -> HostStatistics:
        """What is known; all zero for a host nobody has used."""
        host, now = self._hosts.get(number, _NOBODY), self._seams.clock.monotonic()
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
            median=read.latencies.quantile(0.5),
            p95=read.latencies.quantile(USUAL),
            read_throughput=read.throughput,
            write_throughput=write.throughput,
            stalls=read.hung(now),
            hedged=host.hedged,
            overtaken=host.overtaken,
            days=host.days.records(),
        )

    def rank(self, numbers: Iterable[int]) -> list[int]:
        """Best first for reading: by expected time; those nobody has read from for a while by what was expected of them then; those never
        read from; those failing lately last. Now and then a host little is known of comes first."""
        now = self._seams.clock.monotonic()
        known: list[tuple[float, int]] = []
        stale: list[tuple[float, int]] = []
        unknown: list[tuple[int, int]] = []
        failing: list[tuple[float, int]] = []
        for number in dict.fromkeys(numbers):
            speed = self._hosts.get(number, _NOBODY).read
            score, expected = speed.trouble(now), speed.seconds_for(TYPICAL_READ)
            if score >= FAILING:
                failing.append((score, number))
            elif expected is None:
                unknown.append((speed.count, number))
            elif speed.succeeded_at is None or now - speed.succeeded_at > STALE:
                stale.append((expected, number))
            else:
                known.append((expected * (1 + score), number))
        best, before, never, last = ([number for _, number in sorted(group)] for group in (known, stale, unknown, failing))
        if not best:
            best, before = before, []
        others = never + before
        if best and others and self._seams.random.token_bytes(1)[0] < EXPLORE:
            return [others[0], *best, *others[1:], *last]
        return [*best, *before, *never, *last]

    def rank_for_write(self, numbers: Iterable[int], space: Mapping[int, int]) -> list[int]:
        """Best first for a new shard: at random, weighted by free bytes and speed; then those nearly full; last those failing lately.

        `space`: free bytes by host number, as far as known; a host that does not tell is taken to have as much as the average one. The
        weighted order is Efraimidis and Spirakis' (2006): ascending by -ln(u) / weight.
        """
        now = self._seams.clock.monotonic()
        wanted = list(dict.fromkeys(numbers))
        told = [space[number] for number in wanted if number in space]
        average = max(sum(told) / len(told), 1.0) if told else 1.0
        speeds = [self._hosts.get(number, _NOBODY).write for number in wanted]
        times = [speed.seconds_for(TYPICAL_WRITE) for speed in speeds]
        quickest = min((seconds for seconds in times if seconds is not None), default=1.0)
        # For all of them at once: it is a call of the system each.
        chances = struct.unpack(f">{len(wanted)}I", self._seams.random.token_bytes(4 * len(wanted)))
        ranked: list[tuple[int, float, int]] = []
        for number, speed, seconds, chance in zip(wanted, speeds, times, chances, strict=True):
            # Most have not failed at all, and a volume may have a thousand.
            if speed.score >= FAILING and (score := speed.failures(now)) >= FAILING:
                ranked.append((2, score, number))
                continue
            free = space.get(number)
            weight = (average if free is None else free if free > 1 else 1) / average
            if seconds is not None and seconds > quickest:
                # A slow host gets less, down to a tenth: it still fills in the end, and its speed stays known.
                weight *= max(0.1, quickest / seconds)
            ranked.append((1 if free is not None and free < LITTLE_SPACE else 0, -math.log((chance + 1) / 2**32) / weight, number))
        ranked.sort()
        return [number for _, _, number in ranked]

    def save(self, batch: Batch, *, counts: bool = True) -> None:
        """Put what has changed since the last call into `batch`. Not `counts`: hosts of which there is more than numbers of requests."""
        for number, host in self._hosts.items():
            if host.dirty or (counts and host.counted):
                batch.put(HOST_STATS + u32(number), msgspec.msgpack.encode(_as_record(host)))
                host.dirty = host.counted = False

    def _host(self, number: int) -> _Experience:
        host = self._hosts.get(number)
        if host is None:
            host = self._hosts[number] = _Experience()
        return host

    @staticmethod
    def _speed(host: _Experience, direction: Direction) -> _Speed:
        return host.read if direction == "read" else host.write


def _experience(record: _Record) -> _Experience:
    # Averages of an earlier process rank below those that a success of this one has confirmed (`succeeded_at`).
    return _Experience(
        _Speed(
            record.read_latency,
            record.read_throughput,
            record.reads,
            record.bytes_read,
            latencies=Histogram(record.latencies),
            transfers=Histogram(record.transfers),
        ),
        _Speed(record.write_latency, record.write_throughput, record.writes, record.bytes_written),
        record.failed,
        record.last_error,
        record.last_error_ns,
        Days(record.days),
        record.hedged,
        record.overtaken,
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
        latencies=host.read.latencies.weights(),
        transfers=host.read.transfers.weights(),
        days=host.days.records(),
        hedged=host.hedged,
        overtaken=host.overtaken,
    )
