"""What all passes share: the store, the hosts, how to repair, and where things are called what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from storage.checking.findings import CheckProgress, CheckReport
from storage.config import VolumeConfig
from storage.contractor import Contractor
from storage.epochs import Epochs
from storage.errors import Corrupt, FusefsError
from storage.host_io import HostIO
from storage.hosts.registry import HostRegistry
from storage.interfaces import Batch, TailPiece
from storage.keys import SALT_SIZE
from storage.metadata.keys import COUNTER, LOCAL, SECTOR, VALUE, read_u64, u64
from storage.metadata.store import Store
from storage.namespace.directories import show
from storage.namespace.records import (
    ROOT,
    Dirent,
    InodeRecord,
    cookie_key,
    decode_dirent,
    decode_inode,
    decode_place,
    inode_key,
    name_key,
)
from storage.seams import Seams
from storage.sectors.records import SectorRecord, decode_sector
from storage.sectors.staging import Staging
from storage.sectors.strays import Strays
from storage.values.records import ValueRecord, decode_value

T = TypeVar("T")

#: Repairs between two commits.
COMMIT_EVERY = 500
#: Sector ids reserved with the epoch a repair begins; none is used.
SECTOR_RANGE = 4096
#: Names in a path are looked up at most so deep: a path is for messages.
_DEPTH = 4096


class Patient:
    """One volume under examination."""

    def __init__(
        self, store: Store, config: VolumeConfig, seams: Seams, report: CheckReport, progress: CheckProgress, *, repair: bool
    ) -> None:
        self.store = store
        self.config = config
        self.seams = seams
        self.report = report
        self.progress = progress
        self.repair = repair
        #: Value -> (offset, length) of its tails in the journal, by offset.
        self.tails: dict[int, list[tuple[int, int]]] = {}
        #: Bytes of a value's tails from the journal, for moving them; set by `check`.
        self.tail_bytes: Callable[[int], list[tuple[int, bytes]]] = lambda _value: []
        # None where their records do not allow it.
        self.epochs: Epochs | None = None
        self.registry: HostRegistry | None = None
        self.contractor: Contractor | None = None
        self.host_io: HostIO | None = None
        #: What is on the local disk for hosts that do not have it yet; and what finds shards on hosts that no record names.
        self.staging: Staging | None = None
        self.strays: Strays | None = None
        #: Every host the volume has answers.
        self.hosts_complete = False
        #: Inodes whose records were made anew: a map without an owner may be theirs.
        self.rebuilt: list[int] = []
        self._begun = False
        self._repairs = 0

    # ---- repairing

    async def fix(self, batch: Batch, tails: Sequence[TailPiece] = ()) -> bool:
        """One repair, if repairs are wanted: visible at once, durable in order, whole or not at all. True if it was made."""
        if not self.repair:
            return False
        if not self._begun:
            await self._begin()
        self.store.apply(batch, tails)
        self._repairs += 1
        if self._repairs % COMMIT_EVERY == 0:
            await self.store.commit()
        return True

    async def _begin(self) -> None:
        """The journal takes commits only of an epoch: a new one begins with the first repair (I1, as at every mount)."""
        epochs = self.epochs if self.epochs is not None else Epochs.load(self.store)
        raw = self.store.get(COUNTER + b"sector")
        first = max(read_u64(raw) if raw is not None and len(raw) == 8 else 1, self._last_sector() + 1)
        if epochs.all():
            first = max(first, epochs.current.first_sector_id)
        batch = Batch()
        salt = self.seams.random.token_bytes(SALT_SIZE)
        epoch = epochs.begin(batch, salt, first, self.seams.clock.time_ns(), self.store.durable_sequence + 1)
        batch.put(COUNTER + b"sector", u64(first + SECTOR_RANGE))
        self.store.begin_epoch(epoch.number, epoch.salt)
        self.store.apply(batch)
        await self.store.commit()
        self._begun = True

    def _last_sector(self) -> int:
        found = self.store.scan(SECTOR, SECTOR + b"\xff" * 9, 1, reverse=True)
        return read_u64(found[0][0], 1) if found and len(found[0][0]) == 9 else 0

    async def commit(self) -> None:
        """Everything repaired so far is durable."""
        if self._begun:
            await self.store.commit()

    def number(self, counter: bytes) -> int:
        """A new inode, value or cookie number; its reservation is applied before anything that uses it. Only while repairing."""
        key = COUNTER + counter
        raw = self.store.get(key)
        number = read_u64(raw) if raw is not None and len(raw) == 8 else 1
        batch = Batch()
        batch.put(key, u64(number + 1))
        self.store.apply(batch)
        return number

    def set_aside(self, batch: Batch, key: bytes) -> None:
        """In `batch`: the record goes out of everybody's way, and is kept."""
        raw = self.store.get(key)
        if raw is not None:
            batch.put((LOCAL + b"check." + key)[:500], raw)
        batch.delete(key)

    async def found(self, kind: str, where: str, what: str, batch: Batch | None = None) -> bool:
        """A finding, and its repair where there is one. True if it was repaired."""
        repaired = await self.fix(batch) if batch is not None and batch.ops else False
        self.report.add(kind, where, what, repaired=repaired)
        return repaired

    def note(self, kind: str, where: str, what: str) -> None:
        self.report.add(kind, where, what, note=True)

    def stage(self, name: str, total: int | None = None) -> None:
        self.progress.stage, self.progress.done, self.progress.total = name, 0, total

    # ---- records, None for what is missing or does not decode (which is a finding of its own)

    def inode(self, ino: int) -> InodeRecord | None:
        raw = self.store.get(inode_key(ino)) if 0 < ino < 2**63 else None
        return None if raw is None else attempt(decode_inode, ino, raw)

    def dirent(self, parent: int, name: bytes) -> Dirent | None:
        raw = self.store.get(name_key(parent, name))
        return None if raw is None else attempt(decode_dirent, parent, raw)

    def place(self, parent: int, cookie: int) -> tuple[bytes, Dirent] | None:
        key = cookie_key(parent, cookie)
        raw = self.store.get(key)
        return None if raw is None else attempt(decode_place, key, raw)

    def value(self, value_id: int) -> ValueRecord | None:
        raw = self.store.get(VALUE + u64(value_id))
        return None if raw is None else attempt(decode_value, raw, value_id)

    def sector(self, sector_id: int) -> SectorRecord | None:
        raw = self.store.get(SECTOR + u64(sector_id))
        return None if raw is None else attempt(decode_sector, raw, sector_id)

    def size_of(self, value_id: int, sealed: int) -> int:
        """As `Values.recover` will have it: sealed bytes and what of the journal's tails goes on from there."""
        size = sealed
        for offset, length in self.tails.get(value_id, ()):
            if offset <= size < offset + length:
                size = offset + length
        return size

    # ---- names for people

    def path(self, ino: int) -> str:
        """The path from the volume's root, or the inode's number where it cannot be known."""
        parts: list[bytes] = []
        at = ino
        for _ in range(_DEPTH):
            if at == ROOT:
                return "/" + show(b"/".join(reversed(parts)))
            rec = self.inode(at)
            if rec is None or not rec.parent or not rec.nlink:
                break
            entry = self.dirent(rec.parent, rec.name)
            if entry is None or entry.ino != at:
                break
            parts.append(rec.name)
            at = rec.parent
        return f"inode {ino}"

    def file_of(self, value_id: int) -> str:
        """Where a value's bytes are seen."""
        record = self.value(value_id)
        return f"value {value_id}" if record is None or not record.owner else self.path(record.owner)

    def url(self, number: int) -> str:
        return f"host {number}" if self.registry is None else f"host {self.registry.url(number)}"


def attempt(decode: Callable[..., T], *args: object) -> T | None:
    """What the decoder says, None if it says Corrupt."""
    try:
        return decode(*args)
    except Corrupt:
        return None


def reason(decode: Callable[[], object]) -> str | None:
    """Why something does not decode; None if it does."""
    try:
        decode()
    except FusefsError as error:
        return str(error)
    return None
