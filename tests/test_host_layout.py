"""Formats of hosts, contracts and holders: golden files, and parsers that only ever raise what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import renewal
from storage.contractor import decode_contract, encode_contract
from storage.errors import BadArgument, Corrupt
from storage.hosts import hostdb, layout, registry
from storage.hosts.days import DAY_NS, Day
from storage.hosts.holders import Holders, decode_holders
from storage.hosts.layout import ContractFile
from storage.interfaces import Batch, Contract, HostCapabilities
from storage.metadata.keys import CONTRACT, HOST, u32
from tests.fakes import BASE_NS, ManualClock, MemoryStore, make_seams

GOLDEN = Path(__file__).parent / "golden"
VOLUME = bytes(range(16))
ONE, TWO = "11" * 16, "22" * 16

HOST_FILE = layout.new_host_file(ONE, BASE_NS)
CONTRACT_FILE = ContractFile(
    format=layout.CONTRACT_FORMAT,
    format_version=1,
    contract=TWO,
    volume=VOLUME.hex(),
    host=ONE,
    start_ns=BASE_NS,
    end_ns=BASE_NS + 10**9,
    lineage=ONE,
    renewed_from=ONE,
)
HOST_RECORD = registry.HostRecord(3, ONE, "dir:/mnt/disk1", "rack1", BASE_NS, HostCapabilities(conditional_put=True, ranges=True))
PRUNING_FILE = layout.new_pruning_file(VOLUME, ONE, BASE_NS)
TROUBLE = renewal.Trouble(TWO, BASE_NS, "Unavailable", "host dir:/mnt/disk1 is away")
CONTRACT_RECORD = Contract(TWO, 3, BASE_NS, BASE_NS + 10**9, ONE)
HOLDERS = Holders({ONE: {TWO: 7}, TWO: {}})
LOCKED_HOLDERS = Holders({ONE: {TWO: 7}, TWO: {}}, "3sL4kqtJlcpXroDTDmJ", BASE_NS)


def host_statistics() -> bytes:
    db = hostdb.HostDB(MemoryStore(), make_seams(clock=ManualClock()))
    db.succeeded(3, "read", 100, 0.25)
    db.succeeded(3, "write", 4_000_000, 2.0)
    db.failed(3, Corrupt("bad root"))
    for _ in range(30):
        db.succeeded(3, "read", 4_000_000, 1.0)
    db.requested(3, 0, 100)
    db.requested(3, 4_000_000, 0)
    db.hedged(3)
    batch = Batch()
    db.save(batch)
    [(key, value)] = batch.ops
    assert key == b"q\0\0\0\x03"
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("fusefs-host.json", lambda: layout.encode_json(HOST_FILE)),
        ("contract.json", lambda: layout.encode_json(CONTRACT_FILE)),
        ("pruning.json", lambda: layout.encode_json(PRUNING_FILE)),
        ("renewal_trouble.bin", TROUBLE.encode),
        ("host_record.bin", lambda: b"".join(registry.encode_record(HOST_RECORD))),
        ("contract_record.bin", lambda: b"".join(encode_contract(CONTRACT_RECORD, 7, ONE))),
        ("holders_record.bin", HOLDERS.encode),
        ("holders_record-2.bin", LOCKED_HOLDERS.encode),
        ("host_statistics-2.bin", host_statistics),
    ],
)
def test_the_golden_files_are_written_today_as_then(file: str, make: Callable[[], bytes]) -> None:
    assert make() == (GOLDEN / file).read_bytes()


def test_the_golden_files_are_read_today_as_then() -> None:
    assert layout.decode_host_file((GOLDEN / "fusefs-host.json").read_bytes(), "x") == HOST_FILE
    assert layout.decode_contract_file((GOLDEN / "contract.json").read_bytes(), "x") == CONTRACT_FILE
    assert layout.decode_pruning_file((GOLDEN / "pruning.json").read_bytes(), "x") == PRUNING_FILE
    assert renewal.decode_trouble((GOLDEN / "renewal_trouble.bin").read_bytes()) == TROUBLE
    raw = (GOLDEN / "host_record.bin").read_bytes()
    assert registry.decode_record(raw[:5], raw[5:]) == HOST_RECORD
    raw = (GOLDEN / "contract_record.bin").read_bytes()
    assert decode_contract(raw[:33], raw[33:]) == (CONTRACT_RECORD, 7, ONE)
    assert decode_holders((GOLDEN / "holders_record.bin").read_bytes(), bytes(32)) == HOLDERS
    assert decode_holders((GOLDEN / "holders_record-2.bin").read_bytes(), bytes(32)) == LOCKED_HOLDERS
    stats = statistics_in("host_statistics-2.bin")
    assert (stats.latency, stats.reads, stats.writes, stats.failed, stats.last_error) == (0.25, 31, 1, 1, "bad root")
    assert (stats.hedged, stats.overtaken, stats.days) == (1, 0, [Day(BASE_NS // DAY_NS, 2, 4_000_000, 100)])
    assert stats.median is not None and 0.25 <= stats.median < 0.25 * 1.2


def test_what_version_1_knew_of_a_host_is_still_read() -> None:
    stats = statistics_in("host_statistics.bin")
    assert (stats.latency, stats.reads, stats.writes, stats.failed, stats.last_error) == (0.25, 1, 1, 1, "bad root")
    assert (stats.hedged, stats.days, stats.p95) == (0, [], None)


def statistics_in(golden: str) -> hostdb.HostStatistics:
    batch = Batch()
    batch.put(b"q\0\0\0\x03", (GOLDEN / golden).read_bytes())
    store = MemoryStore()
    store.apply(batch)
    return hostdb.HostDB(store, make_seams(clock=ManualClock())).stats(3)


def test_names_are_as_the_design_lays_them_out() -> None:
    root = "ab" * 32
    assert layout.HOST_FILE == "fusefs-host.json"
    assert layout.contract_name(VOLUME, ONE) == f"volumes/{VOLUME.hex()}/contracts/{ONE}.json"
    assert layout.shard_name(VOLUME, root) == f"volumes/{VOLUME.hex()}/sectors/ab/{root}"
    assert layout.superblock_name(VOLUME, 7) == f"volumes/{VOLUME.hex()}/superblock.00000000000000000007"
    for name in (layout.contract_name(VOLUME, ONE), layout.shard_name(VOLUME, root), layout.superblock_name(VOLUME, 2**64)):
        layout.check_name(name)
        assert name.startswith(layout.volume_prefix(VOLUME))
    assert layout.shard_name(VOLUME, root).startswith(layout.sectors_prefix(VOLUME))


def test_a_newer_format_is_told_from_damage() -> None:
    newer = layout.encode_json(layout.HostFile(format=layout.HOST_FORMAT, format_version=2, id=ONE, created=""))
    with pytest.raises(BadArgument, match="version 2"):
        layout.decode_host_file(newer, "host x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from([layout.HOST_FORMAT, layout.CONTRACT_FORMAT]) | JSON,
        "format_version": st.integers(-1, 3) | JSON,
        "id": st.just(ONE) | JSON,
        "created": JSON,
        "contract": st.just(ONE) | JSON,
        "start_ns": st.integers() | JSON,
        "end_ns": st.integers() | JSON,
        "checksum": JSON,
    },
)


@pytest.mark.parametrize("decode", [layout.decode_host_file, layout.decode_contract_file])
@pytest.mark.parametrize("valid", [layout.encode_json(HOST_FILE), layout.encode_json(CONTRACT_FILE)])
@given(data=st.data())
def test_json_from_a_host_parses_or_is_corrupt_and_nothing_else(
    decode: Callable[[bytes, str], Any], valid: bytes, data: st.DataObject
) -> None:
    raw = data.draw(
        st.binary(max_size=200)
        | FIELDS.map(lambda value: json.dumps(value).encode())
        | st.tuples(st.integers(0, len(valid) - 1), st.integers(1, 255)).map(
            lambda t: valid[: t[0]] + bytes([valid[t[0]] ^ t[1]]) + valid[t[0] + 1 :]
        )
        | st.integers(1, len(valid)).map(lambda n: valid[:n])
    )
    try:
        found = decode(raw, "host x")
    except (Corrupt, BadArgument):
        return
    assert raw == valid
    assert layout.encode_json(found) == valid


def test_hostile_nesting_and_size_are_corrupt() -> None:
    for raw in (b"[" * 50_000, b'{"a":' * 50_000, b" " * 100_000, b'"' + b"x" * 100_000 + b'"'):
        with pytest.raises(Corrupt):
            layout.decode_host_file(raw, "host x")


@given(st.binary(max_size=120) | st.binary(max_size=8).map(lambda tail: HOLDERS.encode()[:-3] + tail))
def test_damaged_records_are_corrupt_and_nothing_else(raw: bytes) -> None:
    for decode in (
        lambda: registry.decode_record(HOST + u32(1), raw),
        lambda: decode_contract(CONTRACT + ONE.encode(), raw),
        lambda: decode_holders(raw, bytes(32)),
        lambda: registry.decode_record(raw, b""),
        lambda: decode_contract(raw, b""),
    ):
        try:
            decode()
        except Corrupt:
            pass
    store, batch = MemoryStore(), Batch()
    batch.put(b"q" + raw[:50], raw)
    store.apply(batch)
    hostdb.HostDB(store, make_seams(clock=ManualClock())).stats(1)
