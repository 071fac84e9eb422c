"""The master key, the keys made from it, and the recovery phrase that is its other form.

| key | HKDF-SHA256 of the master key with salt | info | used for |
|---|---|---|---|
| sector | the epoch's, 16 bytes | `fusefs sector` | shards (storage/sealing.py) |
| journal | the epoch's, 16 bytes | `fusefs journal` | tail bytes in the journal |
| metadata | none | `fusefs metadata` | checkpoints and log on the hosts |
| superblock | none | `fusefs superblock` | superblocks on the hosts |

All have 32 bytes. The recovery phrase is BIP-39: the master key as entropy, 24 English words, the last of which carries a checksum.
"""

from __future__ import annotations

import difflib
import unicodedata
from functools import lru_cache

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from mnemonic import Mnemonic

from storage.errors import BadArgument

MASTER_SIZE = 32
SALT_SIZE = 16
PHRASE_WORDS = 24

#: Epochs whose keys are kept made; an epoch is one mount, and old ones are met when their sectors are read.
_CACHED_KEYS = 1024


class Keys:
    """Everything made from one master key. Safe to use from several threads; shows no key in its repr."""

    __slots__ = ("_derive", "_master")

    def __init__(self, master: bytes) -> None:
        if len(master) != MASTER_SIZE:
            raise BadArgument(f"a master key has {MASTER_SIZE} bytes, not {len(master)}")
        self._master = bytes(master)
        # Invariant: a cache of this object's own, so that keys do not outlive it.
        self._derive = lru_cache(maxsize=_CACHED_KEYS)(self._derive_uncached)

    def sector_key(self, salt: bytes) -> bytes:
        """For the shards sealed in the epoch with this salt."""
        return self._derive(_checked(salt), b"fusefs sector")

    def journal_key(self, salt: bytes) -> bytes:
        """For the journal segments of the epoch with this salt."""
        return self._derive(_checked(salt), b"fusefs journal")

    def metadata_key(self) -> bytes:
        """For checkpoints and log. Always with fresh random nonces (I1)."""
        return self._derive(None, b"fusefs metadata")

    def superblock_key(self) -> bytes:
        """For superblocks. Always with fresh random nonces (I1)."""
        return self._derive(None, b"fusefs superblock")

    def _derive_uncached(self, salt: bytes | None, info: bytes) -> bytes:
        return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(self._master)

    def __repr__(self) -> str:
        return "<Keys>"


def _checked(salt: bytes) -> bytes:
    if len(salt) != SALT_SIZE:
        raise BadArgument(f"an epoch's salt has {SALT_SIZE} bytes, not {len(salt)}")
    return bytes(salt)


# --------------------------------------------------------------------------------------------------------------------
# Recovery phrase


@lru_cache(maxsize=1)
def _words() -> Mnemonic:
    """The English list, read when first needed."""
    return Mnemonic("english")


def phrase_of(master: bytes) -> str:
    """The 24 words of a master key, separated by single spaces. A secret as much as the key."""
    if len(master) != MASTER_SIZE:
        raise BadArgument(f"a master key has {MASTER_SIZE} bytes, not {len(master)}")
    return str(_words().to_mnemonic(bytes(master)))


def master_of_phrase(text: str) -> bytes:
    """The master key of 24 words in any case, with any white space between them. BadArgument says which word is wrong or missing."""
    # No valid phrase is longer than 24 * 9 letters; a file given by mistake is not worth splitting.
    if len(text) > 10_000:
        raise BadArgument(f"recovery phrase: {len(text)} characters are no {PHRASE_WORDS} words")
    words = unicodedata.normalize("NFKD", text).lower().split()
    if len(words) != PHRASE_WORDS:
        raise BadArgument(f"recovery phrase: {len(words)} words instead of {PHRASE_WORDS}; give all of them, in order, separated by spaces")
    known = _words().wordlist
    for place, word in enumerate(words, 1):
        if word not in known:
            near = difflib.get_close_matches(word[:20], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; check its spelling"
            raise BadArgument(f"recovery phrase: word {place}, {word[:20]!r}, is not in the list{hint}")
    try:
        return bytes(_words().to_entropy(words))
    except (ValueError, LookupError):
        raise BadArgument(
            "recovery phrase: every word is in the list, but the checksum does not match; a word is wrong, or two have changed places"
        ) from None
