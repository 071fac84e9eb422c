"""Which history counts: the one there is, the one a majority of the hosts holds, or the one a person chooses (I5)."""

from __future__ import annotations

import pytest

from storage.errors import BadArgument, NotFound
from storage.history.finding import Candidate, Places, _by_hand, _newest
from storage.history.superblock import BODY_VERSION, Body, KnownEpoch, KnownHost, encode_superblock
from storage.keyfile import CHEAP, make_keyfile, make_slot
from storage.keys import Keys
from storage.seams import Seams
from tests.fakes import SeededRandom

VOLUME = bytes(range(16))
RANDOM = SeededRandom(3)
SLOTS = make_keyfile(VOLUME.hex(), (make_slot(bytes(32), "x", VOLUME.hex(), RANDOM, CHEAP),))
HOSTS = [f"{n:032x}" for n in range(1, 6)]


def candidate(generation: int, sequence: int, epochs: str, on: list[int], hosts: int = 3, lost: tuple[int, ...] = ()) -> Candidate:
    """`epochs`: a letter each, its salt; the n-th begins with commit 10 n. `on`: hosts that have nothing newer."""
    known = [KnownEpoch(n, letter.encode() * 16, 10 * (n - 1) + 1) for n, letter in enumerate(epochs, 1)]
    of = [KnownHost(n, HOSTS[n - 1], f"mem:{n}", n in lost) for n in range(1, hosts + 1)]
    body = Body(BODY_VERSION, b"", b"", None, [], of, known, f"machine-{epochs}", "dir")
    block = encode_superblock(
        Keys(bytes(32)).superblock_key(),
        volume_id=VOLUME,
        generation=generation,
        sequence=sequence,
        written_ns=generation * 10**9,
        keys=SLOTS,
        body=body,
        random=RANDOM,
    )
    return Candidate(block, body, {HOSTS[n - 1] for n in on}, {HOSTS[n - 1] for n in on})


def choose(*candidates: Candidate) -> tuple[Candidate, list[str]]:
    found = Places(Seams(), None)
    return _newest(found, candidates), found.notes


def test_of_one_history_the_newest_counts_however_few_hosts_have_it() -> None:
    old, new = candidate(3, 15, "ab", [1, 2]), candidate(5, 25, "abc", [3])
    assert choose(old, new) == (new, [])


def test_a_higher_generation_or_sequence_alone_decides_nothing() -> None:
    """The end that went on from what others have counts, not who counted further."""
    further, majority = candidate(90, 900, "ax", [1]), candidate(4, 25, "abc", [2, 3])
    chosen, notes = choose(further, majority)
    assert chosen is majority and len(notes) == 1 and "machine-ax" in notes[0]


def test_without_a_majority_a_person_is_told_both() -> None:
    with pytest.raises(BadArgument, match=r"2 different histories.*machine-ab.*machine-ax|2 different histories.*machine-ax.*machine-ab"):
        choose(candidate(5, 25, "ab", [1], hosts=2), candidate(6, 25, "ax", [2], hosts=2))


def test_a_host_from_before_they_parted_speaks_for_neither() -> None:
    with pytest.raises(BadArgument, match="different histories"):
        choose(candidate(5, 25, "ab", [1]), candidate(6, 25, "ax", [2]), candidate(2, 5, "a", [3]))


def test_a_host_that_lags_behind_in_one_of_them_speaks_for_it() -> None:
    left, right = candidate(5, 25, "abc", [1]), candidate(6, 25, "ax", [2])
    assert choose(left, right, candidate(4, 15, "ab", [3]))[0] is left


def test_hosts_marked_lost_and_hosts_of_nobody_do_not_count() -> None:
    left, right = candidate(5, 25, "ab", [1], lost=(2, 3)), candidate(6, 25, "ax", [2, 3])
    with pytest.raises(BadArgument, match="different histories"):
        choose(left, right)
    assert choose(candidate(5, 25, "ab", [1, 4, 5]), candidate(6, 25, "ax", [2, 3]))[0].body.machine == "machine-ax"


def test_a_person_names_a_generation_or_exactly_one() -> None:
    left, right, other = candidate(5, 25, "ab", [1]), candidate(5, 26, "ax", [2]), candidate(6, 31, "abc", [3])
    assert _by_hand([left, right, other], "6") is other
    assert _by_hand([left, right, other], left.name) is left
    with pytest.raises(BadArgument, match=f"{left.name}.*{right.name}"):
        _by_hand([left, right, other], "5")
    with pytest.raises(NotFound, match=other.name):
        _by_hand([left, right, other], "7")
