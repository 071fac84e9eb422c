"""The architecture in one file: every interface of `storage`, what is durable when it returns, what it raises.

    Files, Namespace          names, inodes, file map; append-only content by path or by inode
        Values                tails, extents, packing, merging, reclaim
            SectorManager     ids, redundancy, placement, cache
                HostIO        seals, opens, verifies        Contractor   contracts      HostDB
                    Host      a flat store of named bytes nobody needs to trust
    MetadataStore             memtable, journal, LMDB: under all of them

A layer imports only what stands below it. All raise kinds of `storage.errors` and nothing else. Methods that are not
`async` never block for longer than a metadata read (microseconds) and are atomic towards other tasks; callers rely on
that, and mark where they do.

Values of identifiers: a *value id*, an *inode number* and a *sector id* are integers of 64 bits, from 1, never reused in a
volume's history. A *contract id* is 32 hexadecimal digits. A *sector root* is 64 hexadecimal digits (BLAKE3-256 of the
sealed bytes). Times are nanoseconds since the Unix epoch unless a name says otherwise; durations are seconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from storage.errors import FusefsError
from storage.status import ReplicationStatus
from storage.wording import counted

Buffer = bytes | bytearray | memoryview


# --------------------------------------------------------------------------------------------------------------------
# Metadata


class Batch:
    """Metadata changes that become visible together and durable together. Later operations on a key win.

    `ops` holds (key, value) pairs, value None for a deletion. Keys are 1 to 500 bytes (LMDB's limit is 511).
    """

    __slots__ = ("ops",)

    def __init__(self, ops: list[tuple[bytes, bytes | None]] | None = None) -> None:
        self.ops = [] if ops is None else ops

    def put(self, key: bytes, value: bytes) -> None:
        self.ops.append((key, value))

    def delete(self, key: bytes) -> None:
        self.ops.append((key, None))


class TailPiece(NamedTuple):
    """Bytes of a value's tail for the journal: `data` (in pieces) stands at `offset` of value `value_id`."""

    value_id: int
    offset: int
    data: tuple[Buffer, ...]

    @property
    def length(self) -> int:
        return sum(map(len, self.data))


class MetadataReader(Protocol):
    """Synchronous reads, in microseconds."""

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        ...

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """At most `limit` pairs with start <= key < stop in key order (from the far end if `reverse`).

        To go on, call again from the last key + b"\\0" (or with it as `stop` when reversed): no snapshot is held between calls.
        """
        ...


class MetadataStore(MetadataReader, Protocol):
    """Memtable over an LMDB snapshot, made durable by the journal."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As `get` for each of the keys, in their order; faster for many."""
        ...

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        """The values of so many keys one after the other, if these are the first and the last of them; faster still. None: not so, or some
        of it is only in memory."""
        ...

    def apply(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> None:
        """Make the batch visible to every reader at once; it and the tail bytes become durable with the next commit.

        Batches become durable in the order they were applied, each whole or not at all; `tails` no later than the batch.
        Raises Fenced if the store has failed. No await happens inside.
        """
        ...

    async def commit(self, urgent: bool = False) -> int:
        """Everything applied before the call is durable when it returns; commits that arrive together share one flush.

        Returns the commit's sequence number. Raises NoSpace where the journal cannot grow (nothing is lost: what was applied
        stays pending and a later commit may succeed), Fenced after any failed flush, for good. `urgent` may use the part of
        the journal that is kept back so that tails can always be moved out of it.
        """
        ...

    def add_commit_hook(self, hook: Callable[[], None]) -> None:
        """`hook()` runs, synchronously, right before the pending batches are taken into a commit; it may call `apply`."""
        ...

    @property
    def durable_sequence(self) -> int:
        """Sequence number of the last durable commit."""
        ...

    @property
    def applied_sequence(self) -> int:
        """The sequence number that the commit of everything applied so far will have."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be written any more (then `apply` raises Fenced); None while all is well."""
        ...

    def pinned_tails(self) -> list[tuple[int, int]]:
        """(value id, end offset) of the tails that keep the oldest journal segment from being reused; empty if none do."""
        ...

    def has_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """Do the journal's files, as they stand on the disk, take for certain all that is pending, operations of `ops_bytes` more, that
        many bytes more of that many tails, and the share `kept` of a segment besides? Arithmetic only."""
        ...

    async def make_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:
        """Have files made until `has_room`. False where the journal's limit is in the way: tails have to move into sectors first, and are
        asked to. NoSpace, IOFailure: the disk is; nothing is lost. Fenced."""
        ...

    async def clear(self) -> bool:
        """Have all that is pending committed (`urgent`), and the journal's files emptied of what is needed no more. True if either made
        room. NoSpace, Fenced."""
        ...

    @property
    def overdue(self) -> bool:
        """So much was applied that who can wait awaits `catch_up` before applying more (I7). What is pending comes in one record, and one
        that is larger than what is kept back for `urgent` commits could never be written once the journal is full; what is committed
        stays in memory until it is in LMDB."""
        ...

    def empties(self) -> None:
        """What was just applied, or is about to be, makes tails in the journal superfluous once it is committed. So that commit may stand
        beyond the journal's limit where there is no other way, the further the more it lets go of."""
        ...

    async def catch_up(self, urgent: bool = False) -> None:
        """Until nothing is `overdue`; at once if nothing is, without a checkpoint. What `commit(urgent)` raises."""
        ...

    @property
    def overfull(self) -> bool:
        """A commit is long overdue, and were many more operations applied, it would not find room in the journal as it is now. Arithmetic
        only."""
        ...

    def can_spare(self, ops_bytes: int) -> bool:
        """Would the journal as it is now, with what is kept for `urgent` commits, take what is pending, commit hooks run, and so many bytes
        of operations more? No waiting. What hooks raise."""
        ...

    @property
    def room_to_spare(self) -> bool:
        """More room was made than small commits take: `keep_room` may let go of some."""
        ...

    def keep_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> None:
        """Room beyond that is not needed for now, and may go back to the disk."""
        ...

    @property
    def journal_fill(self) -> float:
        """Share of the journal's limit in use, 0.0 to 1.0. Above 0.5 tails should be moved into sectors (or applied again)."""
        ...

    @property
    def trouble(self) -> FusefsError | None:
        """What keeps the journal from being emptied or lengthened just now. Nothing is lost by it; it is tried again."""
        ...


# --------------------------------------------------------------------------------------------------------------------
# Hosts


@dataclass(frozen=True, slots=True)
class HostCapabilities:
    """What a host can do, as probed."""

    conditional_put: bool
    ranges: bool
    versions: bool = False
    object_lock: bool = False

    def __str__(self) -> str:
        """For people: "conditional puts, ranges"."""
        able = (self.conditional_put, self.ranges, self.versions, self.object_lock)
        found = [word for word, can in zip(("conditional puts", "ranges", "versions", "Object Lock"), able, strict=True) if can]
        text = ", ".join(found) or "whole objects only"
        return text if self.conditional_put else f"{text}; no conditional puts: it does not count for a majority"


@dataclass(frozen=True, slots=True)
class HostSpace:
    """Bytes on the host: `free` for us, `total` in all. Hosts of one `disk` share them; "": with nobody, as far as is known."""

    free: int
    total: int
    disk: str = ""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a host's names: objects with their sizes, and the folders below, by last component."""

    objects: dict[str, int]
    folders: list[str]


class Host(Protocol):
    """A flat store of named bytes. Nothing it answers is trusted.

    Names are relative paths of `[A-Za-z0-9._-]` components joined by "/". Raises NotFound, NoSpace, Unavailable (does not answer, or
    answers with an error), Busy (lost a conditional put), BadArgument (a name that is not one).
    """

    @property
    def url(self) -> str:
        """As the user gave it, without secrets."""
        ...

    @property
    def capabilities(self) -> HostCapabilities: ...

    async def get(self, name: str, limit: int) -> bytes:
        """The whole object, as stored. An object longer than `limit` bytes raises Corrupt, and is not read."""
        ...

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of it, fewer where it ends before. NotFound if there is no such object."""
        ...

    async def put(self, name: str, data: Buffer) -> str:
        """Store or replace, atomically: a reader sees the old or the new. Durable on the host when it returns. Returns its tag."""
        ...

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        """As `put`, only if the object's tag is `expected` (None: only if there is none); Busy otherwise."""
        ...

    async def tag(self, name: str) -> str | None:
        """The tag of what is stored under the name now; None if nothing is."""
        ...

    async def delete(self, name: str) -> None:
        """Gone when it returns, durably. What is not there is no error. NotPermitted: these credentials may not delete."""
        ...

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        """(name, size) of every object below `prefix` (a path ending in "/", or ""), in no order."""
        ...

    async def level(self, prefix: str) -> Level:
        """What stands directly below `prefix` (as in `list`), without going further down: few entries, or the caller is wrong to ask."""
        ...

    async def space(self) -> HostSpace | None:
        """None where the host does not tell."""
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version of an object, on a host that keeps versions."""

    name: str
    version: str
    size: int
    #: When, as the host says; nanoseconds.
    stored_ns: int
    #: It is what the name stands for now.
    latest: bool
    #: A delete marker: no bytes, the name is gone as of then.
    marker: bool = False


@runtime_checkable
class LockingHost(Host, Protocol):
    """A host with versions and locks on them: what is locked stays readable under its version, whoever deletes or overwrites the name.

    `put` and `put_if` lock for a short while by themselves (`hosts.locking.SHORT_LOCK`). `delete` takes away the name; the bytes stay under
    their version until the lock is over and `purge` comes by. `get` gives what was put under the name first, where names are written once
    (hosts.layout.write_once), and for names that end in a root what has that root: whatever was done to the name since.
    """

    async def put_locked(self, name: str, data: Buffer, until_ns: int) -> str:
        """As `put`, locked until then. Returns the version."""
        ...

    async def extend(self, name: str, version: str, until_ns: int) -> str:
        """The version is locked until then at least; "": the one that was put first. Returns it. NotFound, NotPermitted."""
        ...

    async def versions(self, name: str) -> Sequence[StoredVersion]:
        """Oldest first, markers left out; a limited number, however many there are."""
        ...

    async def get_version(self, name: str, version: str, offset: int, length: int) -> bytes:
        """As `get_range`, of that version."""
        ...

    def hidden(self, start: str) -> AsyncIterator[StoredVersion]:
        """The oldest version of each name that begins with `start`, has versions, and is not shown: somebody deleted it."""
        ...

    async def folders(self, prefix: str) -> Sequence[str]:
        """As of `level`, with those in which everything was deleted."""
        ...

    async def purge(self, name: str) -> bool:
        """Every version of it that no lock protects any more is gone for good. True if nothing is left. NotPermitted: with these
        credentials."""
        ...


@runtime_checkable
class TidyHost(Protocol):
    """A host that keeps folders as such, and can do away with empty ones."""

    async def tidy(self, prefix: str) -> None:
        """Remove what folders below `prefix`, and the one it names, are empty. Not while anybody puts anything there."""
        ...


class RangeOpening(Protocol):
    """Sealed blocks that are opened as they come: `sealing.Opening`."""

    #: Of the sector; its encoded header; where the range begins in the plaintext.
    key: bytes
    header: bytes
    offset: int
    #: What is opened goes there.
    target: memoryview

    def take(self, blocks: memoryview) -> None:
        """The next of them, whole but for the shard's last. Blocking. Corrupt."""
        ...

    def done(self) -> None:
        """Somebody else has opened all of them into `target`."""
        ...


@runtime_checkable
class QuickHost(Protocol):
    """A host that may be so near that handing its answers on costs more than having them."""

    def soon(self, name: str, patience: float = 0.0) -> bool:
        """May `get_range_now` answer, or start the disk, since a range of the object was read a moment ago? Where none was, it may do what
        that takes, and be waited for: no longer than `patience`, in seconds. Never raises."""
        ...

    def get_range_now(self, name: str, offset: int, length: int) -> memoryview | None:
        """As `get_range`, in the event loop: exactly `length` bytes, good until the next call of it. None: they are not at hand; they will
        be soon where the host could start fetching them, so it may be worth asking again. Never waits, never raises."""
        ...

    async def get_range_opened(self, name: str, offset: int, length: int, step: int, opening: RangeOpening) -> int:
        """As `get_range`, given to `opening`, one or more times `step` bytes at a time, of which only the last may be shorter. Returns how
        many bytes there were. Raises what `opening` does, too; only its `plain` tells whether they were all."""
        ...


@dataclass(frozen=True, slots=True)
class Contract:
    """A time-limited agreement to keep this volume's shards on one host. In force from `start` to `end`."""

    contract_id: str
    host_number: int
    start_ns: int
    end_ns: int
    #: Contracts made from one another by renewal share a lineage (the first one's id).
    lineage: str

    def active(self, now_ns: int) -> bool:
        return self.start_ns <= now_ns < self.end_ns

    def due(self, now_ns: int) -> bool:
        """It is to be renewed: a third of its time is left, or less; or it has ended."""
        return 3 * (self.end_ns - now_ns) <= self.end_ns - self.start_ns

    def ending(self, now_ns: int) -> bool:
        """It was not renewed in time, so its host is being left: a sixth of its time is left, or less; or it has ended."""
        return now_ns >= self.ending_ns

    @property
    def ending_ns(self) -> int:
        """From when on it is `ending`."""
        return self.end_ns - (self.end_ns - self.start_ns) // 6


class Contractor(Protocol):
    """Concludes and renews contracts, and writes them down here and on the host."""

    def contracts(self) -> list[str]:
        """Ids of the active ones."""
        ...

    def all_contracts(self) -> list[Contract]:
        """Every contract on record, ended ones included, by host and end."""
        ...

    def contract(self, contract_id: str) -> Contract:
        """NotFound if there never was one."""
        ...

    def contract_for(self, host_number: int) -> Contract | None:
        """The one to use on a host: the active one that ends last, else (to read what is still there) the last to have ended."""
        ...

    def on_host(self, host_number: int) -> list[Contract]:
        """Every contract on record with that host, ended ones included, by end."""
        ...

    def in_force(self) -> Mapping[int, Contract]:
        """Host number -> the active contract that ends last, by host. As things are now: it does not change."""
        ...

    def going_on(self) -> frozenset[int]:
        """Hosts whose contract in force was renewed in time: it is not `ending`."""
        ...

    async def conclude_contract(self, host: str, duration: float) -> str:
        """`host`: a host id, URL or number of this volume. Durable on the host and here when it returns. NotFound, Unavailable, Busy (the
        host's owner is pruning), BadArgument."""
        ...

    async def renew_contract(self, contract_id: str, duration: float) -> str:
        """A new contract, from now for `duration`, with the same data on the host; the old one runs on to its end.

        An ended contract can be renewed as long as its host holds its record; NotFound once it does not: it was pruned.
        """
        ...


class HistoryGate(Protocol):
    """Whether what the volume's history no longer needs may be deleted on hosts (I3, I5)."""

    def released_sequence(self) -> int:
        """What was freed by commits up to this one is in no superblock generation that any host, not marked lost, keeps."""
        ...

    async def confirm(self, host_number: int) -> bool:
        """Re-reads which superblock the host has: is it ours? False also where it does not answer."""
        ...

    def want_release(self, sequence: int) -> None:
        """Something freed by this commit waits for an older generation to go."""
        ...


class Backlog(Protocol):
    """What is durable on this machine alone so far, as far as the volume's history is concerned (I4).

    A cut of the history knows every sector there is, and is published only once all of these are on their write quorum: so what superblocks
    speak of is never on a machine that may be lost.
    """

    #: Told when nothing of the cut waits any more.
    on_reached: Callable[[], None]

    def begin(self) -> None:
        """A cut is made now: it waits for what is on too few hosts at this moment. No await. An earlier cut does not count any more."""
        ...

    def waiting(self) -> int:
        """Sectors of the cut that are on too few hosts yet."""
        ...

    async def reached_all(self) -> None:
        """Until it is none. Unavailable: hosts do not take them now."""
        ...


class HostIO(Protocol):
    """Shards on hosts under contracts: sealed on the way out, verified on the way in. `sector_id` is the nonce (I1).

    Raises NotFound (no such contract; no such shard on the host), Expired (write, replace under a contract not in force), Corrupt,
    NoSpace, Unavailable.
    Every call records its latency and outcome in the HostDB.
    """

    async def read(self, contract_id: str, sector_root: str, sector_id: int) -> bytes:
        """The shard's plaintext; root, header and every block verified."""
        ...

    async def insecure_read(
        self, contract_id: str, sector_root: str, sector_id: int, offset: int, length: int, plaintext_length: int | None = None
    ) -> Buffer:
        """Plaintext bytes [offset, offset + length), clipped to the shard's end. The blocks they stand in are verified, the root is not.

        `plaintext_length`, where the caller knows it, saves fetching the header; what is returned verifies against it.
        """
        ...

    async def write(self, contract_id: str, data: Buffer, sector_id: int) -> str:
        """Seal and store; durable on the host when it returns the root. The caller never uses `sector_id` for other data (I1)."""
        ...

    async def replace(self, contract_id: str, data: Buffer, sector_id: int, old_sector_root: str) -> str:
        """Write, then delete `old_sector_root`, which I3 has released. After a failure the old one is still there."""
        ...

    async def delete(self, contract_id: str, sector_root: str) -> None:
        """The contract no longer holds the root; it is unlinked once no active contract on that host holds it. Unknown roots are no
        error. A renewal and the contract it was made from hold each other's data alike while both are in force."""
        ...

    def seal(self, data: Sequence[Buffer], sector_id: int) -> SealedShard:
        """Blocking, for a thread: seal once what goes to several hosts. At most once per id in this process (I1): BadArgument on a second,
        different use."""
        ...

    def seal_all(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[SealedShard]:
        """As `seal`, of several under `sector_id` and the ids that follow."""
        ...

    async def sealed(self, plaintexts: Sequence[Sequence[Buffer]], sector_id: int) -> list[SealedShard]:
        """As `seal_all`, beside the event loop. Goes on to its end when it is cancelled."""
        ...

    async def write_sealed(self, contract_id: str, shard: SealedShard) -> None:
        """Store a sealed shard under its root; durable on the host when it returns."""
        ...


@dataclass(frozen=True, slots=True)
class SealedShard:
    """A shard as hosts hold it."""

    root: str
    sector_id: int
    plaintext_length: int
    sealed: Buffer
    #: Likely to be needed for long: where hosts can lock, it is locked to the end of the contract at once.
    lasting: bool = False


# --------------------------------------------------------------------------------------------------------------------
# Sectors and values


class SectorManager(Protocol):
    """Sectors with redundancy. A sector is written at most once and never changes."""

    async def read_sector(self, sector_id: int) -> bytes:
        """The sector's bytes as they were written, integrity verified. NotFound, Corrupt (no good copy), Unavailable."""
        ...

    async def insecure_read_sector_at(self, sector_id: int, offset: int, length: int) -> bytes:
        """A range, clipped to the sector's end; its blocks are verified, the whole sector's root is not. Served from the block cache where
        possible."""
        ...

    def read_now(self, sector_id: int, offset: int, length: int, *, wait: bool = True) -> Buffer | None:
        """A range that lies within the sector, if all of it is in the block cache, or, with `wait`, comes from a disk of this machine
        before anybody else wants anything, within less than a step of the event loop may take; None otherwise."""
        ...

    async def fetched(self, sector_id: int) -> None:
        """Returns at once, unless the sector is on its way into the cache: then when it is there, or could not be had."""
        ...

    async def allocate_sector(self, replication: str = "1") -> int:
        """An id unique within the volume's history, for a sector to be written with that replication: as many follow it, for itself, as
        that has distinct shards. Their reservation is durable when it returns (I1)."""
        ...

    async def write_sector(self, sector_id: int, data: Buffer | Sequence[Buffer], replication: str) -> None:
        """Durable when it returns (I2): on its write quorum of distinct hosts, or, where hosts are far or too few take it, in staging; what
        hosts lack goes there in the background.

        At most once per id: a second call raises Exists. NoSpace, Unavailable: nothing points to what was stored; the id is spent.
        """
        ...

    async def delete(self, sector_id: int) -> None:
        """Forget the sector; its shards are deleted on the hosts once I3 allows, in the background."""
        ...


@dataclass(slots=True)
class FlushProgress:
    """What a flush has done and has to do; updated in place while it runs."""

    bytes_total: int = 0
    bytes_done: int = 0


@dataclass(frozen=True, slots=True)
class FlushReport:
    """How a flush ended: sectors that are at write quorum, not at full replication, and why."""

    degraded_sectors: int = 0
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people: what has too few copies, and why; "" if nothing has."""
        reasons = "; ".join(dict.fromkeys(self.reasons))
        if self.degraded_sectors:
            return f"{counted(self.degraded_sectors, 'sector')} with too few copies: {reasons or 'see fusefs status'}"
        return f"what has a copy there has one fewer now: {reasons}" if reasons else ""


class Values(Protocol):
    """Append-only values: the one place that knows tails, extents and sectors. Content by value id.

    A value's bytes are, in order: committed extents | sectors in flight | tail in memory. `size_of` counts all of them.
    """

    def create(self, batch: Batch, owner: int, replication: str) -> int:
        """A new, empty value that belongs to inode `owner`; exists once the batch is applied. Returns its id."""
        ...

    def size_of(self, value_id: int) -> int:
        """Bytes appended so far. NotFound."""
        ...

    def sizes_of(self, value_ids: Sequence[int]) -> list[int | None]:
        """As `size_of` for each of the values, in their order, None where there is no such value; faster for many."""
        ...

    def replication_of(self, value_id: int) -> str: ...

    def set_replication(self, batch: Batch, value_id: int, replication: str) -> None:
        """Once the batch is applied, bytes appended are stored that way, and those there are being moved, in the background, also after a
        restart. No await between this and applying the batch; at most once per value and batch."""
        ...

    async def stored_as(self, value_id: int) -> dict[str, int]:
        """Replication -> bytes that are in sectors of it. Empty where there is no such value."""
        ...

    def check_room(self) -> None:
        """NoSpace from a commit that found no room on the local disk until one that did, and while so much waits for a commit that the
        journal could not take more: what cannot be made durable is refused (I7). For what cannot wait; who appends is held back."""
        ...

    async def hold_back(self) -> None:
        """For who makes something new and can wait: until a commit that is due has been made, so that `check_room` need not refuse. Usually
        without a checkpoint. NoSpace, Fenced: what that commit raised."""
        ...

    async def keep_pace(self, removing: bool = False) -> None:
        """For who removes or changes what is there: waits as `hold_back` does, for memory holds what is not in LMDB (I7). Where that does
        not help, `removing` is not refused, since it makes room; anything else is as soon as no commit could take it. NoSpace, Fenced."""
        ...

    async def reserve(self, value_id: int, length: int) -> None:
        """Wait until `length` more bytes may be appended: until there is room for them in memory, and in the journal. However fast
        appends come, they wait as long as hosts take what was appended before. NoSpace or Unavailable when waiting would not help.

        The permission holds until the next await of the caller: call `append_now` before it.
        """
        ...

    def reserve_now(self, value_id: int, length: int) -> bool:
        """As `reserve`, where that takes no waiting; False where it does, or where there is an error for `reserve` to raise."""
        ...

    def append_now(self, value_id: int, data: Buffer) -> int:
        """Append; returns the offset the bytes now stand at. No await happens inside. `data` is kept, so must not change: pass bytes."""
        ...

    async def read(self, value_id: int, offset: int, size: int) -> Buffer:
        """Bytes [offset, offset + size), clipped to the size; tails included. Nobody changes them."""
        ...

    def ends_with(self, value_id: int, data: bytes) -> bool:
        """The value's newest bytes are these. False also where that cannot be told at once."""
        ...

    def read_now(self, value_id: int, offset: int, size: int) -> Buffer | None:
        """As `read`, where that takes no waiting; None where it does, or where there is an error for `read` to raise. What it gives is not
        changed by anybody."""
        ...

    def free(self, batch: Batch, value_id: int) -> None:
        """The value's bytes are garbage once the batch is applied; what it held is reclaimed in the background."""
        ...

    async def settle(self, value_id: int, upto: int) -> None:
        """Wait until no sector in flight holds bytes below `upto` that the journal does not have (they are in extents, or back in the tail
        because hosts failed). A few bytes are not waited for."""
        ...

    def uncommitted_tail(self, value_id: int) -> list[TailPiece]:
        """For `MetadataStore.apply`: what the journal does not have yet, up to the first byte in flight (of a few bytes: all); from then on
        it counts as handed over."""
        ...

    async def commit(self, value_id: int) -> None:
        """fsync of one value: every byte appended before the call survives kill -9 and power cuts when it returns."""
        ...

    async def commit_all(self) -> None:
        """As `commit`, for every value that has a tail; a value that is being appended to is committed up to some prefix of it."""
        ...

    def local_at(self, value_id: int, offset: int) -> bool:
        """True if the byte at `offset` can be had without asking a host (tail, or block cache)."""
        ...

    def accepting(self) -> bool:
        """False while hosts are full, away, or below the reserve of free space: handles opened now should be direct."""
        ...

    async def flush(self, progress: FlushProgress | None = None) -> FlushReport:
        """Every tail in sectors, every sector at full replication where its hosts answer, all of it committed."""
        ...


# --------------------------------------------------------------------------------------------------------------------
# Names


class Attributes(msgspec.Struct, frozen=True, gc=False):
    """What stat(2) shows of an inode."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    #: Bytes stored (holes excluded), for st_blocks.
    stored: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One directory entry. `cookie` is unique in its directory, grows with time and names the place after this entry."""

    cookie: int
    name: bytes
    ino: int
    mode: int


class ListedInode(Protocol):
    """Of an inode that is listed, what `Attributes` says of it besides its sizes. Times in nanoseconds."""

    @property
    def mode(self) -> int: ...
    @property
    def nlink(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def rdev(self) -> int: ...
    @property
    def atime(self) -> int: ...
    @property
    def mtime(self) -> int: ...
    @property
    def ctime(self) -> int: ...


class Listed(NamedTuple):
    """Directory entries with attributes, in cookie order; columns, because there are thousands of them. As long as the namespace's
    `version` stays: inodes that are in memory are not copied."""

    names: Sequence[bytes]
    inos: Sequence[int]
    cookies: Sequence[int]
    inodes: Sequence[ListedInode]
    sizes: Sequence[int]
    #: See Attributes.
    stored: Sequence[int]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An operation the append-only rules refused, for the log and `status`."""

    when_ns: int
    program: str
    path: str
    offset: int
    reason: str


class Namespace(Protocol):
    """Names, inodes, attributes and the file map: POSIX without a kernel. The root directory is inode 1.

    Changes are visible at once and durable with the next commit, in order. Names are bytes, anything but "/" and NUL, at most 255.
    Raises NotFound, Exists, NotPermitted (append-only rules, worm), NotEmpty, NotADirectory, IsADirectory, NameTooLong, TooManyLinks.
    Who may do what is the kernel's business, not checked here.
    """

    # Names: synchronous, atomic towards other tasks.
    def lookup(self, parent: int, name: bytes) -> int: ...
    def find(self, parent: int, name: bytes) -> int | None:
        """As `lookup`; None where there is no such name."""
        ...

    def attributes(self, ino: int) -> Attributes: ...
    def set_attributes(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
    ) -> None:
        """Sets what is given (mode: permission bits only); ctime becomes now unless given."""
        ...

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0, replication: str | None = None) -> int:
        """A regular file, fifo, socket or device by the type bits of `mode` (none: regular). Setgid directories hand down their gid.

        It waits for nothing, so whoever creates without end, and awaits nothing meanwhile (`hold_back`, an append, a commit), gets NoSpace
        before more is pending than the journal takes; what was created until then can be committed. So for every new name."""
        ...

    async def hold_back(self) -> None:
        """Before a new name, for who can wait: until what is due is committed. Usually without a checkpoint. NoSpace, Fenced."""
        ...

    async def keep_pace(self, removing: bool = False) -> None:
        """As `Values.keep_pace`, before a name is removed or changed, or attributes are."""
        ...

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> int: ...
    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> int: ...
    def readlink(self, ino: int) -> bytes: ...
    def link(self, ino: int, parent: int, name: bytes) -> None: ...

    def unlink(self, parent: int, name: bytes) -> int:
        """Returns the inode. With the last name goes the content, once nothing pins the inode; until then an orphan entry (same commit)
        keeps it."""
        ...

    def rmdir(self, parent: int, name: bytes) -> int: ...

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, noreplace: bool = False, exchange: bool = False
    ) -> None:
        """Over an existing file: what was appended to the source before the call is in the same commit as the rename."""
        ...

    def entries(self, ino: int, after: int, limit: int) -> list[Entry]:
        """Entries with a cookie above `after`, in cookie order; "." and ".." are not among them. Stable while others come and go."""
        ...

    @property
    def version(self) -> int:
        """Grows with everything that could change what `find`, `attributes` or `listing` say."""
        ...

    def listing(self, ino: int, after: int, limit: int) -> Listed:
        """As `entries`, with the attributes of each."""
        ...

    def parent_of(self, ino: int) -> int:
        """A directory's parent (the root's is itself)."""
        ...

    def path_of(self, ino: int) -> bytes | None:
        """Some path of the inode from the root, without a leading "/"; None if it has no name any more."""
        ...

    # Lifetime of inodes without a name.
    def pin(self, ino: int) -> None:
        """The inode outlives its last name until as many `unpin`s."""
        ...

    def pin_seen(self, ino: int) -> None:
        """As `pin`, of an inode with a name that `find` or `listing` told of since the last await: it is not looked at again."""
        ...

    def pin_listed(self, inos: Sequence[int]) -> None:
        """`pin_seen` of each, as often as it is there."""
        ...

    def unpin(self, ino: int, count: int = 1) -> None: ...

    # Content, by the append-only rules.
    async def write(self, ino: int, offset: int, data: Buffer) -> None:
        """All of `data` or nothing of it. At the end: appended. Beyond: a hole and the bytes. Into never-written bytes: filled. Over
        identical bytes: accepted. Over others: NotPermitted. mtime and ctime become now. NoSpace, Unavailable."""
        ...

    async def append(self, ino: int, data: Buffer) -> int:
        """At the end, wherever that is when it happens; returns the file offset."""
        ...

    async def read(self, ino: int, offset: int, size: int) -> Buffer:
        """Clipped to the file's size; holes read as zeros."""
        ...

    def write_now(self, ino: int, offset: int, data: bytes) -> bool:
        """As `write`, for a file that simply goes on, where that takes no waiting. False, and nothing is changed, where it does, or where
        there is an error for `write` to raise."""
        ...

    def read_now(self, ino: int, offset: int, size: int) -> Buffer | None:
        """As `Values.read_now`."""
        ...

    def truncate(self, ino: int, size: int) -> None:
        """To 0: a new, empty value. Larger: a hole. To the size it has: nothing. To another smaller size: NotPermitted."""
        ...

    async def commit(self, ino: int) -> None:
        """fsync: content, attributes and names as of the call are durable locally when it returns."""
        ...

    def last_page_local(self, ino: int) -> bool:
        """True if appending needs nothing from a host: the page (4 KiB) the file ends in is in a tail, in the cache or empty."""
        ...

    # Attributes only fusefs knows.
    def replication_of(self, ino: int) -> str: ...
    def set_replication(self, ino: int, spec: str) -> None:
        """What is created below the directory later is stored as `spec`; "" inherits."""
        ...

    async def give_replication(self, ino: int, spec: str) -> None:
        """Also what is there: every file below the directory, or the file. It is moved in the background (`Values.set_replication`)."""
        ...

    async def stored(self, ino: int) -> ReplicationStatus:
        """What holds for a directory or file, who says so, and how it and what is below it is stored."""
        ...

    def set_worm(self, ino: int) -> None:
        """From now on nothing below this directory can be removed, replaced or renamed. Cannot be undone."""
        ...

    def getxattr(self, ino: int, name: bytes) -> bytes: ...
    def setxattr(self, ino: int, name: bytes, value: bytes, *, create: bool = False, replace: bool = False) -> None: ...
    def listxattr(self, ino: int) -> list[bytes]: ...
    def removexattr(self, ino: int, name: bytes) -> None: ...


class Files(Protocol):
    """Key-value storage with append-only values. Names are paths in the same Namespace as the mount's ("logs/app/today")."""

    async def open(
        self, name: str, existing: bool | None = None, write: bool = False, read: bool = True, replication: str | None = None
    ) -> int:
        """existing=True: must exist. False: must not. None: either. Missing parent directories are made when a file is made.

        replication "" or None: the file's own, or inherited from directory and volume; one that differs from an existing file's is
        BadArgument.
        Returns a descriptor; one unused for `idle_timeout` may be closed by the collector, and using it then raises NotFound, saying so.
        """
        ...

    async def close(self, fd: int) -> None: ...
    async def size_of(self, fd: int) -> int: ...
    async def append(self, fd: int, data: Buffer) -> None:
        """Visible to every reader when it returns; durable as a write(2) without fsync is (see `commit`)."""
        ...

    async def read_at(self, fd: int, offset: int, size: int) -> bytes:
        """Sees every byte appended so far."""
        ...

    async def commit(self, fd: int) -> None:
        """As fsync(2)."""
        ...

    async def list(self) -> dict[str, int]:
        """name -> size of every regular file."""
        ...

    def entries(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        """(name, size) of the files whose name starts with `prefix`, for millions of them."""
        ...

    async def delete(self, name: str) -> None:
        """NotFound if there is no such file. Directories left empty stay."""
        ...
