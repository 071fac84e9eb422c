"""Real programs on a real mount: what POSIX says, apart from overwriting."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import filecmp
import logging
import logging.handlers
import mmap
import os
import random
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Mounted, mounting_in, wait_until

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounting_in(tmp_path_factory.mktemp("programs")) as mounting:
        yield mounting.mount("commit_interval=1")


@pytest.fixture
def work(mounted: Mounted, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on the mount, its own for each test; the mount is alive and without a bug afterwards."""
    path = mounted.path / request.node.name.replace("/", "_")[:100]
    path.mkdir()
    yield path
    assert mounted.process.poll() is None
    assert "Traceback" not in mounted.logged()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of many sizes, a link, an empty directory; on a local disk."""
    top = tmp_path / "tree"
    (top / "a" / "b c").mkdir(parents=True)
    (top / "empty").mkdir()
    numbers = random.Random(1)
    for index, size in enumerate((0, 1, 4095, 4096, 4097, 100_000, 1_500_000)):
        (top / "a" / f"f{index}").write_bytes(numbers.randbytes(size))
    (top / "a" / "b c" / "ü\n'x'").write_text("odd name")
    (top / "link").symlink_to("a/f1")
    os.chmod(top / "a" / "f1", 0o640)
    os.utime(top / "a" / "f2", ns=(1_234_567_890_123_456_789, 987_654_321_012_345_678))
    return top


def run(*command: object, **settings: object) -> str:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, timeout=120, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return str(done.stdout)


def same_tree(one: Path, other: Path) -> bool:
    done = subprocess.run(["diff", "-r", "--no-dereference", one, other], capture_output=True, check=False)
    return done.returncode == 0


def refused(call: object, *args: object, **kwargs: object) -> int:
    """errno of a call that must fail."""
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return caught.value.errno or 0


# ------------------------------------------------------------------------------------------------------------ programs


def test_cp_mv_rm(work: Path, tree: Path) -> None:
    run("cp", "-a", tree, work / "copy")
    assert same_tree(tree, work / "copy")
    assert (work / "copy" / "a" / "f2").stat().st_mtime_ns == 987_654_321_012_345_678
    run("mv", work / "copy", work / "moved")
    assert same_tree(tree, work / "moved")
    run("rm", "-r", work / "moved")
    assert os.listdir(work) == []


def test_mv_from_and_to_another_filesystem(work: Path, tree: Path, tmp_path: Path) -> None:
    run("cp", "-a", tree, tmp_path / "keep")
    run("mv", tree, work / "in")
    assert same_tree(tmp_path / "keep", work / "in")
    run("mv", work / "in", tmp_path / "out")
    assert same_tree(tmp_path / "keep", tmp_path / "out")


def test_tar_out_and_in(work: Path, tree: Path) -> None:
    run("tar", "-cf", work / "t.tar", "-C", tree, ".")
    (work / "x").mkdir()
    run("tar", "-xpf", work / "t.tar", "-C", work / "x")
    assert same_tree(tree, work / "x")


def test_rsync_twice_sends_nothing_the_second_time(work: Path, tree: Path) -> None:
    run("rsync", "-a", f"{tree}/", work / "r")
    assert same_tree(tree, work / "r")
    assert run("rsync", "-ai", f"{tree}/", work / "r") == ""
    (tree / "a" / "f3").write_bytes(b"changed")
    run("rsync", "-a", f"{tree}/", work / "r")
    assert same_tree(tree, work / "r")


def test_gzip_and_back(work: Path, tree: Path) -> None:
    run("cp", tree / "a" / "f6", work / "f")
    run("gzip", "-k", work / "f")
    run("sh", "-c", f"gzip -dc {work}/f.gz > {work}/g")
    assert filecmp.cmp(tree / "a" / "f6", work / "g", shallow=False)


def test_git(work: Path) -> None:
    identity = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    run("git", "init", "-q", work / "repo", env=identity)
    (work / "repo" / "file").write_text("one\n")
    run("git", "-C", work / "repo", "add", "file", env=identity)
    run("git", "-C", work / "repo", "commit", "-qm", "first", env=identity)
    run("git", "clone", "-q", work / "repo", work / "clone", env=identity)
    run("git", "-C", work / "repo", "gc", "-q", env=identity)
    run("git", "-C", work / "repo", "fsck", env=identity)
    assert (work / "clone" / "file").read_text() == "one\n"


def test_find_du_df_ls(work: Path, tree: Path) -> None:
    run("cp", "-a", tree, work / "t")
    assert sorted(run("find", ".", cwd=tree).splitlines()) == sorted(run("find", ".", cwd=work / "t").splitlines())
    assert int(run("du", "-sb", "--apparent-size", work / "t" / "a" / "f5").split()[0]) == 100_000
    assert "b c" in run("ls", "-laR", work / "t")
    wait_until(lambda: int(run("df", "--output=size", work).split()[-1]) > 0, "hosts have told how much room they have")


def test_echo_and_tail_f(work: Path) -> None:
    log = work / "log"
    log.touch()
    with subprocess.Popen(["tail", "-n+1", "-f", log], stdout=subprocess.PIPE) as tail:
        lines: list[bytes] = []
        assert tail.stdout is not None
        readline = tail.stdout.readline
        reader = threading.Thread(target=lambda: lines.extend(iter(readline, b"")), daemon=True)
        reader.start()
        for number in range(5):
            run("sh", "-c", f"echo line {number} >> {log}")
            time.sleep(0.05)
        try:
            wait_until(lambda: len(lines) == 5, "tail shows five lines")
        finally:
            tail.terminate()
    assert lines == [b"line %d\n" % number for number in range(5)]


def test_python_logging_with_rotation(work: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(work / "app.log", maxBytes=500, backupCount=3)
    logger = logging.Logger("rotating")
    logger.addHandler(handler)
    for number in range(200):
        logger.warning("message %d", number)
    handler.close()
    text = "".join((work / name).read_text() for name in ("app.log.3", "app.log.2", "app.log.1", "app.log"))
    assert text.splitlines() == [f"message {number}" for number in range(200)][-len(text.splitlines()) :]
    assert len(text) > 1500


def test_sparse_copies(work: Path, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with open(source, "wb") as file:
        file.truncate(10_000_000)
        file.seek(5_000_000)
        file.write(b"in the middle")
    run("cp", "--sparse=always", source, work / "copy")
    assert filecmp.cmp(source, work / "copy", shallow=False)
    assert (work / "copy").stat().st_blocks * 512 < 1_000_000
    run("dd", f"if={source}", f"of={work / 'dd'}", "bs=64k", "conv=sparse", "status=none")
    run("rsync", "--sparse", source, work / "rsynced")
    assert filecmp.cmp(source, work / "dd", shallow=False)
    assert filecmp.cmp(source, work / "rsynced", shallow=False)


# --------------------------------------------------------------------------------------------------- append-only rules


def test_overwriting_is_refused_and_leaves_the_file_and_the_mount(work: Path, mounted: Mounted) -> None:
    path = work / "f"
    path.write_bytes(b"written once")
    with open(path, "r+b", buffering=0) as file:
        assert refused(file.write, b"W") == errno.EPERM
        assert file.write(b"written") == 7  # the same bytes
        file.seek(0, os.SEEK_END)
        assert file.write(b", and more") == 10
    assert path.read_bytes() == b"written once, and more"
    with mounted.control() as control:
        refusals = control.status().volume.refusals
    assert refusals[-1].path.endswith("/f")
    assert refusals[-1].offset == 0
    assert "python" in refusals[-1].program or "pytest" in refusals[-1].program
    assert "refused: " in mounted.logged()


def test_truncating(work: Path, mounted: Mounted) -> None:
    path = work / "f"
    path.write_bytes(b"0123456789")
    assert refused(os.truncate, path, 5) == errno.EPERM
    os.truncate(path, 10)
    assert path.read_bytes() == b"0123456789"
    os.truncate(path, 15)
    assert path.read_bytes() == b"0123456789" + bytes(5)
    os.truncate(path, 0)
    assert path.read_bytes() == b""
    path.write_bytes(b"again")
    path.write_bytes(b"and again")
    assert path.read_bytes() == b"and again"
    with mounted.control() as control:
        assert any(refusal.offset == 5 and refusal.path.endswith("/f") for refusal in control.status().volume.refusals)


def test_holes_are_filled_once(work: Path) -> None:
    with open(work / "f", "w+b", buffering=0) as file:
        file.seek(10_000)
        file.write(b"end")
        assert os.pread(file.fileno(), 20_000, 0) == bytes(10_000) + b"end"
        assert os.pwrite(file.fileno(), b"start", 0) == 5
        assert os.pwrite(file.fileno(), b"middle", 4096) == 6
        assert refused(os.pwrite, file.fileno(), b"X", 2) == errno.EPERM
        expected = bytearray(10_003)
        expected[:5], expected[4096:4102], expected[10_000:] = b"start", b"middle", b"end"
        assert os.pread(file.fileno(), 20_000, 0) == bytes(expected)


def test_parts_written_backwards(work: Path) -> None:
    data = random.Random(2).randbytes(1_000_000)
    with open(work / "f", "wb", buffering=0) as file:
        for start in range(900_000, -1, -100_000):
            os.pwrite(file.fileno(), data[start : start + 100_000], start)
    assert (work / "f").read_bytes() == data


# ------------------------------------------------------------------------------------------------------------- reading


def test_mmap_for_reading(work: Path) -> None:
    data = random.Random(3).randbytes(300_000)
    (work / "f").write_bytes(data)
    with open(work / "f", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == data
        with open(work / "f", "ab", buffering=0) as other:
            other.write(b"more")
        assert mapped[:] == data
    with (
        open(work / "f", "rb") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private,
    ):
        assert private[:] == data + b"more"
        private[0:3] = b"own"
    assert (work / "f").read_bytes() == data + b"more"


def test_a_shared_writable_mapping_is_refused(work: Path) -> None:
    (work / "f").write_bytes(b"x" * 8192)
    with open(work / "f", "r+b") as file:
        assert refused(mmap.mmap, file.fileno(), 0) == errno.ENODEV


def test_a_cached_reader_beside_a_direct_writer_sees_every_byte(work: Path) -> None:
    with open(work / "f", "wb", buffering=0) as writer, open(work / "f", "rb", buffering=0) as reader:
        written = b""
        for number in range(200):
            piece = b"%06d-" % number * (number % 40)
            writer.write(piece)
            written += piece
            assert os.pread(reader.fileno(), len(written) + 10, 0) == written


# --------------------------------------------------------------------------------------------------------------- names


def test_links(work: Path) -> None:
    (work / "f").write_bytes(b"content")
    os.link(work / "f", work / "g")
    assert (work / "g").stat().st_nlink == 2
    os.unlink(work / "f")
    assert (work / "g").read_bytes() == b"content"
    assert (work / "g").stat().st_nlink == 1
    os.symlink("x" * 3000, work / "s")
    assert os.readlink(work / "s") == "x" * 3000


def test_a_file_unlinked_while_open_lives_on(work: Path) -> None:
    with open(work / "f", "a+b", buffering=0) as file:
        file.write(b"before")
        os.unlink(work / "f")
        file.write(b" and after")
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 100, 0) == b"before and after"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert not (work / "f").exists()


def test_rename_over_an_open_file(work: Path) -> None:
    (work / "old").write_bytes(b"old")
    (work / "new").write_bytes(b"new")
    with open(work / "old", "rb") as file:
        os.rename(work / "new", work / "old")
        assert file.read() == b"old"
    assert (work / "old").read_bytes() == b"new"


def renameat2(source: Path, target: Path, flags: int) -> int:
    """0, or errno."""
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return 0
    return ctypes.get_errno()


def test_rename_without_replacing_and_exchanging(work: Path) -> None:
    (work / "a").write_text("a")
    (work / "b").write_text("b")
    assert renameat2(work / "a", work / "b", RENAME_NOREPLACE) == errno.EEXIST
    assert renameat2(work / "a", work / "c", RENAME_NOREPLACE) == 0
    assert renameat2(work / "c", work / "b", RENAME_EXCHANGE) == 0
    assert ((work / "c").read_text(), (work / "b").read_text()) == ("b", "a")
    assert renameat2(work / "c", work / "nowhere", RENAME_EXCHANGE) == errno.ENOENT
    assert renameat2(work / "c", work / "b", 4) in (errno.EINVAL, errno.EPERM)  # RENAME_WHITEOUT
    (work / "d").mkdir()
    assert renameat2(work / "c", work / "d", RENAME_EXCHANGE) == 0
    assert (work / "c").is_dir()


def test_directory_rules(work: Path) -> None:
    (work / "d" / "e").mkdir(parents=True)
    (work / "f").touch()
    assert refused(os.rmdir, work / "d") == errno.ENOTEMPTY
    assert refused(os.rename, work / "f", work / "d") == errno.EISDIR
    assert refused(os.rename, work / "d", work / "f") == errno.ENOTDIR
    assert refused(os.rename, work / "d", work / "d" / "e" / "x") == errno.EINVAL
    assert refused(os.mkdir, work / "d") == errno.EEXIST
    assert refused(os.unlink, work / "nowhere") == errno.ENOENT
    assert (work / "d").stat().st_nlink == 3
    os.rmdir(work / "d" / "e")
    assert (work / "d").stat().st_nlink == 2


def test_names(work: Path) -> None:
    longest = b"n" * 255
    odd = bytes(set(range(1, 256)) - {ord("/")})
    for name in (longest, odd[:200], odd[200:], b"\xff\xfe", b" ", b"..."):
        path = os.path.join(bytes(work), name)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        assert name in os.listdir(bytes(work))
        os.unlink(path)
    too_long = os.path.join(bytes(work), b"n" * 256)
    assert refused(os.open, too_long, os.O_CREAT | os.O_WRONLY) == errno.ENAMETOOLONG
    assert refused(os.stat, too_long) == errno.ENAMETOOLONG
    assert refused(os.mkdir, too_long) == errno.ENAMETOOLONG
    assert refused(os.symlink, b"x", too_long) == errno.ENAMETOOLONG
    assert os.pathconf(work, "PC_NAME_MAX") == 255


def test_a_directory_read_while_entries_come_and_go(work: Path) -> None:
    stay = {f"stay{number:04}" for number in range(600)}
    for number in range(600):
        (work / f"stay{number:04}").touch()
        (work / f"go{number:04}").touch()
    seen: list[str] = []
    with os.scandir(work) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count < 600:
                os.unlink(work / f"go{count:04}")
                (work / f"come{count:04}").touch()
    assert len(seen) == len(set(seen)), "an entry was shown twice"
    assert stay <= set(seen), "an entry that stayed was not shown"


def test_a_listing_has_both_dots(work: Path) -> None:
    (work / "d").mkdir()
    shown = run("ls", "-ai", work / "d").split()
    assert shown == [str((work / "d").stat().st_ino), ".", str(work.stat().st_ino), ".."]


def test_going_back_in_a_directory(work: Path) -> None:
    for number in range(300):
        (work / f"f{number}").touch()
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    directory = ctypes.c_void_p(libc.opendir(bytes(work)))

    def name() -> bytes:
        entry = libc.readdir(directory)
        return b"" if entry is None else bytes(ctypes.string_at(entry + 19))

    for _ in range(100):
        name()
    place = libc.telldir(directory)
    first = [name() for _ in range(50)]
    libc.seekdir(directory, ctypes.c_long(place))
    again = [name() for _ in range(50)]
    libc.closedir(directory)
    assert first == again
    assert b"" not in first


# ---------------------------------------------------------------------------------------------------------- attributes


def test_attributes(work: Path) -> None:
    path = work / "f"
    path.write_bytes(b"x")
    os.chmod(path, 0o4711)
    assert stat.S_IMODE(path.stat().st_mode) == 0o4711
    os.chown(path, 1234, 5678)
    now = path.stat()
    assert (now.st_uid, now.st_gid) == (1234, 5678)
    assert stat.S_IMODE(now.st_mode) == 0o711, "chown clears setuid"
    os.utime(path, ns=(1, -1_000_000_001))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1, -1_000_000_001)
    before = time.time_ns()
    os.utime(path)
    assert abs(path.stat().st_mtime_ns - before) < 5_000_000_000
    assert path.stat().st_ctime_ns >= before - 1_000_000_000


def test_umask_and_setgid_directories(work: Path) -> None:
    os.chown(work, 0, 4321)
    os.chmod(work, 0o2775)
    old = os.umask(0o027)
    try:
        (work / "f").touch()
        (work / "d").mkdir()
    finally:
        os.umask(old)
    assert stat.S_IMODE((work / "f").stat().st_mode) == 0o640
    assert (work / "f").stat().st_gid == 4321
    assert stat.S_IMODE((work / "d").stat().st_mode) == 0o2750
    assert (work / "d").stat().st_gid == 4321


def test_special_files(work: Path) -> None:
    os.mkfifo(work / "fifo", 0o600)
    os.mknod(work / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(work / "plain", stat.S_IFREG | 0o600)
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(work)
        try:
            server.bind("socket")
        finally:
            os.chdir("/")
        assert stat.S_ISSOCK((work / "socket").stat().st_mode)
    assert stat.S_ISFIFO((work / "fifo").stat().st_mode)
    assert (work / "null").stat().st_rdev == os.makedev(1, 3)
    assert (work / "plain").stat().st_size == 0
    with subprocess.Popen(["cat", work / "fifo"], stdout=subprocess.PIPE) as cat:
        (work / "fifo").write_bytes(b"through")
        assert cat.communicate(timeout=10)[0] == b"through"


def test_permissions_are_checked_for_others(work: Path) -> None:
    (work / "secret").write_text("s")
    os.chmod(work / "secret", 0o600)
    (work / "open").write_text("o")
    os.chmod(work / "open", 0o644)
    os.chmod(work, 0o755)

    def as_nobody(command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["sh", "-c", command], user=65534, group=65534, extra_groups=[], capture_output=True, cwd="/", check=False)

    assert as_nobody(f"cat {work}/open").stdout == b"o"
    assert b"Permission denied" in as_nobody(f"cat {work}/secret").stderr
    assert b"Permission denied" in as_nobody(f"touch {work}/new").stderr
    assert b"not permitted" in as_nobody(f"chmod 777 {work}/open").stderr


def test_writing_clears_setuid_for_others_than_root(work: Path) -> None:
    for way in (">>", ">", "1<>"):
        path = work / "f"
        path.write_text("")
        os.chmod(path, 0o6777)
        subprocess.run(["sh", "-c", f"echo x {way} {path}"], user=65534, group=65534, extra_groups=[], check=True, cwd="/")
        wait_until(lambda path=path: not stat.S_IMODE(path.stat().st_mode) & 0o4000, f"setuid is gone after {way}", 3)  # type: ignore[misc]


def test_a_direct_writer_moves_the_modification_time(work: Path) -> None:
    with open(work / "f", "w+b", buffering=0) as file:
        first = os.fstat(file.fileno()).st_mtime_ns
        time.sleep(1.3)
        file.write(b"later")
        wait_until(lambda: os.fstat(file.fileno()).st_mtime_ns > first + 1_000_000_000, "the time moves while the file is open")
    with open(work / "f", "r+b", buffering=0) as file:
        time.sleep(1.3)
        file.seek(0, os.SEEK_END)
        file.write(b"and later")
        before = time.time_ns()
    wait_until(lambda: abs((work / "f").stat().st_mtime_ns - before) < 500_000_000, "the time moves at close")


def test_a_time_set_behind_a_write_stays(work: Path) -> None:
    with open(work / "f", "w+b", buffering=0) as file:
        time.sleep(1.2)
        file.write(b"x")
        os.utime(file.fileno(), ns=(1_000, 2_000))
    os.utime(work / "f", ns=(1_000, 3_000))
    time.sleep(1.5)
    assert (work / "f").stat().st_mtime_ns == 3_000


def test_xattrs_are_off(work: Path) -> None:
    (work / "f").touch()
    assert refused(os.setxattr, work / "f", "user.x", b"v") == errno.EOPNOTSUPP
    assert refused(os.getxattr, work / "f", "user.x") == errno.EOPNOTSUPP


# --------------------------------------------------------------------------------------------------------------- locks


def test_locks_between_processes(work: Path) -> None:
    (work / "f").touch()
    with open(work / "f", "a") as file:
        for lock in (fcntl.flock, fcntl.lockf):
            lock(file, fcntl.LOCK_EX)
            other = "fcntl.flock" if lock is fcntl.flock else "fcntl.lockf"
            code = f"import fcntl; {other}(open({str(work / 'f')!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            done = subprocess.run(["python3", "-c", code], capture_output=True, check=False)
            assert b"BlockingIOError" in done.stderr
            lock(file, fcntl.LOCK_UN)
            run("python3", "-c", code)


def test_many_appenders_at_once_lose_no_line(work: Path) -> None:
    script = "i=0; while [ $i -lt 100 ]; do echo $0-$i >> $1; i=$((i+1)); done"
    children = [subprocess.Popen(["sh", "-c", script, str(number), work / "log"]) for number in range(4)]
    for child in children:
        assert child.wait(60) == 0
    lines = (work / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{number}-{index}" for number in range(4) for index in range(100))


def test_fsync_of_files_and_directories(work: Path) -> None:
    with open(work / "f", "ab", buffering=0) as file:
        file.write(b"x")
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    directory = os.open(work, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def test_reading_a_large_file_in_pieces(work: Path) -> None:
    data = random.Random(4).randbytes(9_000_000)
    (work / "f").write_bytes(data)
    numbers = random.Random(5)
    with open(work / "f", "rb", buffering=0) as file:
        for _ in range(50):
            at, size = numbers.randrange(len(data)), numbers.randrange(200_000)
            assert os.pread(file.fileno(), size, at) == data[at : at + size]
    shutil.copyfile(work / "f", work / "g")
    assert filecmp.cmp(work / "f", work / "g", shallow=False)


def test_a_bug_in_a_handler_costs_one_request(mounted: Mounted) -> None:
    """Not with the fixture `work`, which wants no traceback in the log."""
    with contextlib.suppress(FileExistsError):
        (mounted.path / "beside").mkdir()
    assert refused(os.stat, mounted.path / "bug") == errno.EIO
    assert (mounted.path / "beside").is_dir()
    assert "ZeroDivisionError" in mounted.logged()
    text = mounted.logged()
    mounted.log.write_text(text.replace("Traceback", "Expected"))
