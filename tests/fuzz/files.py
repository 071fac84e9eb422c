"""Targets of what lies in a volume's directory and on hosts: shards and their tables, the journal, documents."""

from __future__ import annotations

import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from storage.config import encode_config, new_config, parse_config
from storage.errors import BadArgument, Corrupt, FusefsError, WrongPassphrase
from storage.hosts.layout import (
    ContractFile,
    decode_contract_file,
    decode_host_file,
    decode_pruning_file,
    encode_json,
    new_host_file,
    new_pruning_file,
)
from storage.interfaces import TailPiece
from storage.keyfile import MAX_SLOTS, KeyFile, encode_keyfile, open_slots, parse_keyfile
from storage.metadata.records import HASH, HEADER_SIZE, SegmentHeader, decode_body, decode_segment_header, encode_body
from storage.metadata.replay import RecoveredTails, replay
from storage.replication import parse_replication
from storage.sealing import HEADER_SIZE as SHARD_HEADER
from storage.sealing import TAG_SIZE, ShardHeader, check_header, open_blocks, open_range, open_shard, seal
from storage.sectors.label import LABEL_SIZE, check_label, encode_label
from storage.values.packing import MAX_TABLE, TableEntry, encode_table, parse_table
from tests.fuzz.frames import KEYFILE, KEYS, MASTER, PASSPHRASE, SALT, VOLUME_ID, mended_document, mended_segment
from tests.fuzz.target import Target, check_message, golden, same
from tests.metadata_rig import journal_key

_encode = msgspec.msgpack.encode
_ID = "0123456789abcdef" * 2
_NOW = 1_735_689_600 * 10**9


# --------------------------------------------------------------------------------------------------------------------
# Shards and sectors

_HEADER = ShardHeader(VOLUME_ID, SALT, 3, 100, 77)
_SHARD_KEY = KEYS.sector_key(SALT)
_PLAIN = bytes(range(100))


def _shard_header(data: bytes) -> None:
    header = ShardHeader.parse(data)
    same(header.encode(), data)
    check_header(_HEADER, data)


def _shard(data: bytes) -> None:
    """A shard as a host makes it up, read by somebody who expects the header it shows, or ours: only what was sealed verifies."""
    try:
        expected = ShardHeader.parse(data[:SHARD_HEADER])
    except Corrupt:
        expected = _HEADER
    plain = _PLAIN if expected == _HEADER else b""
    try:
        same(open_shard(_SHARD_KEY, expected, data), plain)
    except Corrupt as error:
        check_message(str(error))
    # Without the header, which need not be fetched: block by block.
    same(open_blocks(_SHARD_KEY, expected, 0, data[SHARD_HEADER:]), plain)
    same(open_range(_SHARD_KEY, expected, 0, expected.plaintext_length, data[SHARD_HEADER:]), plain)


def _shard_seeds() -> list[bytes]:
    empty = ShardHeader(VOLUME_ID, SALT, 3, 0, 78)
    return [bytes(seal(_SHARD_KEY, _HEADER, [_PLAIN])), bytes(seal(_SHARD_KEY, empty, [])), _HEADER.encode() + bytes(100 + TAG_SIZE)]


_ENTRIES = [TableEntry(b"a/b", 7, 0, 10, 0, 3), TableEntry(b"", 8, 4096, 6, 10, 3), TableEntry(b"\xff/\n", 9, 2**40, 16, 16, 4)]


def _table(data: bytes) -> None:
    for entry in parse_table(data):
        entry.path.decode("utf-8", "surrogateescape")
        data[entry.position : entry.position + entry.length][entry.length - 1 : 1]


def _table_entries(data: bytes) -> None:
    """`data`: the unpacked table, behind 32 bytes of sector. Its first byte says whether the trailer tells the truth."""
    told = len(data) + (data[0] if data and data[0] < 8 else 0)
    packed = zlib.compress(data, 1)
    _table(bytes(32) + packed + struct.pack(">4sHHII", b"fsTB", 1, 0, len(packed), told))


