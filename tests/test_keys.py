"""Keys and the recovery phrase."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadArgument
from storage.keys import Keys, master_of_phrase, phrase_of

MASTER = bytes(range(32))
SALT = bytes(range(16))
OTHER = bytes(range(1, 17))


def test_keys_differ_by_purpose_salt_and_master() -> None:
    keys, others = Keys(MASTER), Keys(bytes(32))
    made = [
        keys.sector_key(SALT),
        keys.sector_key(OTHER),
        keys.journal_key(SALT),
        keys.journal_key(OTHER),
        keys.metadata_key(),
        keys.superblock_key(),
        others.sector_key(SALT),
        others.metadata_key(),
    ]
    assert len(set(made)) == len(made)
    assert {len(key) for key in made} == {32}
    assert Keys(MASTER).sector_key(SALT) == keys.sector_key(SALT)


def test_golden_keys() -> None:
    """A volume made today opens tomorrow: the derivation never changes."""
    keys = Keys(MASTER)
    assert keys.sector_key(SALT).hex() == "f5c0e932296317e6b6057e702c948115ef64a5f7712d928b768eac13812ae723"
    assert keys.journal_key(SALT).hex() == "1e7ae04c21156103e3db9c98c220645008b688c9bb944e89fc5395d4af33c3f9"
    assert keys.metadata_key().hex() == "d64aa12cc553f2609da1ce7ab802e24e01856d2998a749fee7d00768c9a36332"
    assert keys.superblock_key().hex() == "14392276266f0a553dca783f0c21407297958353bb4b09dc3a6aa7c4721f7926"


def test_no_key_is_seen_in_a_repr_or_a_pickle() -> None:
    keys = Keys(MASTER)
    keys.sector_key(SALT)
    assert repr(keys) == str(keys) == f"{keys}" == "<Keys>"
    with pytest.raises((TypeError, pickle.PicklingError, AttributeError)):
        pickle.dumps(keys)


def test_lengths_are_checked() -> None:
    for bad in (lambda: Keys(b"short"), lambda: Keys(MASTER).sector_key(b""), lambda: Keys(MASTER).journal_key(bytes(17))):
        with pytest.raises(BadArgument):
            bad()


@given(st.binary(min_size=32, max_size=32))
def test_a_phrase_brings_back_its_master_key(master: bytes) -> None:
    phrase = phrase_of(master)
    assert len(phrase.split(" ")) == 24
    assert master_of_phrase(phrase) == master
    assert master_of_phrase("\n " + phrase.upper().replace(" ", " \t\n") + "\n") == master


def test_phrases_are_bip39() -> None:
    """Test vectors of BIP-39: any other tool that knows it can read ours."""
    assert phrase_of(bytes(32)) == "abandon " * 23 + "art"
    assert phrase_of(b"\x7f" * 32) == "legal winner thank year wave sausage worth useful " * 2 + (
        "legal winner thank year wave sausage worth title"
    )
    assert phrase_of(b"\xff" * 32) == "zoo " * 23 + "vote"


def test_what_is_wrong_with_a_phrase_is_said() -> None:
    words = phrase_of(MASTER).split()
    with pytest.raises(BadArgument, match="23 words instead of 24"):
        master_of_phrase(" ".join(words[:23]))
    with pytest.raises(BadArgument, match="0 words instead of 24"):
        master_of_phrase("")
    with pytest.raises(BadArgument, match="word 3, 'abandom', is not in the list; did you mean 'abandon'"):
        master_of_phrase(" ".join([*words[:2], "abandom", *words[3:]]))
    with pytest.raises(BadArgument, match="word 1, '\\?', is not in the list; check its spelling"):
        master_of_phrase(" ".join(["?", *words[1:]]))
    swapped = ["zoo", *["abandon"] * 22, "art"]
    with pytest.raises(BadArgument, match="checksum"):
        master_of_phrase(" ".join(swapped))
    with pytest.raises(BadArgument):
        phrase_of(b"short")


@given(
    st.one_of(st.text(), st.lists(st.sampled_from(["zoo", "abandon", "art", "Zoo", "x", "\ud800"]), min_size=23, max_size=25).map(" ".join))
)
def test_no_text_raises_anything_but_bad_argument(text: str) -> None:
    try:
        assert len(master_of_phrase(text)) == 32
    except BadArgument:
        pass
