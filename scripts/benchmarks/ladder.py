"""Where the time goes: each part alone, on this machine, now. Rates as in `works`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import blake3
import lmdb
import msgspec
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from scripts.benchmarks.systems import Failed
from scripts.benchmarks.works import MIB, Results, Sizes
from storage.coprocess import pair
from storage.coprocess.wire import Ping

SECONDS = 0.5
#: Of records: put into LMDB in one transaction, looked up together.
RECORDS = 200


def rate(work: Callable[[], object], amount: float) -> float:
    """`amount` per call, as often as it goes in `SECONDS`."""
    work()
    count, before = 0, time.perf_counter()
    while (seconds := time.perf_counter() - before) < SECONDS:
        work()
        count += 1
    return count * amount / seconds


def parts(base: Path) -> Results:
    """MiB/s or calls a second of what everything is made of."""
    sector, block = os.urandom(4 * MIB), os.urandom(64 << 10)
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    fd = os.open(base / "part", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, bytes(8 * MIB), 0)
    os.fsync(fd)

    def append() -> None:
        os.pwrite(fd, block[:512], 0)
        os.fdatasync(fd)

    def whole() -> None:
        os.pwrite(fd, sector, 0)
        os.fdatasync(fd)

    async def hops() -> float:
        before = trio.current_time()
        for _ in range(500):
            await trio.to_thread.run_sync(int)
        return 500 / (trio.current_time() - before)

    try:
        return {
            "AES-256-GCM, 64 KiB at a time": rate(lambda: cipher.encrypt(nonce, block, None), 1 / 16),
            "BLAKE3, 4 MiB": rate(lambda: blake3.blake3(sector).digest(), 4),
            "write 4 MiB + fdatasync": rate(whole, 4),
            "write 512 B + fdatasync, calls": rate(append, 1),
            "hops into a thread, calls": trio.run(hops),
            **_asked(),
            **_database(base / "lmdb"),
            **_messagepack(),
        }
    finally:
        os.close(fd)
        os.unlink(base / "part")


def _asked() -> Results:
    """Requests a second a coprocess answers that has nothing else to do. What is asked does nothing. With one core none is there."""
    sealing = pair.SEALING
    deadline = time.monotonic() + 10
    try:
        while not sealing.start():
            if not sealing.wanted:
                return {}
            if time.monotonic() > deadline:
                raise Failed("the process that seals did not start within 10 s")
            time.sleep(0.01)
        return {"asking a coprocess, calls": rate(lambda: sealing.ask(Ping(), None), 1)}
    finally:
        pair.close()


def _database(directory: Path) -> Results:
    """LMDB, which is in memory then: records put in one transaction that is not flushed, and got again, as a takeover and a listing do."""
    pairs = [(b"i" + number.to_bytes(8, "big"), os.urandom(80)) for number in range(100 * RECORDS)]
    keys = [key for key, _ in pairs[:: len(pairs) // RECORDS]]
    try:
        with lmdb.open(os.fspath(directory), map_size=64 * MIB, sync=False, metasync=False) as env:

            def put() -> None:
                with env.begin(write=True) as changes, changes.cursor() as cursor:
                    cursor.putmulti(pairs[:RECORDS])

            with env.begin(write=True) as changes, changes.cursor() as cursor:
                cursor.putmulti(pairs)
            # Before anybody reads: pages that a reader may still see are not used again.
            putting = rate(put, RECORDS)
            with env.begin() as snapshot, snapshot.cursor() as cursor:
                getting = rate(lambda: cursor.getmulti(keys), RECORDS)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {"LMDB: records put": putting, "LMDB: records got": getting}


def _messagepack() -> Results:
    """A record of twelve numbers, as an inode's is, there and back."""
    record = (1, 0o100644, 1, 0, 0, 0, 77, 4096, time.time_ns(), time.time_ns(), time.time_ns(), 0)
    encode = msgspec.msgpack.Encoder().encode
    raw = encode(record)
    decode = msgspec.msgpack.Decoder(tuple[int, ...]).decode

    def there() -> None:
        for _ in range(RECORDS):
            encode(record)

    def back() -> None:
        for _ in range(RECORDS):
            decode(raw)

    return {"MessagePack: records encoded": rate(there, RECORDS), "MessagePack: records decoded": rate(back, RECORDS)}


def library(base: Path, sizes: Sizes) -> Results:
    """Storage without FUSE: the same work through the library, in this process."""
    import storage

    async def measure() -> Results:
        host = base / "library-host"
        await storage.create_volume(base / "library", "library", hosts=[f"dir:{host}"])
        results: Results = {}
        async with storage.open_volume(base / "library", passphrase="library") as volume:  # noqa: S106
            files = volume.files
            data = os.urandom(128 << 10)
            fd = await files.open("file", write=True)
            before = trio.current_time()
            for _ in range(sizes.file // len(data)):
                await files.append(fd, data)
            await files.commit(fd)
            results["library: append 128 KiB, MiB"] = sizes.file / MIB / (trio.current_time() - before)
            before = trio.current_time()
            for at in range(0, sizes.file, MIB):
                await files.read_at(fd, at, MIB)
            results["library: read, MiB"] = sizes.file / MIB / (trio.current_time() - before)
            await files.close(fd)
            fd = await files.open("log", write=True)
            before = trio.current_time()
            for _ in range(sizes.synced):
                await files.append(fd, data[:200])
                await files.commit(fd)
            results["library: append 200 B + commit"] = sizes.synced / (trio.current_time() - before)
            before = trio.current_time()
            for _ in range(20_000):
                await files.append(fd, data[:100])
            results["library: append 100 B"] = 20_000 / (trio.current_time() - before)
            await files.close(fd)
        return results

    return trio.run(measure)
