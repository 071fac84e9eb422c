"""The second process does what this one would, is of no consequence when it is gone, and leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import logging
import mmap
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import VolumeOptions, create_volume, open_volume
from storage.abandoned import Abandoned
from storage.coprocess import asked as asked_of
from storage.coprocess import client, pair, sealer, serve
from storage.coprocess.arena import FLAGS, SLOT, SMALL_SLOT, Arena
from storage.coprocess.aside import EventLoop
from storage.coprocess.asked import Asked, Gone
from storage.coprocess.client import LEAST
from storage.coprocess.disks import Disks
from storage.coprocess.process import Process
from storage.coprocess.sealer import PIECES, Job, Sealer
from storage.coprocess.wire import Answer, Done, Failed, Put, Read, Request, directory
from storage.errors import Corrupt, NotFound, Unavailable
from storage.hosts.directory import DirectoryHost
from storage.hosts.held import HeldFile
from storage.hosts.layout import check_name
from storage.hosts.tree import Tree
from storage.interfaces import Buffer
from storage.sealing import BLOCK, HEADER_SIZE, TAG_SIZE, Opening, ShardHeader, block_range, open_shard, root_of, seal
from storage.seams import Seams
from tests.mounting import mounting_in, wait_until

KEY = bytes(range(32))
NAME = "v/sectors/aa/aabb"


def noise(size: int) -> bytes:
    """The same each time."""
    return random.Random(size).randbytes(size)


def header(length: int, sector_id: int = 7) -> ShardHeader:
    return ShardHeader(bytes(16), bytes(16), 1, length, sector_id)


class Both(Sealer, Disks):
    """One that does either: each is a kind of the same process."""


@pytest.fixture
def coprocess(monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    """One of the test's own, which is there."""
    made = Both(Arena())
    made.wanted = True
    # Whatever asks for it.
    monkeypatch.setattr("storage.hosts.delegating.DISKS", made)
    bring(made)
    yield made
    pid = made.pid
    made.close()
    assert pid is None or not alive(pid)


def bring(coprocess: Both) -> None:
    deadline = time.monotonic() + 20
    while not coprocess.start():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def asked(coprocess: Both, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of what it is asked for from now on."""
    kinds: list[str] = []
    begin = coprocess.begin

    def counted(request: Request, held: object, *, limit: int = 0, wanted: Callable[[], None] | None = None) -> Asked:
        kinds.append(type(request).__name__)
        return begin(request, held, limit=limit, wanted=wanted)

    monkeypatch.setattr(coprocess, "begin", counted)
    return kinds


# ---- the same as here


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([LEAST - 1, LEAST, LEAST + 1, 2 * BLOCK * 8, 1_000_003, SLOT - 20_000, SLOT + 1]),
    cuts=st.lists(st.integers(0, SLOT + 1), max_size=PIECES + 5),
    there=st.booleans(),
)
def test_sealed_there_is_sealed_here(coprocess: Both, size: int, cuts: list[int], there: bool) -> None:
    """In however many pieces, which stand in the arena or not."""
    data: Buffer = noise(size)
    if there:
        lent = coprocess.arena.lend(size)
        lent[:] = data
        data = lent.toreadonly()
    ends = sorted({min(cut, size) for cut in cuts} | {size})
    pieces: list[Buffer] = [memoryview(data)[begin:end] for begin, end in zip([0, *ends], ends, strict=False) if end > begin]
    sealed, root = coprocess.seal(KEY, header(size), pieces)
    expected = seal(KEY, header(size), [data])
    assert sealed == expected
    assert root == root_of(expected)
    with pytest.raises(TypeError):
        memoryview(sealed)[0] = 1


def test_several_are_sealed_at_once(coprocess: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shards of a coded sector: each with its own header, and a label behind it that is told as it is."""
    kinds = asked(coprocess, monkeypatch)
    whole = coprocess.arena.lend(4 << 20)
    whole[:] = noise(4 << 20)
    jobs: list[Job] = []
    for number in range(5):
        piece = whole[number << 20 : (number + 1) << 20].toreadonly() if number < 4 else noise(1 << 20)
        jobs.append((KEY, header((1 << 20) + 64, number + 1), [piece, bytes([number]) * 64]))
    sealed = coprocess.seal_all(jobs)
    assert kinds == ["Seal"]
    for (key, expected, data), (made, root) in zip(jobs, sealed, strict=True):
        assert made == seal(key, expected, data)
        assert root == root_of(made)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from([LEAST, 10 * BLOCK, 1_000_003, 4 << 20]), where=st.floats(0, 1), there=st.booleans())
