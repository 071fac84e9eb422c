"""S3 Object Lock: versions and their locks, through boto3. See `locking.Locks`.

obstore knows no retention and lists no versions. boto3's calls block and run in slots of the host, like obstore's; its client is safe for
several threads and bounds each request.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from storage.errors import Busy, Corrupt, FusefsError, NotFound, NotPermitted, Unavailable
from storage.hosts.buckets import s3_client
from storage.hosts.failures import refusal_of
from storage.hosts.layout import is_component
from storage.hosts.slots import Slots
from storage.hosts.urls import HostURL
from storage.interfaces import Buffer, StoredVersion
from storage.seams import Seams

T = TypeVar("T")

#: Threads working for one host at a time, beside those of its names.
SLOTS = 8
_MISSING = {"NoSuchKey", "NoSuchVersion", "404", "NotFound", "MethodNotAllowed"}
_LOST_RACE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_FORBIDDEN = {"AccessDenied", "403", "Forbidden", "InvalidRetentionPeriod", "ObjectLocked"}


class S3Locks:
    """Open with `S3Locks.open`."""

    def __init__(self, url: HostURL, client: Any, mode: str, seams: Seams) -> None:
        """`mode`: COMPLIANCE, which nobody can lift, or GOVERNANCE, which those with a special right can."""
        self._url, self._client, self._mode = url, client, mode
        self._prefix = f"{url.prefix}/" if url.prefix else ""
        self._slots = Slots(url.base, SLOTS, seams.threads.run_abandonable, "see whether it answers")

    @classmethod
    async def open(cls, url: HostURL, seams: Seams, mode: str) -> S3Locks:
        """Unavailable: no credentials."""
        return cls(url, await seams.threads.run_abandonable(url.base, s3_client, url), mode, seams)

    async def put(self, name: str, data: Buffer, until_ns: int, *, new: bool) -> tuple[str, str]:
        return await self._change(name, self._put, name, data, until_ns, new)

    async def extend(self, name: str, version: str, until_ns: int) -> None:
        await self._change(name, self._extend, name, version, until_ns)

    async def versions(self, start: str) -> AsyncIterator[StoredVersion]:
        pages = await self._slots.read(self._pages, start)
        while True:
            page = await self._slots.read(self._page, start, pages)
            if page is None:
                return
            for stored in page:
                yield stored

    async def folders(self, prefix: str) -> Sequence[str]:
        return await self._slots.read(self._folders, prefix)

    async def get(self, name: str, version: str, offset: int, length: int) -> bytes:
        return await self._slots.read(self._get, name, version, offset, length)

    async def remove(self, name: str, version: str) -> bool:
        return await self._change(name, self._remove, name, version)

    async def _change(self, name: str, fn: Callable[..., T], *args: object) -> T:
        return await self._slots.run(self._slots.changing(name), fn, *args)

    # ----------------------------------------------------------------------------------------------------------------
    # In threads

    def _put(self, name: str, data: Buffer, until_ns: int, new: bool) -> tuple[str, str]:
        body = bytes(data)
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        answer = self._call(
            "writing",
            name,
            self._client.put_object,
            Body=body,
            # S3 takes nothing under a lock without a checksum, and every engine knows this one.
            ContentMD5=base64.b64encode(digest).decode("ascii"),
            ObjectLockMode=self._mode,
            ObjectLockRetainUntilDate=_date(until_ns),
            **({"IfNoneMatch": "*"} if new else {}),
        )
        tag, version = answer.get("ETag"), answer.get("VersionId")
        if not tag or not version:
            raise Unavailable(f"host {self._url.base} gives {name} no version: its bucket keeps none; it cannot be used with locks")
        return str(tag), str(version)

    def _extend(self, name: str, version: str, until_ns: int) -> None:
        retention = {"Mode": self._mode, "RetainUntilDate": _date(until_ns)}
        try:
            self._call("locking", name, self._client.put_object_retention, VersionId=version, Retention=retention)
        except NotPermitted:
            # Nor may a lock be shortened: one that is longer already is as good.
            now = self._call("looking at the lock of", name, self._client.get_object_retention, VersionId=version)
            if now.get("Retention", {}).get("RetainUntilDate", datetime.min.replace(tzinfo=UTC)) < _date(until_ns):
                raise

    def _pages(self, start: str) -> Iterator[Any]:
        paginator = self._client.get_paginator("list_object_versions")
        return iter(paginator.paginate(Bucket=self._url.bucket, Prefix=self._prefix + start))

    def _page(self, start: str, pages: Iterator[Any]) -> list[StoredVersion] | None:
        """The next page; None after the last."""
        page = self._guarded("listing versions of", start, lambda: next(pages, None))
        if page is None:
            return None
        # Each of the two is by key, and of one key the newest first; how they lie between each other does not matter.
        found = heapq.merge(
            (self._stored(entry, marker=False) for entry in page.get("Versions", [])),
            (self._stored(entry, marker=True) for entry in page.get("DeleteMarkers", [])),
            key=lambda stored: stored.name,
        )
        return list(found)

    def _stored(self, entry: Any, *, marker: bool) -> StoredVersion:
        at = entry.get("LastModified")
        return StoredVersion(
            name=str(entry["Key"]).removeprefix(self._prefix),
            version=str(entry["VersionId"]),
            size=int(entry.get("Size", 0)),
            stored_ns=round(at.timestamp() * 1e9) if at is not None else 0,
            latest=bool(entry.get("IsLatest")),
            marker=marker,
        )

    def _folders(self, prefix: str) -> list[str]:
        paginator = self._client.get_paginator("list_object_versions")
        pages = paginator.paginate(Bucket=self._url.bucket, Prefix=self._prefix + prefix, Delimiter="/")
        found: set[str] = set()

        def walk() -> None:
            for page in pages:
                for entry in page.get("CommonPrefixes", []):
                    found.add(str(entry["Prefix"]).removeprefix(self._prefix + prefix).rstrip("/"))

        self._guarded("listing versions of", prefix, walk)
        return sorted(filter(is_component, found))

    def _get(self, name: str, version: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        ranges = {} if offset == 0 and length >= 2**31 else {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            answer = self._call("reading", name, self._client.get_object, VersionId=version, **ranges)
        except _PastEnd:
            return b""
        body = answer["Body"]
        data = self._guarded("reading", name, lambda: body.read(length + 1))
        body.close()
        if len(data) > length:
            raise Corrupt(f"host {self._url.base}: {name} came with more bytes than were asked for")
        return bytes(data)

    def _remove(self, name: str, version: str) -> bool:
        try:
            self._call("deleting", name, self._client.delete_object, VersionId=version)
        except NotPermitted:
            return False
        except NotFound:
            return True
        return True

    def _call(self, doing: str, name: str, method: Callable[..., Any], **arguments: Any) -> Any:
        return self._guarded(doing, name, lambda: method(Bucket=self._url.bucket, Key=self._prefix + name, **arguments))

    def _guarded(self, doing: str, name: str, call: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            return call()
        except ClientError as error:
            raise self._meaning(error.response, doing, name) from error
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise Unavailable(f"host {self._url.base}: {doing} {name}: {error}") from error

    def _meaning(self, response: Any, doing: str, name: str) -> FusefsError:
        said = response.get("Error", {})
        code, message = str(said.get("Code", "")), str(said.get("Message", ""))[:200]
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        host = f"host {self._url.base}"
        if code == "InvalidRange" or status == 416:
            return _PastEnd(f"{host}: {name} ends before")
        if code in _MISSING:
            return NotFound(f"{host}: there is no {name}, or not that version")
        if code in _LOST_RACE or status == 412:
            return Busy(f"{host}: {name} was changed by somebody else; read it again")
        if (refused := refusal_of(code, self._url)) is not None:
            return refused
        if code in _FORBIDDEN or status == 403:
            return NotPermitted(f"{host}: {doing} {name}: {code} {message}: a lock, or rights that these credentials lack")
        answer = f"{host}: {doing} {name}: {code} {message}"
        if code == "InvalidRequest" and self._url.parameter("lock") is not None and doing in ("writing", "locking"):
            # Where the bucket says what it has, a URL without lock= is enough; this one insists.
            return Unavailable(f"{answer}: has the bucket Object Lock? It is made with it, or else leave lock= out of the URL")
        return Unavailable(answer)

    def __repr__(self) -> str:
        return f"<S3Locks {self._url.base}, {self._mode}>"


class _PastEnd(NotFound):
    """The range begins behind the object's end."""


def _date(until_ns: int) -> datetime:
    """Up to the next whole second: S3 counts no smaller ones."""
    return datetime.fromtimestamp(-(-until_ns // 10**9), UTC)