def _table_bombs() -> list[bytes]:
    """Small, and as large unpacked as a table may be."""
    small = zlib.compress(bytes(MAX_TABLE), 9)
    return [
        packed + struct.pack(">4sHHII", b"fsTB", 1, 0, len(packed), told) for packed in (small,) for told in (MAX_TABLE, 100, MAX_TABLE + 1)
    ]


def _label(data: bytes) -> None:
    check_label(data, 9, 4096, k=4, m=1, number=5)
    same(len(data) >= LABEL_SIZE, True)


# --------------------------------------------------------------------------------------------------------------------
# The journal


@cache
def _journal_directory() -> Path:
    """Flushed to at every input: whoever runs this sets TMPDIR to where that costs nothing, and removes what is left there."""
    return Path(tempfile.mkdtemp(prefix="fuzz"))


def forget_journal_directory() -> None:
    if _journal_directory.cache_info().currsize:
        shutil.rmtree(_journal_directory(), ignore_errors=True)
        _journal_directory.cache_clear()


def _journal(data: bytes) -> None:
    """A byte of bits (1: mend checksums and chain, 2: sequence numbers too, 4: two segments, 8: LMDB holds two commits), then a file."""
    mode, raw = (data[0] if data else 0), data[1:]
    parts = [raw]
    if mode & 4:
        middle = max(HEADER_SIZE, len(raw) // 2 // 8 * 8)
        parts = [raw[:middle], raw[:HEADER_SIZE] + raw[middle:]]
    directory = _journal_directory()
    for path in directory.iterdir():
        path.unlink()
    chain, sequence = bytes(HASH), 1
    for number, part in enumerate(parts, 1):
        if mode & 1:
            part, chain = mended_segment(part, number, chain, sequence if mode & 2 else None)
            sequence += 1
        (directory / f"segment-{number:016x}").write_bytes(part)
    loaded: list[Any] = []
    result = replay(directory, 2 if mode & 8 else 0, bytes(HASH), loaded.append)
    try:
        tails = RecoveredTails(result.tails, lambda _value_id, _end: True, journal_key)
        for value_id in tails:
            for offset, piece in tails[value_id]:
                TailPiece(value_id, offset, (piece,))
        for ops in loaded:
            encode_body(ops, [])
    finally:
        for segment in result.live:
            segment.close()


def _journal_seeds() -> list[bytes]:
    segment = golden("journal_segment.bin")
    header = SegmentHeader(1, 1, 1, SALT, bytes(HASH)).encode()
    return [bytes([mode]) + segment + bytes(64) for mode in (0, 1, 3, 5, 7, 9, 11)] + [b"\x01" + header, b"\x00" + bytes(1024), b""]


def _segment_header(data: bytes) -> None:
    header = decode_segment_header(data, "here")
    if header is not None:
        same(decode_segment_header(header.encode(), "here"), header)


def _journal_body(data: bytes) -> None:
    body = decode_body(data, 0, "here")
    same(decode_body(encode_body(body.ops, body.tails), 0, "here"), body)
    for tail in body.tails:
        tail.aad(1), tail.nonce_bytes()


# --------------------------------------------------------------------------------------------------------------------
# Documents


def _as_document(data: bytes, parse: Callable[[bytes], None]) -> None:
    """`parse` sees the bytes as they are, and the JSON in them with the checksum it should have."""
    refused: FusefsError | None = None
    for raw in (data, mended_document(data)):
        if raw is not None:
            try:
                parse(raw)
            except (Corrupt, BadArgument, WrongPassphrase) as error:
                check_message(str(error))
                refused = error
    if refused is not None:
        raise refused


def _keyfile(raw: bytes) -> None:
    keyfile = parse_keyfile(raw)
    same(parse_keyfile(encode_keyfile(keyfile)), keyfile)
    same((len(bytes.fromhex(keyfile.volume_id)), len(keyfile.volume_id), len(keyfile.slots) <= MAX_SLOTS), (16, 32, True))
    # Dear ones are within bounds too, but not worth the fuzzer's time.
    if all(slot.memory_kib * slot.time <= 4096 for slot in keyfile.slots):
        same(open_slots(keyfile, PASSPHRASE), MASTER)


def _keyfile_seeds() -> list[bytes]:
    several = KeyFile(format=KEYFILE.format, format_version=1, volume_id=KEYFILE.volume_id, slots=KEYFILE.slots * 2)
    return [encode_keyfile(KEYFILE), encode_keyfile(several), golden("keys.json")]


def _config(raw: bytes) -> None:
    config = parse_config(raw)
    same(parse_config(encode_config(config)), config)
    same((len(config.volume_id), len(config.volume_id_bytes)), (32, 16))
    same(parse_replication(config.replication).hosts_needed > 0, True)


def _host_file(raw: bytes) -> None:
    found = decode_host_file(raw, "host dir:/x: fusefs-host.json")
    same(len(found.id), 32)
    same(decode_host_file(encode_json(found), "again"), found)


def _contract_file(raw: bytes) -> None:
    found = decode_contract_file(raw, "host dir:/x: contract")
    same((len(found.contract), found.start_ns < found.end_ns), (32, True))
    same(decode_contract_file(encode_json(found), "again"), found)


def _contract_seeds() -> list[bytes]:
    made = ContractFile(format="fusefs contract", format_version=1, contract=_ID, volume=_ID, host=_ID, start_ns=1, end_ns=2, lineage=_ID,
                        renewed_from=None)  # fmt: skip
    return [golden("contract.json"), encode_json(made)]


def _pruning_file(raw: bytes) -> None:
    file = decode_pruning_file(raw, "pruning.json")
    same(decode_pruning_file(encode_json(file), "pruning.json"), file)
    bytes.fromhex(file.volume)


TARGETS = (
    Target("shard_header", _shard_header, lambda: [_HEADER.encode(), golden("sealed_shard.bin")[:SHARD_HEADER]]),
    Target("shard", _shard, _shard_seeds),
    Target(
        "label",
        _label,
        lambda: [
            encode_label(9, 4096, k=4, m=1, number=5),
            bytes.fromhex(golden("sectors.txt").decode().split()[0].removeprefix("label=")),
        ],
    ),
    Target("table", _table, lambda: [bytes(32) + encode_table(_ENTRIES), bytes.fromhex(golden("table.hex").decode()), *_table_bombs()]),
    Target("table_entries", _table_entries, lambda: [_encode(_ENTRIES), _encode([])], shape="msgpack"),
    Target("journal", _journal, _journal_seeds, (Corrupt, BadArgument), rounds=1500),
    Target(
        "segment_header",
        _segment_header,
        lambda: [SegmentHeader(1, 2, 3, SALT, bytes(HASH)).encode(), bytes(HEADER_SIZE)],
        (Corrupt, BadArgument),
    ),
    Target("journal_body", _journal_body, lambda: [encode_body([(b"k", b"v"), (b"gone", None)], []), encode_body([], [])], shape="msgpack"),
    Target(
        "keyfile", lambda data: _as_document(data, _keyfile), _keyfile_seeds, (Corrupt, BadArgument, WrongPassphrase), "json", rounds=1500
    ),
    Target(
        "config",
        lambda data: _as_document(data, _config),
        lambda: [golden("volume.json"), encode_config(new_config(VOLUME_ID, _NOW, replication="4+2"))],
        (Corrupt, BadArgument),
        "json",
    ),
    Target(
        "host_file",
        lambda data: _as_document(data, _host_file),
        lambda: [golden("fusefs-host.json"), encode_json(new_host_file(_ID, _NOW))],
        (Corrupt, BadArgument),
        "json",
    ),
    Target("contract_file", lambda data: _as_document(data, _contract_file), _contract_seeds, (Corrupt, BadArgument), "json"),
    Target(
        "pruning_file",
        lambda data: _as_document(data, _pruning_file),
        lambda: [golden("pruning.json"), encode_json(new_pruning_file(VOLUME_ID, _ID, _NOW))],
        (Corrupt, BadArgument),
        "json",
    ),
)
