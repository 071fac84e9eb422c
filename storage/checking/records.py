"""The key space: every record has a key of its kind and decodes; counters are above what they have handed out.

Records that do not decode are set aside, so that the passes after this one find them missing, which is what they can repair. Not so those
of hosts, contracts, epochs and counters: what is wrong with them only a recovery can mend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from storage.checking.patient import Patient, reason
from storage.checking.scanning import pages
from storage.contractor import decode_contract
from storage.epochs import Epochs, decode_epoch
from storage.errors import Corrupt
from storage.hosts.holders import decode_holders
from storage.hosts.registry import decode_record
from storage.interfaces import Batch
from storage.metadata import keys
from storage.metadata.counters import Counter
from storage.metadata.keys import read_u32, read_u64, u64
from storage.namespace.directories import check_name, show
from storage.namespace.records import (
    COUNTS_KEY,
    ORPHAN_INODE,
    ORPHAN_MAP,
    decode_counts,
    decode_dirent,
    decode_handing_down,
    decode_inode,
    decode_map,
    decode_place,
)
from storage.renewal import decode_trouble, is_trouble, trouble_host
from storage.sectors.doubts import MISSING
from storage.sectors.mending import MOVING
from storage.sectors.partial import CLASSES
from storage.sectors.records import decode_sector
from storage.values.records import decode_extent, decode_value

#: How far a counter that was set back is put ahead of what is in use: beyond whatever it has handed out and is on no record any more (I1).
JUMP = 1 << 32

_Check = Callable[[bytes, bytes], object]


def _shape(good: bool) -> None:
    if not good:
        raise Corrupt("its key or value has a length that no record of this kind has")


def _name(key: bytes, raw: bytes) -> None:
    _shape(len(key) > 9)
    check_name(key[9:])
    decode_dirent(read_u64(key, 1), raw)


def _place(key: bytes, raw: bytes) -> None:
    check_name(decode_place(key, raw)[0])


def _map(key: bytes, raw: bytes) -> None:
    _shape(len(key) == 17)
    decode_map(read_u64(key, 1), read_u64(key, 9), raw)


def _sized(length: int, decode: _Check) -> _Check:
    def check(key: bytes, raw: bytes) -> None:
        _shape(len(key) == length)
        decode(key, raw)

    return check


def _orphan(_key: bytes, raw: bytes) -> None:
    _shape(raw in (ORPHAN_INODE, ORPHAN_MAP))


def _nothing(_key: bytes, raw: bytes) -> None:
    _shape(raw == b"")


def _copies(_key: bytes, raw: bytes) -> None:
    _shape(raw in (b"", MOVING))


def _partial(key: bytes, raw: bytes) -> None:
    _shape(key[1] < CLASSES and raw.isascii())


def _setting(key: bytes, raw: bytes) -> None:
    if key == COUNTS_KEY:
        decode_counts(raw)
    elif is_trouble(key):
        trouble_host(key)
        if decode_trouble(raw) is None:
            raise Corrupt("it does not say why a contract could not be renewed")


def _anything(_key: bytes, _raw: bytes) -> None:
    return


#: prefix -> (what it is called, the check, whether a bad one is set aside)
_KINDS: dict[bytes, tuple[str, _Check, bool]] = {
    keys.COUNTER: ("counter", lambda _key, raw: _shape(len(raw) == 8 and 0 < read_u64(raw) < 2**63), False),
    keys.EPOCH: ("epoch", decode_epoch, False),
    keys.HOST: ("host", decode_record, False),
    keys.CONTRACT: ("contract", decode_contract, False),
    keys.HOLDERS: ("holders of a shard", _sized(37, lambda key, raw: decode_holders(raw, key[1:33])), True),
    keys.HOST_STATS: ("statistics of a host", _anything, True),
    keys.SECTOR: ("sector", _sized(9, lambda key, raw: decode_sector(raw, read_u64(key, 1))), True),
    keys.FRESH: ("fresh mark", _sized(9, _nothing), True),
    keys.PARTIAL: ("partial index", _sized(10, _partial), True),
    keys.UNDERREPLICATED: ("copies index", _sized(9, _copies), True),
    keys.DOUBTED: ("doubted place", _sized(13, lambda _key, raw: _shape(raw in (b"", MISSING))), True),
    keys.FREED: ("freed sector", _sized(17, lambda key, raw: decode_sector(raw, read_u64(key, 9))), True),
    keys.VALUE: ("value", _sized(9, lambda key, raw: decode_value(raw, read_u64(key, 1))), True),
    keys.EXTENT: ("extent", decode_extent, True),
    keys.GARBAGE: ("freed value", _sized(9, _nothing), True),
    keys.MISPLACED: ("mark of misplaced bytes", _sized(9, lambda _key, raw: _shape(len(raw) == 8)), True),
    keys.HANDING_DOWN: ("mark of a directory", _sized(9, lambda key, raw: decode_handing_down(read_u64(key, 1), raw)), True),
    keys.INODE: ("inode", _sized(9, lambda key, raw: decode_inode(read_u64(key, 1), raw)), True),
    keys.NAME: ("name", _name, True),
    keys.COOKIE: ("place in a directory", _place, True),
    keys.ORPHAN: ("orphan", _sized(9, _orphan), True),
    keys.MAP: ("file map", _map, True),
    keys.XATTR: ("extended attribute", lambda key, _raw: _shape(len(key) > 9), True),
    keys.SETTING: ("setting", _setting, True),
    keys.STORE: ("the store's own", _anything, False),
    keys.LOCAL: ("this directory's own", _anything, False),
    keys.LOST: ("lost host", _sized(5, lambda _key, raw: _shape(len(raw) == 8)), True),
    keys.LEAVING: ("host that is left", _sized(5, lambda _key, raw: _shape(len(raw) == 8)), True),
}


def describe(key: bytes) -> str:
    """A record by its key, for people."""
    kind = _KINDS.get(key[:1])
    if kind is None:
        return f"record {show(key[:1])} {key[1:33].hex()}"
    rest = key[1:]
    if key[:1] == keys.HOLDERS and len(rest) == 36:
        text = f"{rest[:6].hex()} on host {read_u32(rest, 32)}"
    elif key[:1] in (keys.COUNTER, keys.CONTRACT, keys.SETTING, keys.STORE, keys.LOCAL):
        text = show(rest)
    elif key[:1] in (keys.EPOCH, keys.HOST, keys.HOST_STATS, keys.LOST, keys.LEAVING) and len(rest) == 4:
        text = str(read_u32(rest))
    elif key[:1] in (keys.NAME, keys.XATTR) and len(rest) > 8:
        text = f"{show(rest[8:])} of inode {read_u64(rest)}"
    elif key[:1] == keys.DOUBTED and len(rest) == 12:
        text = f"of sector {read_u64(rest)} on host {read_u32(rest, 8)}"
    elif len(rest) == 16:
        text = f"{read_u64(rest)} at {read_u64(rest, 8)}"
    else:
        text = str(read_u64(rest)) if len(rest) == 8 else rest.hex()
    return f"{kind[0]} {text}"


async def check_records(patient: Patient) -> None:
    """All of them, once, in key order."""
    patient.stage("records")
    at = b"\0"
    while found := patient.store.scan(at, b"\xff" * 8, 1):
        prefix = found[0][0][:1]
        async for page in pages(patient.store, prefix):
            for key, raw in page:
                await _check_one(patient, key, raw)
            patient.progress.done += len(page)
        patient.report.looked_at["records"] = patient.progress.done
        at = keys.prefix_end(prefix)
    await _check_counters(patient)


async def _check_one(patient: Patient, key: bytes, raw: bytes) -> None:
    kind = _KINDS.get(key[:1])
    if kind is None:
        await patient.found("unknown-record", describe(key), "records of this kind are not known")
        return
    why = reason(lambda: kind[1](key, raw))
    if why is None:
        return
    batch = Batch()
    if kind[2]:
        patient.set_aside(batch, key)
    await patient.found("undecodable", describe(key), f"the record does not decode ({why})", batch)


async def _check_counters(patient: Patient) -> None:
    """What they would hand out next is above everything there is."""
    store = patient.store

    def last(*prefixes: bytes) -> int:
        """The highest number that follows a prefix; keys of other shapes are findings already."""
        found = [store.scan(prefix, prefix + b"\x7f" + b"\xff" * 30, 1, reverse=True) for prefix in prefixes]
        return max((read_u64(pairs[0][0], 1) for pairs in found if pairs and len(pairs[0][0]) >= 9), default=0)

    cookies = 0
    async for page in pages(store, keys.COOKIE):
        cookies = max(cookies, *(read_u64(key, 9) if len(key) == 17 else 0 for key, _ in page))
    highest = {
        b"sector": last(keys.SECTOR, keys.FRESH),
        b"value": last(keys.VALUE, keys.EXTENT, keys.GARBAGE),
        b"inode": last(keys.INODE, keys.ORPHAN, keys.MAP, keys.NAME),
        b"cookie": min(cookies, 2**63 - 2),
    }
    async for page in pages(store, keys.FREED):
        highest[b"sector"] = max(highest[b"sector"], *(read_u64(key, 9) if len(key) == 17 else 0 for key, _ in page))
    if patient.epochs is not None and patient.epochs.all():
        highest[b"sector"] = max(highest[b"sector"], patient.epochs.current.first_sector_id)
    for name, number in highest.items():
        key = keys.COUNTER + name
        raw = store.get(key)
        if number and (raw is None or (len(raw) == 8 and read_u64(raw) <= number)):
            batch = Batch()
            batch.put(key, u64(number + JUMP))
            said = "is missing" if raw is None else f"says {read_u64(raw)}"
            await patient.found("counter", describe(key), f"it {said}, and {number} is in use", batch)


def counters_are_sound(patient: Patient) -> bool:
    """No counter is damaged: numbers can be handed out."""
    return all(reason(partial(Counter, patient.store, name, 1)) is None for name in (b"sector", b"value", b"inode", b"cookie"))


async def check_epochs(patient: Patient) -> bool:
    """Every sector id was reserved by an epoch on record. False: nothing can be repaired, since no new epoch could begin."""
    why = reason(lambda: Epochs.load(patient.store))
    if why is not None:
        await patient.found("epochs", "epochs", why)
        return False
    epochs = Epochs.load(patient.store)
    patient.epochs = epochs
    first = patient.store.scan(keys.SECTOR, keys.prefix_end(keys.SECTOR), 1)
    if first and len(first[0][0]) == 9:
        sector_id = read_u64(first[0][0], 1)
        if reason(lambda: epochs.for_sector(sector_id)) is not None:
            await patient.found("epochs", f"sector {sector_id}", "no epoch on record has reserved its id, so its key is not known")
    return True
