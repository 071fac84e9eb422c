"""Targets of the metadata's records, as a damaged database or a hostile log may have them."""

from __future__ import annotations

import json
import stat
import struct
from functools import cache
from typing import Any

import msgspec

from storage.contractor import decode_contract, encode_contract
from storage.epochs import Epoch, Epochs, decode_epoch, encode_epoch
from storage.errors import Corrupt
from storage.hosts.holders import Claim, Holders, decode_holders
from storage.hosts.hostdb import HostDB
from storage.hosts.registry import HostRecord, decode_record, encode_record
from storage.interfaces import Batch, Contract, HostCapabilities
from storage.metadata.counters import Counter
from storage.metadata.keys import COUNTER, HOST_STATS, SECTOR, read_u64, u32
from storage.namespace.records import (
    CountsRecord,
    Dirent,
    InodeRecord,
    MapRecord,
    decode_counts,
    decode_dirent,
    decode_inode,
    decode_inodes,
    decode_map,
    decode_place,
    decode_places,
    decode_straight,
    encode_counts,
    encode_dirent,
    encode_inode,
    encode_map,
    encode_place,
)
from storage.replication import parse_replication
from storage.sealing import ShardHeader
from storage.sectors.partial import PartialIndex
from storage.sectors.records import SectorRecord, ShardRecord, decode_sector
from storage.values.records import Extent, ValueRecord, decode_extent, decode_sealed, decode_value
from tests.fakes import ManualClock, MemoryStore, make_seams
from tests.fuzz.frames import SALT, VOLUME_ID
from tests.fuzz.target import Target, golden, same

_encode = msgspec.msgpack.encode
_ID = "0123456789abcdef" * 2
_NOW = 1_735_689_600 * 10**9
_SEAMS = make_seams(clock=ManualClock())


@cache
def _golden_namespace() -> dict[str, bytes]:
    return {name: bytes.fromhex(raw) for name, raw in json.loads(golden("namespace-records-1.json")).items()}


@cache
def _golden_sectors() -> dict[str, bytes]:
    return {name: bytes.fromhex(raw) for name, raw in (line.split("=") for line in golden("sectors.txt").decode().split())}


def _sector(data: bytes) -> None:
    record = decode_sector(data, 5)
    same(decode_sector(record.encode(), 5), record)
    parse_replication(record.replication)
    # What readers and the deleter do with it.
    for shard in record.shards:
        ShardHeader(VOLUME_ID, SALT, 1, shard.length, shard.shard_id)
        for number in shard.hosts:
            u32(number)
    struct.pack(">II", record.length, max(record.data, record.live))


def _value(data: bytes) -> None:
    record = decode_value(data, 5)
    same(decode_sealed([data], [5]), [record.sealed])
    same(decode_value(record.encode(), 5), record)
    parse_replication(record.replication)
    struct.pack(">QQ", record.owner, record.sealed)


def _extent(data: bytes) -> None:
    """Key and value, one behind the other."""
    extent = decode_extent(data[:-16], data[-16:])
    same((extent.key, extent.encode()), (data[:-16], data[-16:]))


def _holders(data: bytes) -> None:
    holders = decode_holders(data, bytes(32))
    same(decode_holders(holders.encode(), bytes(32)), holders)
    holders.held([Claim(lineage, ((lineage, 1),)) for lineage in holders.lineages])


def _holders_seeds() -> list[bytes]:
    made = Holders()
    made.write(_ID)
    made.write("ff" * 16)
    made.release(Claim(_ID, ((_ID, 1),)), 7)
    return [golden("holders_record.bin"), golden("holders_record-2.bin"), made.encode()]


def _host_record(data: bytes) -> None:
    key = b"h" + u32(7)
    record = decode_record(key, data)
    same(encode_record(record)[0], key)
    same(decode_record(*encode_record(record)), record)


def _host_record_seeds() -> list[bytes]:
    made = HostRecord(7, _ID, "dir:/mnt/disk", "rack1", _NOW, HostCapabilities(True, True))
    return [golden("host_record.bin")[5:], encode_record(made)[1]]


def _contract_record(data: bytes) -> None:
    key = b"k" + _ID.encode()
    contract, ordinal, renewed_from = decode_contract(key, data)
    same(decode_contract(*encode_contract(contract, ordinal, renewed_from)), (contract, ordinal, renewed_from))


def _contract_record_seeds() -> list[bytes]:
    return [golden("contract_record.bin")[33:], encode_contract(Contract(_ID, 3, _NOW, _NOW + 1, _ID), 9, None)[1]]


def _epoch_record(data: bytes) -> None:
    epoch = decode_epoch(b"e" + u32(7), data)
    same(decode_epoch(*encode_epoch(epoch)), epoch)
    Epochs([epoch]).header_for(VOLUME_ID, epoch.first_sector_id, 100).encode()


def _statistics(data: bytes) -> None:
    """Damaged ones are forgotten, not an error."""
    hosts = HostDB(MemoryStore({HOST_STATS + u32(7): data}), _SEAMS)
    hosts.stats(7)
    hosts.rank([7, 8])
    hosts.rank_for_write([7, 8], {7: 1})
    hosts.save(Batch())