def test_opened_there_is_opened_here_and_a_flipped_bit_is_found(coprocess: Both, size: int, where: float, there: bool) -> None:
    data = noise(size)
    sealed = memoryview(bytearray(seal(KEY, header(size), [data])))
    blocks = sealed[HEADER_SIZE:]
    if there:
        blocks = coprocess.arena.lend(len(sealed) - HEADER_SIZE)
        blocks[:] = sealed[HEADER_SIZE:]
    plain = coprocess.arena.lend(size)
    coprocess.open_into(KEY, header(size), 0, blocks, plain)
    assert plain == data
    at = min(int(where * len(blocks)), len(blocks) - 1)
    blocks[at] ^= 1
    with pytest.raises(Corrupt, match=f"sector 7: block {at // (BLOCK + TAG_SIZE)} does not verify"):
        coprocess.open_into(KEY, header(size), 0, blocks, plain)


async def test_it_is_asked_for_what_is_large_and_nothing_else(coprocess: Both, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else all the tests here would be of this process."""
    kinds = asked(coprocess, monkeypatch)
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    for size in (LEAST // 2, 4 << 20):
        sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
        await host.put(NAME, sealed)
        assert (tmp_path / "h" / NAME).read_bytes() == sealed
        assert await opened(coprocess, host, size) == noise(size)
        coprocess.open_into(KEY, header(size), 0, memoryview(sealed)[HEADER_SIZE:], coprocess.arena.lend(size))
    assert kinds == ["Seal", "Put", "Read", "Open"]


async def opened(coprocess: Both, host: DirectoryHost, size: int) -> bytes:
    """All of the shard, as HostIO reads it."""
    _, _, at, length = block_range(0, size, size)
    opening = Opening(KEY, header(size), 0, size, coprocess.arena.lend, coprocess.open_into)
    await host.get_range_opened(NAME, at, length, 8 * (BLOCK + TAG_SIZE), opening)
    return bytes(opening.plain())


# ---- hosts


async def test_what_a_disk_says_is_said_here(coprocess: Both, tmp_path: Path) -> None:
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    with pytest.raises(NotFound, match=NAME):
        await opened(coprocess, host, size)
    await host.put(NAME, sealed)
    path = tmp_path / "h" / NAME
    os.truncate(path, len(sealed) - 1)
    with pytest.raises(Corrupt, match="sector 7"):
        await opened(coprocess, host, size)
    os.truncate(path, 100_000)
    with pytest.raises(Corrupt, match="sector 7"):
        await opened(coprocess, host, size)
    os.rename(tmp_path / "h", tmp_path / "away")
    (tmp_path / "h").mkdir()
    with pytest.raises(Unavailable, match="another directory than before"):
        await host.put(NAME, sealed)
    with pytest.raises(Unavailable, match="another directory than before"):
        await opened(coprocess, host, size)
    assert os.listdir(tmp_path / "h") == []


@pytest.mark.parametrize("how", ["asked", "told", "orphaned"])
async def test_what_is_given_up_before_the_rename_does_not_happen(coprocess: Both, tmp_path: Path, how: str) -> None:
    """Its caller may have put something else there meanwhile; or have died, and another process has the volume."""
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])

    def given_up() -> None:
        raise Abandoned

    def tell(told: Callable[[], None] | None) -> None:
        if told is not None:
            told()

    if how == "orphaned":
        memory = memoryview(bytearray(2 * size))
        put = Put(host._tree._root.told, check_name(NAME), (0, size), "temporary", size)
        answer = serve.Channel(socket.socket(), memory, os.getppid() + 1, EventLoop(os.getppid()))._answer(put)
        assert answer == Failed("Abandoned", "")
    else:
        with pytest.raises(Abandoned):
            await trio.to_thread.run_sync(host._tree.put, check_name(NAME), sealed, "temporary", given_up, tell if how == "told" else None)
    assert not (tmp_path / "h" / NAME).exists()
    assert os.listdir(tmp_path / "h" / "~tmp") == []
    # Nor does it take the channel, or the flag, with it.
    await host.put(NAME, sealed)
    assert (tmp_path / "h" / NAME).read_bytes() == sealed


async def test_while_it_is_well_no_thread_waits_for_it(coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    whole = coprocess.arena.lend(size)
    whole[:] = noise(size)

    async def no_thread(*_: object, **__: object) -> None:
        raise AssertionError("a thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    begun = coprocess.begin_sealing([(KEY, header(size), [whole])])
    assert begun is not None
    assert await begun.soon()
    made = begun.end()
    assert made is not None
    assert made[0][0] == seal(KEY, header(size), [noise(size)])
    await host.put(NAME, made[0][0])
    await opened(coprocess, host, size)
    assert (tmp_path / "h" / NAME).read_bytes() == made[0][0]
    # What would have to be copied first, or is not worth it, is a thread's.
    assert coprocess.begin_sealing([(KEY, header(size), [noise(size)])]) is None
    assert coprocess.begin_sealing([(KEY, header(LEAST - 1), [whole[: LEAST - 1]])]) is None


async def test_a_sector_of_a_stream_is_sealed_and_put_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the whole of it: what is to be written stands where the coprocess sees it."""
    threads: list[tuple[str, int]] = []
    run = trio.to_thread.run_sync

    async def noted(fn: Callable[..., object], *args: object, **settings: object) -> object:
        names = [getattr(each, "__qualname__", "") for each in (fn, *args[:1])]
        sizes = [memoryview(each).nbytes for each in args if isinstance(each, (bytes, memoryview))]
        threads.append((" ".join(names), max(sizes, default=0)))
        return await run(fn, *args, **settings)  # type: ignore[arg-type]

    pair.start()
    with trio.fail_after(20):
        while not (pair.SEALING.start() & pair.DISKS.start()):
            await trio.sleep(0.01)
    await create_volume(tmp_path / "v", "pass", hosts=[f"dir:{tmp_path / 'h'}"])
    async with open_volume(tmp_path / "v", passphrase="pass", options=VolumeOptions(coprocesses=True)) as volume:
        fd = await volume.files.open("stream", write=True)
        monkeypatch.setattr(trio.to_thread, "run_sync", noted)
        for number in range(32):
            await volume.files.append(fd, noise(1 << 20) if number < 2 else noise((1 << 20) + number)[: 1 << 20])
        await volume.files.commit(fd)
        monkeypatch.setattr(trio.to_thread, "run_sync", run)
        await volume.files.close(fd)
    large = [name for name, size in threads if "seal" in name or ("put" in name and size >= LEAST)]
    # The first sector's beginning stands elsewhere: a file that is no stream yet.
    assert len(large) <= 1, threads


@pytest.mark.parametrize("where", ["event loop", "thread"])
async def test_a_put_that_is_cancelled_while_it_waits_does_not_happen(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whoever waits for it then."""
    monkeypatch.setattr(asked_of, "SOON", 0.1 if where == "thread" else 60.0)
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    await host.put(NAME, sealed)
    os.unlink(tmp_path / "h" / NAME)
    lock = os.open(tmp_path / "h" / "~lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with trio.move_on_after(0.5) as scope:
        await host.put(NAME, sealed)
    assert scope.cancelled_caught
    assert host._slots.at_work == 1
    with pytest.raises(Unavailable, match="hangs"):
        await host.put(NAME, sealed)
    os.close(lock)
    with trio.fail_after(20):
        while host._slots.at_work:
            await trio.sleep(0.01)
    assert not (tmp_path / "h" / NAME).exists()
    await host.put(NAME, sealed)
    assert (tmp_path / "h" / NAME).read_bytes() == sealed
    # What was raised where nobody heard it may hold on to one.
    gc.collect()
    assert coprocess.arena._memory is not None and len(coprocess.arena._memory.flags) == FLAGS


async def test_cancelled_at_any_time_nothing_is_lost_or_given_back_twice(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked_of, "SOON", 0.002)
    size, dice, free = 1 << 20, random.Random(5), coprocess.arena.free_slots
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    whole = [coprocess.seal(KEY, header(size), [noise(size)])[0]]
    await host.put(NAME, whole[0])
    pid = coprocess.pid

    async def works(number: int) -> None:
        for _ in range(25):
            with trio.move_on_after(dice.uniform(0, 0.012)):
                if number % 2:
                    with suppress(Unavailable):  # Its earlier change has not ended yet.
                        await host.put(NAME + str(number), whole[0])
                else:
                    await opened(coprocess, host, size)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(works, number)
        while host._slots.at_work:
            assert 0 < host._slots.at_work <= 4
            await trio.sleep(0.01)
        assert host._slots._hanging == []
        for number in (1, 3):
            await host.put(NAME + str(number), whole[0])
            assert (tmp_path / "h" / (NAME + str(number))).read_bytes() == whole[0]
        await opened(coprocess, host, size)
    assert coprocess.pid == pid
    whole.clear()
    gc.collect()
    assert coprocess.arena._memory is not None and len(coprocess.arena._memory.flags) == FLAGS
    assert coprocess.arena.free_slots == free


@pytest.mark.parametrize("when", ["soon is over", "cancelled", "sealing"])
async def test_where_no_thread_can_be_had_nothing_it_works_in_is_lent_again(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nobody can wait for it: it ends, and is not believed to hang for ever."""
    monkeypatch.setattr(asked_of, "SOON", 60.0 if when == "cancelled" else 0.1)
    monkeypatch.setattr(client, "PAUSE", 0.0)
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    whole = coprocess.arena.lend(size)
    whole[:] = noise(size)
    sealed, _ = coprocess.seal(KEY, header(size), [whole])
    await host.put(NAME, sealed)
    pid = coprocess.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    async def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    def none_soon(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(trio.to_thread, "run_sync", no_thread)
        patched.setattr(trio.lowlevel, "start_thread_soon", none_soon)
        if when == "sealing":
            begun = coprocess.begin_sealing([(KEY, header(size), [whole])])
            assert begun is not None and not await begun.soon()
            begun.forsake()
            begun.forsake()
        elif when == "cancelled":
            with trio.move_on_after(0.2) as scope:
                await host.put(NAME + "2", sealed)
            assert scope.cancelled_caught
        else:
            with pytest.raises(RuntimeError, match="thread"):
                await host.put(NAME + "2", sealed)
    with trio.fail_after(20):
        # It has been killed; nobody waited for its end.
        while alive(pid):
            await trio.sleep(0.01)
    assert host._slots.at_work == 0
    assert host._slots._hanging == []
    await host.put(NAME + "2", sealed)
    assert (tmp_path / "h" / (NAME + "2")).read_bytes() == sealed


async def test_what_cannot_be_waited_for_by_the_event_loop_is_a_thread_s(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have no memory for it, or a limit (max_user_watches)."""
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])

    async def refused(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(trio.lowlevel, "wait_readable", refused)
        kinds = asked(coprocess, patched)
        await host.put(NAME, sealed)
    assert kinds == ["Put"]
    assert (tmp_path / "h" / NAME).read_bytes() == sealed
    assert host._slots.at_work == 0


async def test_the_event_loop_does_not_wait_for_those_who_wait_for_its_end(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs in the kernel is waited for, for a second, by each thread that has given it up: not with the lock."""
    monkeypatch.setattr(client, "PAUSE", 0.0)
    size, old = 1 << 20, coprocess._process
    assert old is not None
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    plain, waiting = Process.ended, threading.Semaphore(0)
    go_on = threading.Event()

    def ended(self: Process, seconds: float = 0.0) -> bool:
        if self is not old:
            return plain(self, seconds)
        if seconds:
            waiting.release()
            assert go_on.wait(60)
        return False

    with monkeypatch.context() as patched:
        patched.setattr(Process, "ended", ended)
        threads = [threading.Thread(target=coprocess.give_up, args=(old, old.new_channel(), "no answer", None)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert waiting.acquire(timeout=20)
        bring(coprocess)
        # In the event loop: it would stand still here.
        kinds = asked(coprocess, patched)
        await host.put(NAME, sealed)
        go_on.set()
        for thread in threads:
            thread.join(20)
    assert kinds == ["Put"]
    assert old.ended(20)


async def test_the_event_loop_starts_no_process_and_closes_no_file(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either may take as long as a disk does; of a file that has no name any more even where that does not hang."""
    size, here, where = 1 << 20, threading.current_thread(), list[tuple[str, bool]]()
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    plain = subprocess.Popen.__init__

    def started(self: subprocess.Popen[bytes], *args: object, **settings: object) -> None:
        where.append(("started", threading.current_thread() is here))
        plain(self, *args, **settings)  # type: ignore[call-overload]

    class Told(HeldFile):
        __slots__ = ()

        def __del__(self) -> None:
            where.append(("closed", threading.current_thread() is here))
            super().__del__()

    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.setattr("storage.hosts.tree.HeldFile", Told)
    await host.put(NAME, sealed)
    # Held for longer than it is used.
    await host.get_range(NAME, 0, 100)
    monkeypatch.setattr("storage.hosts.held.LIFE", 0.0)
    await host.put(NAME, sealed)
    coprocess.close()
    await host.put(NAME, sealed)
    assert ("closed", False) in where and ("started", False) in where
    assert not any(loop for _, loop in where), where
    bring(coprocess)


async def test_names_whose_flush_failed_there_are_flushed_before_a_superblock(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: it may have been renamed, and be in no listing after a power cut."""
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    await host.put(NAME, sealed)
    assert "v/sectors/aa" not in host._tree._root._doubtful

    def fails(_: Asked) -> Done:
        raise Unavailable("fsync of its directory failed")

    monkeypatch.setattr(Asked, "answer", fails)
    with pytest.raises(Unavailable, match="fsync"):
        await host.put(NAME, sealed)
    assert "v/sectors/aa" in host._tree._root._doubtful


# ---- when it is gone


@contextmanager
def killed_again_and_again(coprocess: Both) -> Iterator[list[int]]:
    ended, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not ended.wait(0.03):
            pid = coprocess.pid
            if pid is not None and pid not in killed and coprocess.there:
                time.sleep(0.01)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


async def test_killed_at_any_time_it_takes_nothing_with_it(coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.0)
    size = 1 << 20
    data = noise(size)
    expected = seal(KEY, header(size), [data])
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)

    async def works(number: int) -> None:
        name = f"v/sectors/{number:02x}/aabb"
        for _ in range(60):
            sealed, root = await trio.to_thread.run_sync(coprocess.seal, KEY, header(size), [data])
            assert sealed == expected and root == root_of(expected)
            await host.put(name, sealed)
            _, _, at, length = block_range(0, size, size)
            opening = Opening(KEY, header(size), 0, size, coprocess.arena.lend, coprocess.open_into)
            await host.get_range_opened(name, at, length, 8 * (BLOCK + TAG_SIZE), opening)
            assert opening.plain() == data

    with killed_again_and_again(coprocess) as killed, trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(works, number)
    assert len(killed) >= 3
    # What it was putting when it was killed is not left there for ever.
    assert os.listdir(tmp_path / "h" / "~tmp") == []
    assert open_shard(KEY, header(size), (tmp_path / "h" / "v/sectors/00/aabb").read_bytes()) == data


def test_one_that_does_not_answer_is_not_waited_for_for_ever(
    coprocess: Both, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sealer, "TIMEOUT", 1)
    size, pid = 1 << 20, coprocess.pid
    assert pid is not None
    expected = seal(KEY, header(size), [noise(size)])
    os.kill(pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING, "fusefs.coprocess"):
        assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
    assert [record.message for record in caplog.records if "is gone" in record.message]
    # And goes on so.
    assert not coprocess.there
    begun = time.monotonic()
    assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
    assert time.monotonic() - begun < 1
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_one_that_hangs_does_not_keep_a_host_from_answering(coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a debugger, say. Disks may take as long as they like, so that it is not known by the time an answer takes."""
    monkeypatch.setattr(asked_of, "LOOK", 1)
    monkeypatch.setattr(client, "TIMEOUT", 1)
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    await host.put(NAME, sealed)
    assert coprocess.pid is not None
    os.kill(coprocess.pid, signal.SIGSTOP)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(opened, coprocess, host, size)
            nursery.start_soon(host.put, NAME + "cc", sealed)
    assert (tmp_path / "h" / (NAME + "cc")).read_bytes() == sealed
    assert not coprocess.there


async def test_one_that_waits_for_a_disk_is_waited_for(coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_of, "LOOK", 1)
    size, pid = 1 << 20, coprocess.pid
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    await host.put(NAME, sealed)
    # It waits for a lock, as it may for a disk.
    lock = os.open(tmp_path / "h" / "~lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.put, NAME + "dd", sealed)
        await trio.sleep(3.5)
        assert not (tmp_path / "h" / (NAME + "dd")).exists()
        os.close(lock)
    assert (tmp_path / "h" / (NAME + "dd")).read_bytes() == sealed
    assert coprocess.there and coprocess.pid == pid


@pytest.mark.parametrize("what", ["memfd_create is missing", "no descriptors", "a thousand descriptors"])
def test_descriptors(what: str, coprocess: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, or none."""
    size = 1 << 20
    expected = seal(KEY, header(size), [noise(size)])
    if what == "memfd_create is missing":
        # As of a Python that was built for an old glibc.
        monkeypatch.delattr(os, "memfd_create")
        other = Both(Arena())
        other.wanted = True
        assert other.seal(KEY, header(size), [noise(size)])[0] == expected
        assert other.pid is None
    elif what == "no descriptors":

        def none_left(*_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(socket, "socketpair", none_left)
        assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
        assert coprocess.there
        coprocess.close()
        assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
        assert not coprocess.there
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        monkeypatch.setattr(client, "PAUSE", 0.0)
        coprocess.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            bring(coprocess)
            assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
            assert coprocess.there
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("who", ["start", "there"])
def test_one_that_has_started_well_is_forgiven_what_was_before(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """Else some deaths in a year would have threads do its work for an hour each time."""
    coprocess = Both(Arena())
    coprocess.wanted = True
    monkeypatch.setattr(client, "PAUSE", 0.01)
    try:
        for _ in range(3):
            deadline = time.monotonic() + 20
            coprocess.start()
            while not (coprocess.start() if who == "start" else coprocess.there):
                assert time.monotonic() < deadline
                time.sleep(0.002)
                if coprocess.pid is None:
                    coprocess.start()
            assert coprocess._pause == 0
            process = coprocess._process
            assert process is not None
            with coprocess._lock:
                coprocess._end(process, "test")
            assert coprocess._pause == 0.01
    finally:
        coprocess.close()


def test_one_that_cannot_start_says_why_and_is_tried_less_and_less(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho a line >&2\necho no such module >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    coprocess, clock = Both(Arena()), 1000.0
    coprocess.wanted = True
    monkeypatch.setattr(client, "monotonic", lambda: clock)
    pauses: list[float] = []
    with caplog.at_level(logging.WARNING, "fusefs.coprocess"):
        while len(pauses) < 9:
            before = len(caplog.records)
            deadline = time.monotonic() + 20
            while len(caplog.records) == before:
                assert not coprocess.start()
                assert time.monotonic() < deadline
                time.sleep(0.002)
            pauses.append(coprocess._not_before - clock)
            clock = coprocess._not_before
    assert pauses == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert all("no such module" in record.message and "a line" not in record.message for record in caplog.records)


async def test_after_a_change_it_did_not_end_directories_are_flushed_again(
    coprocess: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: it may have made them anew, after somebody else had removed them, and have died before it flushed their names."""
    size = 1 << 20
    host = await DirectoryHost.open(str(tmp_path / "h"), Seams(), create=True)
    sealed, _ = coprocess.seal(KEY, header(size), [noise(size)])
    # Known to be durable here, and there.
    await host.put(NAME, b"small")
    await host.put(NAME, sealed)
    flushed: list[str] = []

    def spied(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))

    def dies(_: Asked) -> Done:
        (tmp_path / "h" / NAME).unlink()
        (tmp_path / "h" / NAME).parent.rmdir()
        (tmp_path / "h" / NAME).parent.mkdir()
        raise Gone

    monkeypatch.setattr("storage.hosts.root.sync_directory", spied)
    monkeypatch.setattr(Asked, "answer", dies)
    await host.put(NAME, sealed)
    assert (tmp_path / "h" / NAME).read_bytes() == sealed
    assert str(tmp_path / "h" / "v" / "sectors") in flushed
    assert str(tmp_path / "h" / "v" / "sectors" / "aa") in flushed


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EIO])
def test_what_it_has_not_enough_of_is_no_error_of_the_disk(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that asks may have more; it does it then."""

    def refuse(*_: object) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise Unavailable("no") from error

    monkeypatch.setattr(Tree, "get_range_in", refuse)
    memory = memoryview(bytearray(100_000))
    request = Read(
        directory("/nowhere", "dir:/nowhere", (0, 0)), ["a"], 64, BLOCK + TAG_SIZE, BLOCK, (0, BLOCK), 0, KEY, header(BLOCK).encode()
    )
    answer = serve.Channel(socket.socket(), memory, os.getppid(), EventLoop(os.getppid()))._answer(request)
    assert isinstance(answer, Failed)
    assert answer.kind == ("Unavailable" if number == errno.EIO else "Gone")


def test_whatever_ends_the_waiting_its_memory_is_not_lent_while_it_works_in_it(coprocess: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what it writes there late is another's, and is sealed as if it were good."""
    size, pid = 1 << 20, coprocess.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def no_memory(*_: object) -> Answer:
        raise MemoryError

    monkeypatch.setattr(Asked, "_received", no_memory)
    with pytest.raises(MemoryError):
        coprocess.seal(KEY, header(size), [noise(size)])
    assert not alive(pid)


def test_memory_that_cannot_be_given_back_is_lent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all of a program's memory is locked: refused, and no reason to fail."""

    class Locked(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("storage.coprocess.arena.mmap.mmap", Locked)
    arena = Arena(keep=SLOT, slots=4)
    for _ in range(3):
        views = [arena.lend(SLOT) for _ in range(4)]
        views.clear()
        arena.trim()
    assert arena.free_slots == 4


async def test_a_program_with_a_default_timeout_for_sockets_has_it_too(coprocess: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    socket.setdefaulttimeout(0.05)
    try:
        size, pid = 1 << 20, coprocess.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()
        expected = seal(KEY, header(size), [noise(size)])
        assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
        assert coprocess.pid == pid
    finally:
        socket.setdefaulttimeout(None)


@pytest.mark.parametrize("refused", ["memfd_create", "Popen", "executable"])
def test_where_there_can_be_none_threads_do_it(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    if refused == "memfd_create":
        monkeypatch.setattr(os, "memfd_create", refuse)
    elif refused == "Popen":
        monkeypatch.setattr(subprocess, "Popen", refuse)
    else:
        monkeypatch.setattr(sys, "executable", None)
    coprocess, size = Both(Arena()), 1 << 20
    coprocess.wanted = True
    for _ in range(3):
        sealed, root = coprocess.seal(KEY, header(size), [noise(size)])
        assert sealed == seal(KEY, header(size), [noise(size)])
        assert root == root_of(sealed)
        plain = coprocess.arena.lend(size)
        coprocess.open_into(KEY, header(size), 0, memoryview(sealed)[HEADER_SIZE:], plain)
        assert plain == noise(size)
    assert coprocess.pid is None


def test_it_knows_no_passphrase(coprocess: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEFS_PASSPHRASE", "correct horse battery staple")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    coprocess.close()
    bring(coprocess)
    environment = Path(f"/proc/{coprocess.pid}/environ").read_bytes()
    assert b"horse" not in environment and b"secret" not in environment
    assert b"LC_ALL=C.UTF-8" in environment.split(b"\0")


def test_a_forked_child_has_memory_and_a_process_of_its_own(coprocess: Both) -> None:
    """Else both would seal in the same memory."""
    size = 1 << 20
    child = os.fork()
    if not child:
        status = 1
        try:
            # As registered for the one there is.
            coprocess.forget()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not coprocess.start():
                time.sleep(0.01)
            good = [coprocess.seal(KEY, header(size, 8), [noise(size)])[0] == seal(KEY, header(size, 8), [noise(size)]) for _ in range(50)]
            status = 0 if all(good) and coprocess.there else 2
            coprocess.close()
        finally:
            os._exit(status)
    expected = seal(KEY, header(size), [noise(size)])
    for _ in range(50):
        assert coprocess.seal(KEY, header(size), [noise(size)])[0] == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert coprocess.there


def test_what_a_forked_child_lets_go_of_stays_its_parents() -> None:
    """Else pages that the parent has lent again would become zeros under it."""
    arena = Arena(keep=2 * SLOT, slots=8)
    inherited = [arena.lend(SLOT) for _ in range(8)]
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(go)
            arena.forget()
            # Once the parent has lent them again.
            os.read(ready, 1)
            inherited.clear()
        finally:
            os._exit(0)
    inherited.clear()
    again = [arena.lend(SLOT) for _ in range(8)]
    for view in again:
        view[:] = b"x" * SLOT
    os.close(go)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(view == b"x" * SLOT for view in again)
    os.close(ready)


# ---- its end


@pytest.mark.parametrize("end", ["unmounted", "killed"])
def test_it_ends_with_its_mount(tmp_path: Path, end: str) -> None:
    """However that ends; and it is the one that seals."""
    with mounting_in(tmp_path) as mounting:
        mount = mounting.mount(volume=mounting.volume(hosts=[f"dir:{tmp_path}/h"]))
        wait_until(lambda: len(children_of(mount.process.pid)) == 2, "a second process, and a third")
        children = children_of(mount.process.pid)
        spent = [cpu_of(child) for child in children]
        (mount.path / "file").write_bytes(noise(24 << 20))
        with open(mount.path / "file", "rb") as file:
            os.fsync(file.fileno())
            assert file.read() == noise(24 << 20)
        assert all(cpu_of(child) > before for child, before in zip(children, spent, strict=True))
        if end == "killed":
            mount.kill()
        else:
            mount.unmount()
        wait_until(lambda: not any(map(alive, children)), "their end")


@pytest.mark.parametrize("isolated", ["-P", "-I"])
def test_ps_shows_what_each_is_wherever_it_was_started(tmp_path: Path, isolated: str) -> None:
    root = str(Path(__file__).parent.parent)
    program = f"""
import sys, time
sys.path.insert(0, {root!r})
from storage.coprocess import pair
while not (pair.SEALING.start() & pair.DISKS.start()):
    time.sleep(0.01)
for each in (pair.SEALING, pair.DISKS):
    print(each.pid)
sys.stdout.flush()
sys.stdin.read()
"""
    # Nothing there is taken for what it is called.
    for name in ("socket.py", "storage.py", "msgspec.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    command = [sys.executable, isolated, "-c", program.replace("import sys, time", "import sys, time; sys.path.append('')")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as started:
        assert started.stdout is not None and started.stdin is not None
        pids = [int(started.stdout.readline()) for _ in range(2)]
        for pid, name in zip(pids, ("sealing", "disks"), strict=True):
            shown = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            assert shown == [sys.executable, "-I", f"{root}/storage/coprocess/__main__.py", name, ""]
            assert Path(f"/proc/{pid}/comm").read_text() == f"fusefs-{name}\n"
        started.stdin.close()
    wait_until(lambda: not any(map(alive, pids)), "their end")


def children_of(pid: int) -> list[int]:
    """That are coprocesses."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            # Others come and go.
            with suppress(OSError):
                if b"/storage/coprocess/" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def cpu_of(pid: int) -> int:
    """Nanoseconds, of all its threads."""
    return sum(int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) for task in os.listdir(f"/proc/{pid}/task"))


# ---- memory


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(1, SMALL_SLOT + 10), st.integers(1, SLOT + 10), st.none()), max_size=60))
def test_nothing_that_somebody_has_is_lent_again_and_what_is_kept_is_bounded(steps: list[int | None]) -> None:
    arena = Arena(keep=2 * SLOT, slots=3)
    held: list[tuple[memoryview, int]] = []
    for number, step in enumerate(steps):
        if step is None:
            del held[: 1 + number % 3]
        else:
            view = arena.lend(step)
            assert len(view) == step
            view[:1] = view[-1:] = bytes([number % 256])
            held.append((view, number % 256))
    for view, mark in held:
        assert (view[0], view[-1]) == (mark, mark)
    places = [place for view, _ in held if (place := arena.place(view)) is not None]
    for (first, size), (second, _) in itertools.pairwise(sorted(places)):
        assert first + size <= second
    assert len(places) <= 6
    held.clear()
    view = memoryview(b"")
    assert arena.free_slots == 3


def test_memory_that_is_not_kept_goes_back_to_the_kernel() -> None:
    arena = Arena(keep=2 * SLOT, slots=16)
    views = [arena.lend(SLOT) for _ in range(16)]
    for view in views:
        view[:] = bytes(SLOT)
    file = arena.file
    assert file is not None and os.fstat(file[0]).st_blocks * 512 >= 16 * SLOT
    views.clear()
    view = memoryview(b"")
    assert os.fstat(file[0]).st_blocks * 512 <= 2 * SLOT


def test_memory_that_is_not_used_for_a_while_goes_back_to_the_kernel() -> None:
    arena = Arena()
    views = [arena.lend(size) for size in (SLOT, SMALL_SLOT) for _ in range(6)]
    for view in views:
        view[:] = bytes(len(view))
    views.clear()
    view = memoryview(b"")
    file = arena.file
    assert file is not None and os.fstat(file[0]).st_blocks * 512 >= 6 * (SLOT + SMALL_SLOT)
    arena.trim()
    # All of it was used lately. Three of each are used again before it is looked at again.
    assert os.fstat(file[0]).st_blocks * 512 >= 6 * (SLOT + SMALL_SLOT)
    for size in (SLOT, SMALL_SLOT):
        again = [arena.lend(size) for _ in range(3)]
        again.clear()
    arena.trim()
    assert 0.9 <= os.fstat(file[0]).st_blocks * 512 / (3 * (SLOT + SMALL_SLOT)) <= 1.1
    arena.trim()
    assert os.fstat(file[0]).st_blocks == 0
