"""The key file: opens with its passphrase, tells damage from a wrong passphrase, and cannot exhaust the machine."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import keyfile as keyfile_module
from storage.documents import encode_document
from storage.errors import BadArgument, Corrupt, FusefsError, NotFound, WrongPassphrase
from storage.keyfile import (
    CHEAP,
    MAX_LANES,
    MAX_MEMORY_KIB,
    MAX_TIME,
    Argon2Parameters,
    KeyFile,
    KeySlot,
    change_passphrase,
    encode_keyfile,
    load_keyfile,
    make_keyfile,
    make_slot,
    open_slots,
    parse_keyfile,
    passphrase_bytes,
    save_keyfile,
)
from storage.seams import Seams, SystemRandomness

GOLDEN = Path(__file__).parent / "golden"
MASTER = bytes(range(32))
VOLUME = "00112233445566778899aabbccddeeff"


class Counting:
    """Randomness that is none."""

    def __init__(self) -> None:
        self.next = 0

    def token_bytes(self, n: int) -> bytes:
        self.next += 1
        return bytes([self.next]) * n


class Crash(Exception):
    pass


class CrashAt:
    def __init__(self, name: str) -> None:
        self.name = name

    def hit(self, name: str) -> None:
        if name == self.name:
            raise Crash


def keyfile(*passphrases: str) -> KeyFile:
    return make_keyfile(VOLUME, tuple(make_slot(MASTER, p, VOLUME, SystemRandomness(), CHEAP) for p in passphrases))


GOOD = encode_keyfile(keyfile("right"))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.binary(min_size=32, max_size=32))
@settings(max_examples=30)
def test_what_is_wrapped_opens_with_the_same_passphrase_and_no_other(passphrase: str, master: bytes) -> None:
    made = make_keyfile(VOLUME, (make_slot(master, passphrase, VOLUME, SystemRandomness(), CHEAP),))
    read = parse_keyfile(encode_keyfile(made))
    assert read == made
    assert open_slots(read, passphrase) == master
    with pytest.raises(WrongPassphrase):
        open_slots(read, passphrase + "x")


def test_each_slot_opens_by_itself() -> None:
    made = keyfile("one", "two", "three")
    assert {open_slots(made, p) for p in ("one", "two", "three")} == {MASTER}
    with pytest.raises(WrongPassphrase):
        open_slots(made, "four")


def test_salts_and_nonces_are_fresh() -> None:
    a, b = keyfile("same", "same").slots
    assert a.salt != b.salt
    assert a.nonce != b.nonce
    assert a.wrapped != b.wrapped


def test_passphrases_are_the_same_however_they_were_typed() -> None:
    assert open_slots(keyfile("stra\u00dfe \u00e9"), "stra\u00dfe e\u0301") == MASTER
    # Not trimmed, not lowered.
    for other in (" x", "x ", "X"):
        with pytest.raises(WrongPassphrase):
            open_slots(keyfile("x"), other)


def test_bytes_of_the_environment_that_are_no_utf8_are_a_passphrase_too() -> None:
    odd = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert passphrase_bytes(odd) == b"\xff\xfe"
    assert open_slots(keyfile(odd), odd) == MASTER


@pytest.mark.parametrize("bad", ["", "x" * 65537, "\u00e9" * 40000, "\ud800"])
def test_passphrases_that_are_none_are_refused(bad: str) -> None:
    with pytest.raises(BadArgument, match="passphrase"):
        make_slot(MASTER, bad, VOLUME, SystemRandomness(), CHEAP)
    with pytest.raises(BadArgument, match="passphrase"):
        open_slots(keyfile("x"), bad)


def test_every_flipped_bit_is_told_as_damage_not_as_a_wrong_passphrase() -> None:
    for bit in range(8 * len(GOOD)):
        bad = bytearray(GOOD)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FusefsError) as caught:
            parse_keyfile(bytes(bad))
        if isinstance(caught.value, BadArgument):
            assert "newer fusefs is needed (or it is damaged" in str(caught.value)
        else:
            assert isinstance(caught.value, Corrupt), caught.value


def test_a_cut_off_file_is_damaged() -> None:
    for cut in range(len(GOOD)):
        with pytest.raises(Corrupt):
            parse_keyfile(GOOD[:cut])


@given(
    st.one_of(
        st.binary(max_size=300), st.builds(lambda at, b: GOOD[:at] + b + GOOD[at + 1 :], st.integers(0, len(GOOD)), st.binary(max_size=3))
    )
)
def test_no_bytes_make_the_parser_raise_anything_else(raw: bytes) -> None:
    try:
        parsed = parse_keyfile(raw)
    except (Corrupt, BadArgument):
        return
    assert encode_keyfile(parsed) == raw == GOOD


@pytest.mark.parametrize("raw", [b"[" * 60000, b'{"format":' * 5000, b"x" * 70000, b'"\xff"', b'{"a":"\\ud800"}', b"null", b"{}", b"1e999"])
def test_hostile_json_is_damage(raw: bytes) -> None:
    with pytest.raises(Corrupt, match=r"key file is (damaged|not in the format)"):
        parse_keyfile(raw)


def hostile(**changes: object) -> bytes:
    """A key file with a good checksum whose only slot has been changed."""
    slot = keyfile("x").slots[0]
    return encode_document(make_keyfile(VOLUME, (msgspec.structs.replace(slot, **changes),)))


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_kib": MAX_MEMORY_KIB + 1},
        {"memory_kib": 2**31},
        {"memory_kib": 2**70},
        {"memory_kib": -1},
        {"memory_kib": 63},
        {"memory_kib": 64, "lanes": 9},
        {"time": MAX_TIME + 1},
        {"time": 2**31},
        {"time": 0},
        {"lanes": MAX_LANES + 1},
        {"lanes": 0},
        {"lanes": True},
        {"kdf": "scrypt"},
        {"salt": b""},
        {"salt": bytes(17)},
        {"nonce": bytes(11)},
        {"wrapped": bytes(49)},
    ],
)
def test_parameters_out_of_bounds_are_refused_when_parsed(changes: dict[str, object]) -> None:
    """Before anything is computed: a file on a host cannot make us allocate."""
    with pytest.raises(Corrupt):
        parse_keyfile(hostile(**changes))


def test_parameters_out_of_bounds_are_refused_wherever_the_slot_came_from() -> None:
    slot = msgspec.structs.replace(keyfile("x").slots[0], memory_kib=2**31)
    with pytest.raises(Corrupt, match="memory"):
        open_slots(make_keyfile(VOLUME, (slot,)), "x")
    for bad in ({"memory_kib": 63}, {"memory_kib": 2**31}, {"time": 0}, {"lanes": 17}, {"memory_kib": 64, "lanes": 9}):
        with pytest.raises(BadArgument):
            Argon2Parameters(**bad)


def test_too_many_slots_are_refused() -> None:
    slot = keyfile("x").slots[0]
    for count in (0, 9):
        with pytest.raises(BadArgument):
            make_keyfile(VOLUME, (slot,) * count)
        with pytest.raises(Corrupt):
            parse_keyfile(encode_document(msgspec.structs.replace(keyfile("x"), slots=(slot,) * count)))


@pytest.mark.parametrize("changes", [{"time": 2}, {"memory_kib": 65}, {"salt": bytes(16)}, {"nonce": bytes(12)}])
def test_a_slot_is_bound_to_its_parameters(changes: dict[str, object]) -> None:
    with pytest.raises(WrongPassphrase):
        open_slots(parse_keyfile(hostile(**changes)), "x")


def test_slots_from_hostile_hosts_cost_no_more_together_than_one_may(monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_slot(MASTER, "right", VOLUME, SystemRandomness(), CHEAP)
    dear = msgspec.structs.replace(good, memory_kib=MAX_MEMORY_KIB, time=MAX_TIME // 2, wrapped=bytes(len(good.wrapped)))
    tried: list[int] = []

    def derive(slot: KeySlot, secret: bytes) -> bytes:
        tried.append(slot.memory_kib * slot.time)
        return real(slot, secret) if slot.memory_kib < MAX_MEMORY_KIB else bytes(32)

    real = keyfile_module._derive
    monkeypatch.setattr(keyfile_module, "_derive", derive)
    # Cheapest first: what hosts add to it does not delay whoever has the passphrase.
    assert open_slots(make_keyfile(VOLUME, (dear,) * 7 + (good,)), "right") == MASTER
    assert len(tried) == 1
    tried.clear()
    with pytest.raises(WrongPassphrase, match="costs more"):
        open_slots(make_keyfile(VOLUME, (dear,) * 7 + (good,)), "wrong")
    assert sum(tried) <= MAX_MEMORY_KIB * MAX_TIME


def test_a_slot_is_bound_to_its_volume() -> None:
    moved = make_keyfile("0" * 32, keyfile("x").slots)
    with pytest.raises(WrongPassphrase):
        open_slots(moved, "x")


def test_a_newer_format_says_that_a_newer_fusefs_is_needed() -> None:
    newer = encode_document(msgspec.structs.replace(keyfile("x"), format_version=2))
    with pytest.raises(BadArgument, match=r"format version 2.*up to 1: a newer fusefs is needed$"):
        parse_keyfile(newer)
    for version in (0, -1, True):
        with pytest.raises(Corrupt):
            parse_keyfile(encode_document(msgspec.structs.replace(keyfile("x"), format_version=version)))


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made = keyfile("x")
    save_keyfile(path, made)
    assert load_keyfile(path) == load_keyfile(path, VOLUME) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]
    with pytest.raises(Corrupt, match="belongs to volume"):
        load_keyfile(path, "0" * 32)
    with pytest.raises(Corrupt, match="missing"):
        load_keyfile(tmp_path / "none.json")
    with pytest.raises(NotFound):
        save_keyfile(tmp_path / "no" / "keys.json", made)


def test_change_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    save_keyfile(path, keyfile("first", "second"))
    before = path.read_bytes()
    for old, new, kind in (("wrong", "new", WrongPassphrase), ("first", "", BadArgument)):
        with pytest.raises(kind):
            change_passphrase(path, VOLUME, old, new, Seams(), CHEAP)
    with pytest.raises(Corrupt):
        change_passphrase(path, "0" * 32, "first", "new", Seams(), CHEAP)
    assert path.read_bytes() == before
    change_passphrase(path, VOLUME, "first", "new", Seams(), CHEAP)
    read = load_keyfile(path, VOLUME)
    assert open_slots(read, "new") == open_slots(read, "second") == MASTER
    with pytest.raises(WrongPassphrase):
        open_slots(read, "first")


@pytest.mark.parametrize("where", ["durable.create", "durable.written", "durable.synced", "durable.renamed"])
def test_a_crash_while_changing_leaves_the_old_or_the_new_file(tmp_path: Path, where: str) -> None:
    path = tmp_path / "keys.json"
    save_keyfile(path, keyfile("old"))
    with pytest.raises(Crash):
        change_passphrase(path, VOLUME, "old", "new", Seams(failpoints=CrashAt(where)), CHEAP)
    assert open_slots(load_keyfile(path), "new" if where == "durable.renamed" else "old") == MASTER


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_file_makes_loading_raise_anything_else(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(raw)
    with pytest.raises((Corrupt, BadArgument), match="key file"):
        load_keyfile(path)


def test_the_golden_key_file() -> None:
    made = make_keyfile(VOLUME, (make_slot(MASTER, "correct horse", VOLUME, Counting(), Argon2Parameters(1024, 2, 2)),))
    golden = (GOLDEN / "keys.json").read_bytes()
    assert encode_keyfile(made) == golden
    assert open_slots(parse_keyfile(golden), "correct horse") == MASTER


def test_no_secret_stands_in_the_file_or_a_repr() -> None:
    assert MASTER.hex().encode() not in GOOD
    assert b"right" not in GOOD
    assert isinstance(parse_keyfile(GOOD).slots[0], KeySlot)