def _inode(data: bytes) -> None:
    decode_straight([data])  # whatever it is: nothing is raised
    record = decode_inode(5, data)
    same(decode_inodes([5], [data]), [record])
    straight = decode_straight([data])
    same(straight is not None, record.is_regular and not record.map)
    if straight is not None:
        same([(each.mode, each.value, each.ctime) for each in straight], [(record.mode, record.value, record.ctime)])
    same(decode_inode(5, encode_inode(record)), record)
    struct.pack(">QQqQ", record.value, record.map, record.mtime, record.parent)


def _inode_seeds() -> list[bytes]:
    golden = _golden_namespace()
    plain = InodeRecord(stat.S_IFREG | 0o644, 1, 0, 0, 0, 12, 0, 100, 0, 100, 1, 2, 3, 1, b"name", 0, "2", b"")
    return [*(raw for name, raw in golden.items() if name.startswith("inode: ")), encode_inode(plain)]


def _dirent(data: bytes) -> None:
    entry = decode_dirent(5, data)
    same(decode_dirent(5, encode_dirent(entry)), entry)


def _place(data: bytes) -> None:
    key, raw = data[:17], data[17:]
    name, entry = decode_place(key, raw)
    same(tuple(zip(*decode_places([(key, raw)]), strict=True)), ((name, entry.ino, entry.cookie),))
    same(encode_place(name, entry.ino, entry.type), raw)


def _map(data: bytes) -> None:
    record = decode_map(5, 100, data)
    same(decode_map(5, 100, encode_map(record)), record)


def _counts(data: bytes) -> None:
    record = decode_counts(data)
    same(decode_counts(encode_counts(record)), record)


def _counter(data: bytes) -> None:
    counter = Counter(MemoryStore({COUNTER + b"x": data}), b"x", 16)
    same(counter.next_now(), read_u64(data))


_KEYED: tuple[tuple[bytes, Any], ...] = (
    (b"h", lambda key: decode_record(key, _host_record_seeds()[1])),
    (b"k", lambda key: decode_contract(key, _contract_record_seeds()[1])),
    (b"e", lambda key: decode_epoch(key, encode_epoch(Epoch(7, SALT, 9, _NOW))[1])),
    (b"x", lambda key: decode_extent(key, Extent(1, 2, 3, 4, 5).encode())),
    (b"p", lambda key: PartialIndex(MemoryStore({key: b"2", SECTOR + key[2:]: _SECTOR}), 65536).load()),
    (b"q", lambda key: HostDB(MemoryStore({key: golden("host_statistics-2.bin")}), _SEAMS)),
)


#: One that is small enough to be merged.
_SECTOR = SectorRecord(1, "2", 9, 9, 9, [ShardRecord(5, 41, bytes(32), [1, 2])]).encode()


def _keys(data: bytes) -> None:
    """Keys as a damaged database may have them: `data` goes to the decoder that reads this prefix, and to the others."""
    refused = None
    for _, decode in _KEYED:
        try:
            decode(data)
        except Corrupt as error:
            refused = error
    if refused is not None:
        raise refused


TARGETS = (
    Target(
        "sector",
        _sector,
        lambda: [_golden_sectors()["sector"], SectorRecord(1, "2", 9, 9, 9, [ShardRecord(5, 41, bytes(32), [1, 2])]).encode()],
        shape="msgpack",
    ),
    Target("value", _value, lambda: [_golden_sectors()["value"], ValueRecord(1, 5, "4+2", 77).encode()], shape="msgpack"),
    Target("extent", _extent, lambda: [_golden_sectors()["extent"], Extent(1, 2, 3, 4, 5).key + Extent(1, 2, 3, 4, 5).encode()]),
    Target("holders", _holders, _holders_seeds, shape="msgpack"),
    Target("host_record", _host_record, _host_record_seeds, shape="msgpack"),
    Target("contract_record", _contract_record, _contract_record_seeds, shape="msgpack"),
    Target("epoch_record", _epoch_record, lambda: [golden("epoch_record.bin"), encode_epoch(Epoch(7, SALT, 9, _NOW))[1]], shape="msgpack"),
    Target("statistics", _statistics, lambda: [golden("host_statistics.bin"), golden("host_statistics-2.bin")], shape="msgpack"),
    Target("inode", _inode, _inode_seeds),
    Target(
        "dirent", _dirent, lambda: [_golden_namespace()["directory entry"], encode_dirent(Dirent(ino=5, type=stat.S_IFDIR, cookie=2**40))]
    ),
    Target("place", _place, lambda: [_golden_namespace()["key: cookie"] + _golden_namespace()["place"]]),
    Target("map", _map, lambda: [_golden_namespace()["map entry"], encode_map(MapRecord(length=5, value_offset=2**62))]),
    Target("counts", _counts, lambda: [_golden_namespace()["counts"], encode_counts(CountsRecord(inodes=1, files=0, bytes=0))]),
    Target("counter", _counter, lambda: [bytes(7) + b"\x01", b"\x7f" + b"\xff" * 7]),
    Target("keys", _keys, lambda: [b"h" + u32(1), b"k" + _ID.encode(), b"e" + u32(1), b"x" + bytes(16), b"q" + u32(9), b"p\0" + bytes(8)]),
)
