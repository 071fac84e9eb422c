"""Hosts that are object stores: `s3://`, `gs://`, `az://`, through obstore. What each can do is probed (`identity`).

obstore's own asyncio does not go with trio: its blocking calls, which release the GIL, run in threads, at most `SLOTS` at a time per host.
A caller may give up (see `slots`); the thread ends by itself, at the latest after `clients.REQUEST_SECONDS`.

*Again.* obstore's retries are off: they do not know what we know. What can help is tried again here, `ATTEMPTS` times in all, after
waits that double, with jitter; what cannot is raised at once (`failures`). A conditional put is tried again only where it is certain
that the first try has changed nothing: else its own first try could be what makes the second one lose. Whoever gets Unavailable from a
change does not know whether it happened.

*Bounded (I7).* Answers are read in pieces and counted: a host that sends more than was asked for is cut off, whatever its headers say.
Listings come page by page, but one level of names is gathered by obstore itself: a host that never ends it holds a thread and memory.

*Tags* are entity tags on S3 and Azure, generations on Google Cloud Storage.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import obstore
import trio

from storage.errors import BadArgument, Busy, Corrupt, FusefsError, NotFound, Unavailable
from storage.hosts.buckets import features
from storage.hosts.clients import REQUEST_SECONDS, Store, make_store
from storage.hosts.failures import STORE_ERRORS, Failure, failure_of
from storage.hosts.layout import check_name, check_prefix, is_component
from storage.hosts.slots import Slots
from storage.hosts.urls import HostURL
from storage.interfaces import Buffer, HostCapabilities, HostSpace, Level
from storage.seams import Seams

T = TypeVar("T")

#: Threads working for one host at a time.
SLOTS = 8
#: Tries of what can help, and seconds between the first two of them.
ATTEMPTS = 4
FIRST_WAIT = 0.2
#: Bytes of an answer that are taken at a time.
PIECE = 1024 * 1024
#: Names in one answer to a listing.
PAGE = 1000
#: Where a host reads no ranges, objects up to this size are read whole for them, and the last one is kept this many seconds.
MAX_WHOLE = 64 * 1024 * 1024
KEEP_SECONDS = 5.0


class _Failed(Exception):
    """A failed call on its way from a thread. Does not leave this module."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


Entries = list[tuple[str, int]]


