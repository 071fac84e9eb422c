"""What the two processes tell each other: one packet of a SOCK_SEQPACKET socket for each message, MessagePack. On no disk or network:
both run the same version.

On a channel a request is answered by one `Done` or `Failed`; a put that was
given no flag asks `Wanted` before the step that counts, and gets `Go`.

| message | fields, in order |
|---|---|
| `Seal` | of each shard: the plaintext's pieces, a place or, of small ones, the bytes; place of the sealed shard; key; encoded header |
| `Open` | place of sealed blocks; place of their plaintext; number of the first; key; encoded header |
| `Put` | directory; parts of the object's path; place; name of the temporary file; place of the byte that says it is not wanted; -1: ask |
| `Read` | directory; parts of the path; offset and length there; bytes of a step; place of the plaintext; its offset; key; header |
| `Ping` | |
| `Wanted` | |
| `Go` | is it? |
| `Done` | the roots of what was sealed, or the tag of what was put; how many bytes were read |
| `Failed` | class of storage.errors, `Abandoned`, or `Gone`: it cannot, and it is to be done here; message |

A place is offset and length in the arena. A directory is a directory host's path and URL, its device and inode when it was opened,
and a number that changes where directories may have been removed: what was known of them is forgotten then.
"""

from __future__ import annotations

from itertools import count

import msgspec

from storage.coprocess.arena import Place

#: The longest packet: a path of 4 KiB, and a thousand pieces.
MOST = 64 * 1024


class Directory(msgspec.Struct, array_like=True, frozen=True):
    """See the module. Made by `directory`."""

    path: str
    url: str
    device: int
    inode: int
    #: Another one each time something may have been removed there.
    removals: int

    def after_removal(self) -> Directory:
        """The same, in which directories may have been removed."""
        return msgspec.structs.replace(self, removals=next(_removals))


_removals = count()


def directory(path: str, url: str, identity: tuple[int, int]) -> Directory:
    """Of a directory that was opened now: nothing is known of it yet."""
    return Directory(path, url, *identity, next(_removals))


class Shard(msgspec.Struct, array_like=True, frozen=True):
    """See the module."""

    plain: list[Place | bytes]
    sealed: Place
    key: bytes
    header: bytes


class Seal(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    shards: list[Shard]


class Open(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    sealed: Place
    plain: Place
    first_block: int
    key: bytes
    header: bytes


class Put(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    directory: Directory
    parts: list[str]
    data: Place
    temporary: str
    flag: int


class Read(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    directory: Directory
    parts: list[str]
    offset: int
    length: int
    step: int
    plain: Place
    plain_offset: int
    key: bytes
    header: bytes


class Ping(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""


class Go(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    wanted: bool


class Wanted(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""


class Done(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    names: list[str] = []
    size: int = 0


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """See the module."""

    kind: str
    message: str


Request = Seal | Open | Put | Read | Ping
Answer = Wanted | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request | Go).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
