"""Checkpoints: all records of the volume, on the hosts, taken in slices while the filesystem goes on.

The scan holds no snapshot: it goes through the keys a slice at a time, each slice as it is then. That is enough, since the log is kept from
the cut on with which the scan began: applied in order on top, it brings every record that changed meanwhile, whole, to its newest value.
In memory at any time: one chunk's records (about TARGET_BODY) and its sealed bytes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from storage.history.objects import CHUNK, INDEX, TARGET_BODY, Ref, SealedObject, encode_chunk, encode_index
from storage.interfaces import MetadataReader
from storage.metadata.keys import NEVER_SHIPPED
from storage.seams import Seams

#: Records looked at in one go: about a millisecond.
SLICE = 500
#: Every key is below it.
_END = b"\xff" * 8


@dataclass(slots=True)
class Checkpoint:
    """One that is being written, or was."""

    #: The log goes on from here.
    sequence: int
    chunks: list[Ref] = field(default_factory=list)
    records: int = 0
    #: Bytes of all bodies; stored bytes of all objects.
    size: int = 0
    stored: int = 0
    index: Ref | None = None

    def refs(self) -> list[Ref]:
        """All of its objects."""
        return [*self.chunks, *([self.index] if self.index else [])]


Seal = Callable[[int, bytes], Awaitable[SealedObject]]
#: Brings an object to the hosts that can be reached. Unavailable if none takes it.
Spread = Callable[[SealedObject], Awaitable[None]]


async def write_checkpoint(checkpoint: Checkpoint, store: MetadataReader, seal: Seal, spread: Spread, seams: Seams) -> None:
    """Scan everything into `checkpoint`; its objects are on at least one host each when it returns, the index last.

    Raises what `spread` raises: then what was written is on no record, and is tidied away like anything nothing refers to.
    """

    async def put(pairs: list[tuple[bytes, bytes]]) -> None:
        body = await seams.threads.run(encode_chunk, pairs)
        sealed = await seal(CHUNK, body)
        await spread(sealed)
        checkpoint.chunks.append(sealed.ref)
        checkpoint.records += len(pairs)
        checkpoint.size += len(body)
        checkpoint.stored += sealed.ref.size

    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    start = b"\0"
    while found := store.scan(start, _END, SLICE):
        start = found[-1][0] + b"\0"
        for key, value in found:
            if key[:1] in NEVER_SHIPPED:
                continue
            pairs.append((key, value))
            size += len(key) + len(value) + 8
            if size >= TARGET_BODY:
                await put(pairs)
                pairs, size = [], 0
        await trio.lowlevel.checkpoint()
    if pairs or not checkpoint.chunks:
        await put(pairs)
    sealed = await seal(INDEX, encode_index(checkpoint.sequence, checkpoint.records, checkpoint.size, checkpoint.chunks))
    await spread(sealed)
    checkpoint.index = sealed.ref
    checkpoint.stored += sealed.ref.size
