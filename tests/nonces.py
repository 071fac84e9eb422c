"""I1, checked from outside: over everything that was ever sealed, no (key, nonce) has sealed two different things.

nonces = Nonces(); opener = RecordingOpener(nonces)     # every put is seen before it happens, so what is deleted later counts, too
nonces.journal(path); nonces.host_directory(path)       # what lies in a volume's journal, or on a directory host, now
nonces.check()

No key is needed: AES-GCM under one key and nonce turns equal (header, plaintext) into equal bytes, so different bytes are the violation.

| what | key it was sealed under | nonce | compared |
|---|---|---|---|
| shard | salt of the epoch | sector id (and block) | all of its bytes |
| metadata object | one for the volume | 12 random bytes | all of its bytes |
| superblock | one for the volume | 12 random bytes | all of its bytes |
| tail in the journal | salt of the epoch | counter | value, offset, commit, sealed bytes |
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from storage.errors import Corrupt
from storage.hosts.faults import FaultyHost
from storage.hosts.opening import open_host
from storage.hosts.urls import HostURL
from storage.interfaces import Buffer, Host
from storage.metadata.records import HEADER_SIZE as SEGMENT_HEADER
from storage.metadata.records import TAG, decode_body, decode_segment_header, digest, read_record
from storage.sealing import HEADER_SIZE, ShardHeader
from storage.seams import Seams
from tests.host_rig import FaultyOpener


class Nonces:
    """What was sealed under each (key, nonce), in one volume's whole history."""

    def __init__(self) -> None:
        #: (kind, key, nonce) -> digest of what it sealed.
        self._seen: dict[tuple[str, bytes, bytes], bytes] = {}
        self.violations: list[str] = []
        #: Different (key, nonce) pairs of each kind: a checker that saw nothing has checked nothing.
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, key: bytes, nonce: bytes, content: bytes, where: str) -> None:
        found = self._seen.setdefault((kind, key, nonce), content)
        if found is content:
            self.counts[kind] += 1
        if found != content:
            self.violations.append(f"{kind} {nonce.hex()} under key {key.hex()[:8]} sealed something else before ({where})")

    def object(self, name: str, data: Buffer) -> None:
        """An object as a host gets or has it."""
        raw = bytes(data)
        if "/sectors/" in name:
            try:
                header = ShardHeader.parse(raw[:HEADER_SIZE])
            except Corrupt:
                return  # a test's own
            self.note("shard", header.salt, header.sector_id.to_bytes(8, "big"), digest(raw), name)
        elif "/metadata/" in name and raw[:4] == b"fsMD":
            self.note("object", b"", raw[48:60], digest(raw), name)
        elif "/superblock." in name and raw[:7] == b"fusefsS":
            self.note("superblock", b"", raw[80:92], digest(raw), name)

    def host_directory(self, root: Path) -> None:
        """Everything a directory host holds now."""
        for path in root.rglob("*"):
            if path.is_file() and "~" not in str(path.relative_to(root)):
                self.object(f"/{path.relative_to(root)}", path.read_bytes())

    def journal(self, volume: Path) -> None:
        """The tails that stand in the journal of a volume's directory now, torn commits left out."""
        for path in sorted((volume / "journal").glob("*-*")):
            raw = path.read_bytes()
            try:
                header = decode_segment_header(raw, path.name)
            except Corrupt:
                continue
            if header is None:
                continue
            at, view = SEGMENT_HEADER, memoryview(raw)
            while (head := read_record(view, at)) is not None and head.number == header.number:
                body = decode_body(view[head.body_at : head.sealed_at], head.sealed_length, path.name)
                sealed_at = head.sealed_at
                for entry in body.tails:
                    sealed = raw[sealed_at : sealed_at + entry.length + TAG]
                    sealed_at += entry.length + TAG
                    self.note("tail", header.salt, entry.nonce_bytes(), digest(entry.aad(head.sequence), sealed), path.name)
                at = head.end

    def check(self) -> None:
        assert not self.violations, "\n".join(self.violations[:10])

    def __repr__(self) -> str:
        return f"<Nonces {dict(self.counts)}, {len(self.violations)} violations>"


class RecordingHost(FaultyHost):
    """Tells what is put on it, before it is: also what a crash or a fault keeps from arriving has left this machine."""

    def __init__(self, inner: Host, seams: Seams, nonces: Nonces) -> None:
        super().__init__(inner, seams)
        self._nonces = nonces

    async def put(self, name: str, data: Buffer) -> str:
        self._nonces.object(name, data)
        return await super().put(name, data)

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        self._nonces.object(name, data)
        return await super().put_if(name, data, expected)


class RecordingOpener(FaultyOpener):
    """As FaultyOpener, with hosts that record; and are, as far as the volume knows, `far` away."""

    def __init__(self, nonces: Nonces, *, far: bool = False) -> None:
        super().__init__()
        self._nonces = nonces
        self._far = far

    def remote(self, url: HostURL) -> bool:
        return self._far or super().remote(url)

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        host = RecordingHost(await open_host(url, seams, create=create), seams, self._nonces)
        host.faults = self.faults.setdefault(url.base, host.faults)
        self.hosts[url.base] = host
        return host