class _Listing:
    """How far a listing has come. One thread at a time has it."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.pages: Iterator[Any] | None = None
        #: The last name that came.
        self.last: str | None = None
        self.ended = False


class ObjectStoreHost:
    """See `interfaces.Host`. Open with `ObjectStoreHost.open`."""

    def __init__(self, url: HostURL, store: Store, sender: Store, seams: Seams) -> None:
        """`sender`: a client for puts, as patient as a slow line needs."""
        self._place = url
        self._store = store
        self._sender = sender
        self._seams = seams
        self._slots = Slots(url.base, SLOTS, seams.threads.run_abandonable, "see whether it answers")
        #: False once it has answered a request for a range with the whole.
        self._ranges = True
        #: Name, content and age of what was last read whole for a range.
        self._whole: tuple[str, bytes, float] | None = None
        self._versions = False
        self._object_lock = False

    @classmethod
    async def open(cls, url: HostURL, seams: Seams, *, look: bool = False) -> ObjectStoreHost:
        """Unavailable where there are no credentials. Nothing is asked of the service yet, unless `look`: then what the bucket is for
        stands in `capabilities`; Unavailable where it does not answer."""
        store = await seams.threads.run_abandonable(url.base, make_store, url)
        # A slow line sends for longer than any answer may be silent.
        sender = await seams.threads.run_abandonable(url.base, make_store, url, REQUEST_SECONDS)
        host = cls(url, store, sender, seams)
        if look and url.scheme == "s3":
            host._versions, host._object_lock = await host._slots.read(features, url)
        return host

    @property
    def url(self) -> str:
        return self._place.base

    @property
    def place(self) -> HostURL:
        """Its parsed URL, for what obstore cannot do."""
        return self._place

    @property
    def capabilities(self) -> HostCapabilities:
        """What is worth probing."""
        return HostCapabilities(True, self._ranges, self._versions, self._object_lock)

    @property
    def at_work(self) -> int:
        """Threads that have not ended, given up or not."""
        return self._slots.at_work

    # ----------------------------------------------------------------------------------------------------------------
    # Reading

    async def get(self, name: str, limit: int) -> bytes:
        check_name(name)
        return await self._read(self._get, name, limit)

    async def get_range(self, name: str, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0:
            raise BadArgument(f"host {self.url}: {name}: {length} bytes at {offset} is no range")
        check_name(name)
        if length == 0:
            if await self.tag(name) is None:
                raise NotFound(f"host {self.url}: there is no {name}")
            return b""
        if self._ranges:
            try:
                return await self._read(self._get_range, name, offset, length, ranged=True)
            except _Failed as failed:
                if failed.failure.past_end:
                    return b""
                self._ranges = False
        return (await self._get_whole(name))[offset : offset + length]

    async def tag(self, name: str) -> str | None:
        check_name(name)
        try:
            return await self._read(self._tag, name)
        except NotFound:
            return None

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        check_prefix(prefix)
        listing = _Listing(prefix)
        while not listing.ended:
            for name, size in await self._read(self._next, listing):
                yield name, size

    async def level(self, prefix: str) -> Level:
        check_prefix(prefix)
        return await self._read(self._level, prefix)

    async def space(self) -> HostSpace | None:
        await trio.lowlevel.checkpoint()
        return None

    # ----------------------------------------------------------------------------------------------------------------
    # Changing

    async def put(self, name: str, data: Buffer) -> str:
        check_name(name)
        return await self._change(name, lambda _: True, self._put, name, data, None)

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        """As `interfaces.Host`. Cancelled, or Unavailable: read what is there, it may have happened."""
        check_name(name)
        if expected is None:
            mode: Any = "create"
        elif self._place.scheme != "gs":
            mode = {"e_tag": expected}
        elif expected.isascii() and expected.isdecimal():
            mode = {"version": expected}
        else:
            raise Busy(f"host {self.url}: {name} was changed by somebody else; read it again")
        return await self._change(name, lambda failure: failure.untouched, self._put, name, data, mode)

    async def delete(self, name: str) -> None:
        check_name(name)
        await self._change(name, lambda _: True, self._delete, name)

    async def aclose(self) -> None:
        self._whole = None
        await trio.lowlevel.checkpoint()

    # ----------------------------------------------------------------------------------------------------------------
    # In the event loop

    async def _read(self, fn: Callable[..., T], *args: object, ranged: bool = False) -> T:
        """Run in a slot, again where that can help. `ranged`: it asks for a range, and what only that may meet comes as `_Failed`."""

        async def once() -> T:
            return await self._slots.read(fn, *args)

        return await self._again(once, lambda _: True, ranged=ranged)

    async def _change(self, name: str, may: Callable[[Failure], bool], fn: Callable[..., T], *args: object) -> T:
        async def once() -> T:
            return await self._slots.run(self._slots.changing(name), fn, *args)

        try:
            return await self._again(once, may)
        finally:
            self._forget(name)

    async def _again(self, once: Callable[[], Awaitable[T]], may: Callable[[Failure], bool], *, ranged: bool = False) -> T:
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await once()
            except _Failed as failed:
                failure = failed.failure
                # From a host that answers so to anything else it is a refusal like others.
                if ranged and (failure.past_end or failure.no_ranges):
                    raise
                if not failure.again or not may(failure) or attempt == ATTEMPTS:
                    raise failure.error from failed.__cause__
            # Between half of it and all of it, so that many who were refused together do not come back together.
            share = int.from_bytes(self._seams.random.token_bytes(2), "big") / 65536
            await self._seams.clock.sleep(wait * (1 + share) / 2)
            wait *= 2
        raise AssertionError("unreachable")

    async def _get_whole(self, name: str) -> bytes:
        now = self._seams.clock.monotonic()
        kept = self._whole
        if kept is not None and kept[0] == name and now - kept[2] < KEEP_SECONDS:
            return kept[1]
        data = await self.get(name, MAX_WHOLE)
        self._whole = (name, data, now)
        return data

    def _forget(self, name: str) -> None:
        if self._whole is not None and self._whole[0] == name:
            self._whole = None

    # ----------------------------------------------------------------------------------------------------------------
    # In threads. Every exception is one of ours, or _Failed.

    def _get(self, name: str, limit: int) -> bytes:
        try:
            answer = obstore.get(self._store, name)
            size = answer.meta["size"]
            if size > limit:
                raise Corrupt(f"host {self.url}: {name} has {size} bytes, more than the {limit} it can have")
            data = _collect(answer, size)
        except STORE_ERRORS as error:
            raise self._failed(error, "reading", name) from error
        if len(data) != size:
            raise Unavailable(f"host {self.url}: {name}: {len(data)} bytes came of {size}; the connection broke")
        return data

    def _get_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            answer = obstore.get(self._store, name, options={"range": (offset, offset + length)})
            return _collect(answer, length)
        except STORE_ERRORS as error:
            raise self._failed(error, "reading", name) from error

    def _tag(self, name: str) -> str:
        try:
            meta = obstore.head(self._store, name)
        except STORE_ERRORS as error:
            raise self._failed(error, "looking at", name) from error
        return self._tag_of(name, meta)

    def _put(self, name: str, data: Buffer, mode: Any) -> str:
        try:
            result = obstore.put(self._sender, name, data, mode=mode or "overwrite", use_multipart=False)
        except STORE_ERRORS as error:
            raise self._failed(error, "writing", name) from error
        return self._tag_of(name, result)

    def _delete(self, name: str) -> None:
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError as error:
            # What is not there is no error; a bucket that is not there is.
            failure = failure_of(error, self._place, "deleting", name)
            if not isinstance(failure.error, NotFound):
                raise _Failed(failure) from error
        except STORE_ERRORS as error:
            raise self._failed(error, "deleting", name) from error

    def _next(self, listing: _Listing) -> Entries:
        """The next page. After a failure a new listing begins behind the last name: obstore's own would just end, as if that were all."""
        prefix = listing.prefix
        try:
            if listing.pages is None:
                listing.pages = iter(obstore.list(self._store, prefix.removesuffix("/") or None, offset=listing.last, chunk_size=PAGE))
            page = next(listing.pages, None)
        except STORE_ERRORS as error:
            listing.pages = None
            raise self._failed(error, "listing", prefix) from error
        if page is None:
            listing.ended = True
            return []
        listing.last = page[-1]["path"] if page else listing.last
        return [(entry["path"], entry["size"]) for entry in page if entry["path"].startswith(prefix) and _is_name(entry["path"])]

    def _level(self, prefix: str) -> Level:
        try:
            found = obstore.list_with_delimiter(self._store, prefix.removesuffix("/") or None)
        except STORE_ERRORS as error:
            raise self._failed(error, "listing", prefix) from error
        objects = {path[len(prefix) :]: entry["size"] for entry in found["objects"] if (path := entry["path"]).startswith(prefix)}
        folders = {path[len(prefix) :].rstrip("/") for path in found["common_prefixes"] if path.startswith(prefix)}
        return Level({name: size for name, size in objects.items() if is_component(name)}, sorted(filter(is_component, folders)))

    def _tag_of(self, name: str, meta: Any) -> str:
        tag = meta["version"] if self._place.scheme == "gs" else meta["e_tag"]
        if not isinstance(tag, str) or not tag:
            raise Unavailable(f"host {self.url} gives {name} no tag: it cannot be used")
        return tag

    def _failed(self, error: Exception, doing: str, name: str) -> _Failed | FusefsError:
        if isinstance(error, FusefsError):
            return error
        return _Failed(failure_of(error, self._place, doing, name))

    def __repr__(self) -> str:
        return f"<ObjectStoreHost {self.url}, {self._slots.at_work} at work>"


def _is_name(path: str) -> bool:
    try:
        check_name(path)
    except BadArgument:
        return False
    return True


def _collect(answer: Any, limit: int) -> bytes:
    """The bytes of an answer, no more than `limit`: what comes beyond is not read."""
    pieces: list[bytes] = []
    left = limit
    for piece in answer.stream(min_chunk_size=min(PIECE, max(1, limit))):
        data = bytes(piece)
        pieces.append(data[:left])
        left -= len(pieces[-1])
        if left == 0:
            break
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
