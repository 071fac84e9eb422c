"""Cryptography, formats and hostile input, across layers: what a review found, and the property that I1 promises of a whole volume."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fusefs.cli import passphrase as cli_passphrase
from fusefs.cli.app import main as command
from fusefs.control import listen
from fusefs.control_protocol import ContractAnswer, MountStatus, StatusAnswer, decode_answer, encode, error_answer
from fusefs.daemon import Order, read_order, start
from storage import keyfile, sealing
from storage.contractor import TIMEOUT
from storage.creation import create_volume
from storage.errors import Corrupt, Exists, FusefsError, NoSpace, NotFound, Unavailable, WrongPassphrase
from storage.hosts.faults import Faults, FaultyHost, shards_only
from storage.hosts.hostdb import HostDB
from storage.hosts.layout import HOST_FILE
from storage.hosts.memory import forget_memory_hosts, memory_content
from storage.hosts.opening import open_host
from storage.hosts.registry import Opener
from storage.hosts.tree import Tree
from storage.hosts.urls import HostURL
from storage.interfaces import Batch, Buffer, Host
from storage.metadata import journal as journal_module
from storage.metadata.records import HEADER_SIZE
from storage.sealing import ShardHeader
from storage.seams import NoFailpoints, Seams
from storage.values.packing import MAX_TABLE, TRAILER_SIZE, TableEntry, encode_table, parse_table
from storage.volume import Volume, VolumeOptions
from storage.wiring import open_volume
from tests.fakes import BASE_NS, Crash, CrashAt, MemoryStore, make_seams
from tests.host_rig import Rig
from tests.metadata_rig import copy
from tests.rig import PASSPHRASE, SECTOR, host_dirs, make, opened

ODD = os.fsdecode(b"odd \xff")


# --------------------------------------------------------------------------------------------------- I1 of a whole volume

MARK = b"plaintext that nobody may see; "
NAME = "a-name-that-nobody-may-see"


class Ciphers:
    """Stands in for AESGCM everywhere: every (key, nonce) that ever seals, with what it sealed."""

    def __init__(self) -> None:
        self.sealed: dict[tuple[bytes, bytes], bytes] = {}
        self.twice: list[str] = []
        self._lock = threading.Lock()

    def note(self, key: bytes, nonce: bytes, data: Buffer, associated: bytes | None) -> None:
        content = hashlib.sha256(bytes(associated or b"") + b"|" + bytes(data)).digest()
        with self._lock:
            if self.sealed.setdefault((key, bytes(nonce)), content) != content:
                self.twice.append(f"nonce {bytes(nonce).hex()}")

    def make(self, key: bytes) -> Any:
        return _Recorded(self, key)

    @contextmanager
    def installed(self) -> Iterator[None]:
        modules = (sealing, journal_module, keyfile)
        for module in modules:
            module.AESGCM = self.make  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in modules:
                module.AESGCM = AESGCM  # type: ignore[attr-defined]


class _Recorded:
    def __init__(self, ciphers: Ciphers, key: bytes) -> None:
        self._ciphers, self._key, self._inner = ciphers, bytes(key), AESGCM(key)
        self.decrypt, self.decrypt_into = self._inner.decrypt, self._inner.decrypt_into

    def encrypt(self, nonce: bytes, data: Buffer, associated: bytes | None) -> bytes:
        self._ciphers.note(self._key, nonce, data, associated)
        return self._inner.encrypt(nonce, data, associated)

    def encrypt_into(self, nonce: bytes, data: Buffer, associated: bytes | None, into: Buffer) -> int:
        self._ciphers.note(self._key, nonce, data, associated)
        return self._inner.encrypt_into(nonce, data, associated, into)


class Puts(Opener):
    """Opens hosts that write down every put, whether it then fails or not."""

    def __init__(self) -> None:
        self.faults: dict[str, Faults] = {}
        self.shards: dict[tuple[bytes, int], bytes] = {}
        self.headers: list[ShardHeader] = []
        self.twice: list[str] = []
        self.legible: list[str] = []
        #: What the process that runs has opened.
        self.open: list[_Watched] = []

    async def __call__(self, url: HostURL, seams: Seams, *, create: bool = False) -> Host:
        host = _Watched(await open_host(url, seams, create=create), seams)
        host.puts = self
        self.open.append(host)
        host.faults = self.faults.setdefault(url.base, host.faults)
        return host

    def note(self, name: str, data: bytes) -> None:
        if MARK[:12] in data or NAME.encode() in data or NAME in name:
            self.legible.append(name)
        if "/sectors/" not in name:
            return
        header = ShardHeader.parse(data[: sealing.HEADER_SIZE])
        self.headers.append(header)
        assert len(data) == sealing.sealed_length(header.plaintext_length)
        if self.shards.setdefault((header.salt, header.sector_id), data) != data:
            self.twice.append(f"sector {header.sector_id} of epoch {header.epoch}")


class _Watched(FaultyHost):
    puts: Puts
    #: Of a process that was killed: what it had in flight arrives, but no superblock that names what it did later.
    killed = False

    async def put(self, name: str, data: Buffer) -> str:
        self.puts.note(name, bytes(data))
        return await super().put(name, data)

    async def put_if(self, name: str, data: Buffer, expected: str | None) -> str:
        self.puts.note(name, bytes(data))
        if self.killed and "/superblock." in name:
            raise Unavailable(f"{name}: this process is dead")
        return await super().put_if(name, data, expected)


#: A journal so small that tails which hosts do not take must be written to it again.
TIGHT = VolumeOptions(
    flush_interval=0.2,
    commit_interval=None,
    journal_segment=64 * 1024,
    journal_limit=512 * 1024,
    cache=1024 * 1024,
    tail_budget=1024 * 1024,
)
HOSTS = ("mem:one", "mem:two", "mem:three")

Step = tuple[str, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "commit", "flush", "bits", "free", "reopen", "crash", "crash torn", "lose answers", "fail"]),
        st.integers(0, 7),
    ),
    min_size=3,
    max_size=9,
)


class Driver:
    """A volume's history, on any number of processes that end well or badly, and what its files must hold."""

    def __init__(self, base: Path, puts: Puts) -> None:
        self.base, self.puts = base, puts
        self.lives = 0
        #: The step that ended the last process, "" if they are all done; and whether hosts were away in it.
        self._ending = ""
        self._starved = False
        #: name -> (everything appended, how much of it is known to be durable).
        self.files: dict[str, tuple[bytes, int]] = {}

    @property
    def path(self) -> Path:
        return self.base / f"life{self.lives}"

    async def run(self, plan: Sequence[Step]) -> None:
        await create_volume(
            self.path, PASSPHRASE, hosts=HOSTS, replication="2", sector_size=SECTOR // 4, argon2=keyfile.CHEAP, opener=self.puts
        )
        rest = list(plan)
        while True:
            self._ending = ""
            try:
                await self._life(rest)
            except NoSpace:
                # Hosts away, the journal full: what was not durable before is refused, not stored.
                assert self._starved
            if not self._ending:
                break
        async with open_volume(self.path, passphrase=PASSPHRASE, options=TIGHT, opener=self.puts) as volume:
            await self._compare(volume)

    async def _life(self, rest: list[Step]) -> None:
        """One process: until a step ends it, or there are no more."""
        self._starved = False
        self.puts.open.clear()
        for faults in self.puts.faults.values():
            faults.gone, faults.fail_next, faults.lose_answer_next = None, 0, 0
        async with open_volume(self.path, passphrase=PASSPHRASE, options=TIGHT, opener=self.puts) as volume:
            await self._compare(volume)
            while rest:
                what, which = rest.pop(0)
                self._ending = what
                if what == "reopen":
                    await self._tolerant(volume.commit, durable=True)
                    break
                if what.startswith("crash"):
                    # What kill -9 would leave; the process that was killed goes on, though, and seals: the worse for I1.
                    copy(self.path, self.base / f"life{self.lives + 1}", ignore=shutil.ignore_patterns("control.sock"))
                    self.lives += 1
                    # ... but a dead process publishes no superblock: that would fence the one that follows it, as it must.
                    volume.publisher = None
                    for host in self.puts.open:
                        host.killed = True
                    if what == "crash torn":
                        await self._torn()
                    await self._append(volume, which, 30_000, model=False)
                    with trio.move_on_after(2), suppress(FusefsError):
                        await volume.flush()
                    break
                await self._step(volume, what, which)
            else:
                self._ending = ""
            for faults in self.puts.faults.values():
                faults.gone = None

    async def _torn(self) -> None:
        """The next process dies in its very first commit, of which only the first 512 bytes come to the disk."""
        seams = Seams(failpoints=CrashAt("journal.append.before_fsync"))
        with pytest.raises(Crash):
            async with open_volume(self.path, passphrase=PASSPHRASE, options=TIGHT, opener=self.puts, seams=seams):
                pass
        tear(self.path)

    async def _step(self, volume: Volume, what: str, which: int) -> None:
        one = list(self.puts.faults.values())[which % len(HOSTS)]
        match what:
            case "append":
                await self._append(volume, which, 11 ** (which % 5) * 7)
            case "commit":
                await self._tolerant(volume.commit, durable=True)
            case "flush":
                await self._tolerant(volume.flush, durable=True)
            case "bits":
                # Enough partly filled sectors for a merge.
                for _ in range(9):
                    await self._append(volume, which, 300)
                    await self._tolerant(volume.flush, durable=True)
                await trio.sleep(0.05)
            case "free":
                name = f"{NAME}/{which}"
                if name in self.files:
                    del self.files[name]
                    await volume.files.delete(name)
            case "lose answers":
                one.lose_answer_next, one.only = 3, shards_only
            case "fail":
                one.fail_next, one.only = 3, shards_only
            case "back":
                for faults in self.puts.faults.values():
                    faults.gone = None
            case "starve":
                self._starved = True
                for faults in self.puts.faults.values():
                    faults.gone, faults.only = "away, as ordered", shards_only
                for _ in range(6):
                    await self._append(volume, which, 40_000)
                    await self._tolerant(volume.commit, durable=False)
                    await trio.sleep(0.06)

    async def _append(self, volume: Volume, which: int, size: int, *, model: bool = True) -> None:
        name = f"{NAME}/{which}"
        data = (MARK * (size // len(MARK) + 1))[: size - 8] + os.urandom(8)
        with trio.move_on_after(1), suppress(FusefsError):
            fd = await volume.files.open(name, write=True, read=False)
            # Once begun it must be known how it ended.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await volume.files.append(fd, data)
                if model:
                    old, durable = self.files.get(name, (b"", 0))
                    self.files[name] = (old + data, durable)
            await volume.files.close(fd)

    async def _tolerant(self, call: Callable[[], Any], *, durable: bool) -> None:
        sizes = {name: len(content) for name, (content, _) in self.files.items()}
        with trio.move_on_after(2) as scope:
            try:
                await call()
            except FusefsError:
                return
            if durable:
                self.files = {name: (content, max(old, sizes[name])) for name, (content, old) in self.files.items()}
        assert scope is not None

    async def _compare(self, volume: Volume) -> None:
        """I6: a prefix, at least up to the last commit. From then on it is what was appended."""
        for name, (content, durable) in list(self.files.items()):
            try:
                fd = await volume.files.open(name, existing=True)
            except NotFound:
                assert durable == 0
                del self.files[name]
                continue
            size = await volume.files.size_of(fd)
            assert durable <= size <= len(content)
            assert await volume.files.read_at(fd, 0, size) == content[:size]
            await volume.files.close(fd)
            self.files[name] = (content[:size], size)


def tear(volume: Path) -> Path:
    """Cut the newest segment in use off behind its header, as a disk with sectors of 512 bytes may."""
    in_use = [path for path in sorted((volume / "journal").glob("segment-*")) if any(path.read_bytes()[:HEADER_SIZE])]
    raw = bytearray(in_use[-1].read_bytes())
    raw[HEADER_SIZE:] = bytes(len(raw) - HEADER_SIZE)
    in_use[-1].write_bytes(raw)
    return in_use[-1]


@settings(max_examples=int(os.environ.get("FUSEFS_REVIEW_EXAMPLES", "3")), deadline=None, suppress_health_check=list(HealthCheck))
@given(steps)
@example(
    [("append", 3), ("crash", 3), ("append", 3), ("flush", 0), ("crash torn", 1), ("bits", 2), ("free", 2), ("bits", 4), ("reopen", 0)]
)
@example(
    [("append", 4), ("starve", 1), ("crash", 1), ("starve", 2), ("back", 0), ("flush", 0), ("lose answers", 1), ("bits", 5), ("free", 1)]
)
def test_no_key_and_nonce_ever_seals_two_things_and_no_host_sees_names_or_contents(
    tmp_path_factory: pytest.TempPathFactory, plan: list[Step]
) -> None:
    """I1, over a volume's whole history: appends, merges, frees, failing hosts, lost answers, a starved journal, restarts and crashes."""
    base = tmp_path_factory.mktemp("history")
    ciphers, puts = Ciphers(), Puts()
    forget_memory_hosts()
    logging.disable(logging.WARNING)
    try:
        with ciphers.installed(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("storage.metadata.room.ROOM_WAIT", 0.5)
            trio.run(Driver(base, puts).run, plan)
        assert ciphers.sealed
        assert ciphers.twice == []
        assert puts.twice == []
        assert puts.legible == []
        for path in base.rglob("*"):
            # Names may stand on the local disk; contents never.
            assert not path.is_file() or MARK[:12] not in path.read_bytes(), path
        for host in HOSTS:
            assert all(MARK[:12] not in data for data in memory_content(host.removeprefix("mem:")).objects.values())
    finally:
        logging.disable(logging.NOTSET)
        forget_memory_hosts()
        shutil.rmtree(base)


# ------------------------------------------------------------------------------------------------- sector ids and epochs


async def test_an_id_is_not_written_again_after_its_sector_was_deleted(tmp_path: Path) -> None:
    """I1, and I3: the deletion that still waits would take the new sector's shards away."""
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        sector_id = await volume.sectors.allocate_sector()
        await volume.sectors.write_sector(sector_id, b"content", "1")
        await volume.sectors.delete(sector_id)
        with pytest.raises(Exists):
            await volume.sectors.write_sector(sector_id, b"content", "1")


async def test_an_id_that_was_never_reserved_is_not_written(tmp_path: Path) -> None:
    await make(tmp_path / "v")
    async with opened(tmp_path / "v") as volume:
        for sector_id in (0, -1, 10**9, 2**63, 2**64):
            with pytest.raises(FusefsError):
                await volume.sectors.write_sector(sector_id, b"content", "1")


async def test_a_power_cut_in_the_first_commit_of_an_epoch_leaves_a_volume_that_opens(tmp_path: Path) -> None:
    """The segment's header reached the disk and its first record did not: that epoch's number comes again, its salt does not."""
    await make(tmp_path / "v")
    salts = set()
    for _ in range(3):
        with pytest.raises(Crash):
            async with opened(tmp_path / "v", seams=Seams(failpoints=CrashAt("journal.append.before_fsync"))):
                pass
        salts.add(tear(tmp_path / "v").read_bytes()[32:48])
    async with opened(tmp_path / "v") as volume:
        assert [epoch.number for epoch in volume.epochs.all()] == [1, 2]
        salts |= {epoch.salt for epoch in volume.epochs.all()}
        fd = await volume.files.open("f", write=True)
        await volume.files.append(fd, b"content")
    async with opened(tmp_path / "v") as volume:
        assert await volume.files.read_at(await volume.files.open("f"), 0, 10) == b"content"
    assert len(salts) == 5


@pytest.mark.parametrize("ending", ["crash", "close"])
async def test_a_volume_whose_journal_was_full_opens_and_empties_it_once_hosts_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Whatever filled the journal, reserve included: a new epoch's first commit must find room, and so must those that move tails out."""
    monkeypatch.setattr("storage.metadata.room.ROOM_WAIT", 0.2)
    puts = Puts()
    await create_volume(tmp_path / "v", PASSPHRASE, hosts=["mem:one"], sector_size=SECTOR // 4, argon2=keyfile.CHEAP, opener=puts)
    (faults,) = puts.faults.values()
    faults.only = shards_only
    content = b""
    for _ in range(3):
        faults.gone = "away, as ordered"
        with suppress(NoSpace):
            async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=TIGHT, opener=puts) as volume:
                fd = await volume.files.open("f", write=True)
                content = content[: await volume.files.size_of(fd)]
                for _ in range(40):
                    content += (data := os.urandom(20_000))
                    try:
                        await volume.files.append(fd, data)
                        await volume.commit()
                    except FusefsError:
                        break
                if ending == "crash":
                    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
                    shutil.copytree(tmp_path / "v", tmp_path / "copy")
                    # Dead at this point: it tells the hosts nothing more.
                    volume.publisher = None
        if ending == "crash":
            shutil.rmtree(tmp_path / "v")
            shutil.move(tmp_path / "copy", tmp_path / "v")
    faults.gone = None
    for _ in range(2):
        async with open_volume(tmp_path / "v", passphrase=PASSPHRASE, options=TIGHT, opener=puts) as volume:
            fd = await volume.files.open("f")
            size = await volume.files.size_of(fd)
            assert size > 200_000
            assert await volume.files.read_at(fd, 0, size) == content[:size]
            with trio.fail_after(20):
                await volume.flush()
                await volume.commit()
    forget_memory_hosts()


# --------------------------------------------------------------------------------------------------------- hostile bytes


def test_a_table_that_unpacks_to_more_than_it_says_costs_no_memory() -> None:
    """zlib takes a limit of 0 for none: 256 MiB out of 256 KiB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    good = encode_table([TableEntry(b"", 1, 0, 0, 0, 0)])
    magic, version, zero, _, _ = struct.unpack(">4sHHII", good[-TRAILER_SIZE:])
    for said in (0, 1, 100, MAX_TABLE + 1):
        with pytest.raises(Corrupt), peak_below(32 << 20):
            parse_table(packed + struct.pack(">4sHHII", magic, version, zero, len(packed), said))


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Memory the body takes, as the kernel sees it: what zlib allocates is not Python's."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    try:
        yield
    finally:
        assert _peak() - before < limit


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


HOSTILE: list[tuple[str, Callable[[Path], object]]] = [
    ("a directory", lambda path: path.mkdir()),
    ("a fifo", lambda path: os.mkfifo(path)),
    ("a link to a secret", lambda path: path.symlink_to("/etc/passwd")),
    ("a link to itself", lambda path: path.symlink_to(path)),
    ("a terabyte", lambda path: (path.touch(), os.truncate(path, 1 << 40))),
    ("nesting", lambda path: path.write_bytes(b"[" * 60_000)),
    ("a long number", lambda path: path.write_bytes(b'{"format":"fusefs host","format_version":' + b"9" * 60_000 + b"}")),
    ("no text", lambda path: path.write_bytes(b'{"format":"\xff\\ud800"}')),
    ("infinity", lambda path: path.write_bytes(b'{"format":"fusefs host","format_version":1e999}')),
]


@pytest.mark.parametrize(("what", "plant"), HOSTILE, ids=[what for what, _ in HOSTILE])
async def test_whatever_stands_in_place_of_a_hosts_file_or_a_shard_is_an_error_of_ours(
    tmp_path: Path, what: str, plant: Callable[[Path], object]
) -> None:
    url = host_dirs(tmp_path, 1)[0]
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        fd = await volume.files.open("f", write=True)
        await volume.files.append(fd, b"content" * 50_000)
        await volume.flush()
    (shard, *_) = [path for path in (tmp_path / "host0").rglob("sectors/*/*") if path.is_file()]
    kept = shard.read_bytes()
    shard.unlink()
    plant(shard)
    async with opened(tmp_path / "v") as volume:
        fd = await volume.files.open("f")
        with pytest.raises((Corrupt, Unavailable)):
            await volume.files.read_at(fd, 0, 400_000)
        contract = volume.contractor.contracts()[0]
        with pytest.raises(FusefsError):
            await volume.host_io.read(contract, shard.name, 1)
    shard.rmdir() if shard.is_dir() and not shard.is_symlink() else shard.unlink()
    shard.write_bytes(kept)
    identity = tmp_path / "host0" / HOST_FILE
    identity.unlink()
    plant(identity)
    # It opens, without that host; and what is there alone is not to be had, rather than wrong.
    async with opened(tmp_path / "v") as volume:
        assert not volume.hosts.available(1)
        fd = await volume.files.open("f")
        with pytest.raises(Unavailable):
            await volume.files.read_at(fd, 0, 400_000)


async def test_a_host_that_hangs_holds_up_no_contract(autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    contract = await rig.add("mem:hanging")
    rig.faults(contract).hang = True
    begun = trio.current_time()
    with trio.fail_after(10 * TIMEOUT):
        with pytest.raises(Unavailable):
            await rig.contractor.renew_contract(contract, 86400)
        with pytest.raises(Unavailable):
            await rig.contractor.conclude_contract("1", 86400)
    assert trio.current_time() - begun <= 2 * TIMEOUT
    assert rig.contractor.contracts() == [contract]
    forget_memory_hosts()


# ------------------------------------------------------------------------------------------------ what need not be UTF-8


def test_a_hosts_last_error_may_name_any_path() -> None:
    store = MemoryStore()
    hostdb = HostDB(store, make_seams(clock=_still()))
    hostdb.failed(1, Unavailable(f"the directory {ODD} is missing"))
    batch = Batch()
    hostdb.save(batch)
    store.apply(batch)
    assert "odd" in HostDB(store, make_seams(clock=_still())).stats(1).last_error


def _still() -> Any:
    from tests.fakes import ManualClock

    return ManualClock(BASE_NS)


async def test_what_was_appended_is_kept_though_the_host_with_an_odd_path_went_missing(tmp_path: Path) -> None:
    os.mkdir(tmp_path / ODD)
    url = HostURL("dir", str(tmp_path / ODD)).base
    await make(tmp_path / "v", [url])
    async with opened(tmp_path / "v") as volume:
        fd = await volume.files.open("f", write=True)
        await volume.files.append(fd, b"content")
        os.rename(tmp_path / ODD, tmp_path / "away")
        with pytest.raises(Unavailable):
            await volume.flush()
        await volume.files.append(fd, b", and more")
        encode(StatusAnswer(status=MountStatus(**_ABOUT, volume=await volume.status())))
    os.rename(tmp_path / "away", tmp_path / ODD)
    async with opened(tmp_path / "v") as volume:
        assert await volume.files.read_at(await volume.files.open("f"), 0, 99) == b"content, and more"


_ABOUT: dict[str, Any] = {
    "pid": 1, "mountpoint": "/m", "phase": "mounted", "options": "", "open_handles": 0, "flush_done": 0, "flush_total": 0
}  # fmt: skip


async def test_the_control_socket_tells_of_paths_that_are_not_text(tmp_path: Path) -> None:
    await make(tmp_path / ODD)
    async with opened(tmp_path / ODD) as volume:
        answer = decode_answer(encode(StatusAnswer(status=MountStatus(**_ABOUT, volume=await volume.status()))).rstrip())
        assert isinstance(answer, StatusAnswer)
        assert "odd" in answer.status.volume.path
    assert "odd" in str(decode_answer(encode(error_answer(NotFound(f"no {ODD}"))).rstrip()))
    assert decode_answer(encode(ContractAnswer(contract_id="0")).rstrip()) == ContractAnswer(contract_id="0")


# ---------------------------------------------------------------------------------------- secrets, modes, whose code runs


def test_the_mount_process_takes_odd_passphrases_and_paths(tmp_path: Path) -> None:
    """As far as one gets without mounting: the wrong passphrase is refused, the right one fails at the mount point only."""
    volume = tmp_path / ODD
    secret = os.fsdecode(b"odd \xe9\xff")

    async def init() -> None:
        await create_volume(volume, secret, sector_size=SECTOR, argon2=keyfile.CHEAP)

    trio.run(init)
    (tmp_path / "mnt").mkdir()
    with pytest.raises(WrongPassphrase):
        start(volume, tmp_path / "mnt", secret + "x", [], tmp_path / "log", print)
    with pytest.raises(NotFound, match="missing"):
        start(volume, tmp_path / f"{ODD} missing", secret, [], tmp_path / ODD / "log", print)


def test_the_mount_process_runs_no_code_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can leave an `outcome.py` in /tmp; the process that has the passphrase must not import it."""
    proof = tmp_path / "ran"
    (tmp_path / "outcome.py").write_text(f"open({str(proof)!r}, 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FusefsError) as caught:
        start(tmp_path / "v", tmp_path / "no such mount point", "secret", [], None, print)
    assert not proof.exists()
    assert isinstance(caught.value, NotFound)


def test_no_child_inherits_a_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusefs.daemon import _environment

    monkeypatch.setenv("FUSEFS_PASSPHRASE", "open sesame")
    monkeypatch.setenv("FUSEFS_NEW_PASSPHRASE", "open barley")
    assert "sesame" not in str(_environment())
    assert "barley" not in str(_environment())
    assert cli_passphrase.passphrase(None) == "open sesame"
    assert cli_passphrase.new_passphrase(None) == "open barley"
    seen = subprocess.run([sys.executable, "-c", "import os; print(os.environ)"], capture_output=True, check=True).stdout
    assert b"sesame" not in seen
    assert b"barley" not in seen


def test_an_order_does_not_show_its_passphrase() -> None:
    order = Order("v", "m", "open sesame", [], None, 3)
    assert "sesame" not in repr(order)
    assert "sesame" not in repr([order])
    import io

    assert read_order(io.BytesIO(msgspec.json.encode(order))) == order


def test_keys_and_contents_are_never_dumped(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from fusefs.cli.app import main; main(['--version']);sys.exit(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, cwd=Path(__file__).parent.parent).returncode == 0
    )
    assert command(["--version"]) == 0


def test_the_control_socket_is_the_owners_and_leaves_the_umask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[int] = []
    monkeypatch.setattr(os, "umask", changed.append)
    with listen(tmp_path):
        assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o600
    # It is every thread's: a directory that another one makes meanwhile on a host would have a wrong mode for good.
    assert changed == []


async def test_nothing_of_a_volume_or_a_host_can_be_read_by_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        await make(tmp_path / "v", [f"dir:{tmp_path / 'h'}"])
        async with opened(tmp_path / "v") as volume:
            fd = await volume.files.open("f", write=True)
            await volume.files.append(fd, b"content" * 50_000)
            await volume.flush()
    finally:
        os.umask(old)
    for path in [*(tmp_path / "v").rglob("*"), tmp_path / "v", *(tmp_path / "h").rglob("*"), tmp_path / "h"]:
        assert path.stat().st_mode & 0o077 == 0, path


# ------------------------------------------------------------------------------------------------- paths in a directory host


def test_no_name_leads_out_of_a_directory_host(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"outside")
    (tmp_path / "h" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "h" / "volumes").symlink_to(tmp_path / "out")
    tree = Tree.open(str(tmp_path / "h"), "dir:h", NoFailpoints(), BASE_NS, False)
    for parts in (["link", "x"], ["volumes", "x"]):
        with pytest.raises(NotFound):
            tree.get(parts, 100)
        with pytest.raises(FusefsError):
            tree.put(parts, b"overwritten", "t", lambda: None)
        with suppress(FusefsError):
            tree.delete(parts, lambda: None)
    (tmp_path / "h" / "x").symlink_to(tmp_path / "out" / "x")
    tree.put(["x"], b"inside", "t", lambda: None)
    assert (tmp_path / "out" / "x").read_bytes() == b"outside"
    assert tree.get(["x"], 100) == b"inside"
