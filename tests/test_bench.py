"""scripts/bench: it measures what it says, of each system the same, and leaves nothing behind; its ratios are of medians."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from scripts.benchmarks import growth, ladder, pipeline, sealedlog
from scripts.benchmarks.markdown import page
from scripts.benchmarks.processes import has_argument, memory, serving
from scripts.benchmarks.report import Run
from scripts.benchmarks.runner import add_growth, chosen, everything, measure, shuffled
from scripts.benchmarks.seaweed import Seaweed
from scripts.benchmarks.syncing import Writer, flushes, is_flush, survives_kill
from scripts.benchmarks.systems import Failed, Fusefs, Pipeline, SealedLog, keep_apart
from scripts.benchmarks.tables import documents
from scripts.benchmarks.works import QUICK
from storage.coprocess import pair
from storage.sealing import TAG_SIZE, open_shard, sealed_length
from tests.cli_runner import ROOT


def benchmarked(directory: Path, *options: str) -> dict[str, Any]:
    """What a quick run on that directory found out: it ended well, left no system out, and nothing in the directory but its output."""
    output = directory / "out"
    command = [sys.executable, "-m", "scripts.benchmarks", "--quick", "--rounds", "1", "--no-ladder", *options]
    done = subprocess.run(
        [*command, "--on", directory, "--output", output],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(directory) == ["out"]
    found: dict[str, Any] = json.loads((output / "bench.json").read_text())
    assert found["left_out"] == {}
    return found


def test_a_quick_run_measures_the_disk_and_fusefs_alike_and_leaves_nothing(tmp_path: Path) -> None:
    found = benchmarked(tmp_path, "--system", "disk", "--system", "fusefs", "--group", "latency")
    assert set(found["rates"]) == {"disk", "fusefs"}
    assert all(rates["append to seen, us"][0] > 0 for rates in found["rates"].values())
    # What the benchmark itself checks: fsync reaches the disk, and what was fsync'd survives a kill -9.
    assert found["survives"] == {"fusefs": True}
    assert found["syncs"]["fusefs"] in (True, None)
    assert found["memory"]["fusefs"] > 1 << 20


def test_the_least_that_a_sealed_write_can_be_is_measured_beside_it(tmp_path: Path) -> None:
    found = benchmarked(tmp_path, "--system", "pipeline", "--system", "null", "--group", "file")
    assert {name: set(rates) for name, rates in found["rates"].items()} == {
        name: {"write 1 MiB", "write 128 KiB"} for name in ("null", "pipeline")
    }


def test_the_least_that_an_append_with_fsync_can_be_is_measured_beside_it(tmp_path: Path) -> None:
    found = benchmarked(tmp_path, "--system", "sealed log", "--system", "null", "--group", "appends")
    least, null = found["rates"]["sealed log"], found["rates"]["null"]
    assert set(least) == set(null)


def test_the_pipeline_seals_and_keeps_every_byte_that_it_is_measured_with(tmp_path: Path) -> None:
    """As promised when fsync returns."""
    system = Pipeline(tmp_path)
    sectors = [os.urandom(pipeline.SECTOR) for _ in range(3)]
    try:
        system.start()
        with open(system.path / "file", "wb", buffering=0) as file:
            for sector in sectors:
                for at in range(0, len(sector), 128 << 10):
                    file.write(sector[at : at + (128 << 10)])
            os.fsync(file.fileno())
        size = sealed_length(pipeline.SECTOR)
        stored = [path.read_bytes()[:size] for path in (system.base / "sectors").iterdir()]
        # Not only written: None where it cannot be found out (no strace).
        assert flushes(system, pipeline.SECTOR) in (True, None)
    finally:
        system.stop()
    assert len(stored) == len(sectors)
    for number, sector in enumerate(sectors, 1):
        expected = pipeline.header(number)
        (shard,) = (found for found in stored if found.startswith(expected.encode()))
        assert open_shard(pipeline.KEY, expected, shard) == sector


def test_the_sealed_log_has_each_append_when_its_fsync_returns(tmp_path: Path) -> None:
    system = SealedLog(tmp_path)
    log, end = system.base / "log.d/log", 0
    cipher = AESGCM(sealedlog.KEY)
    try:
        system.start()
        with open(system.path / "file", "ab", buffering=0) as file:
            for number in range(1, 60):
                line = os.urandom(200)
                file.write(line)
                os.fsync(file.fileno())
                record = sealedlog.HEAD + len(line) + TAG_SIZE
                found = log.read_bytes()[end : end + record + 32]
                assert cipher.decrypt(number.to_bytes(12, "big"), found[sealedlog.HEAD : record], None) == line
                assert blake3(found[:record]).digest() == found[record:]
                end += -(-len(found) // 8) * 8
        # Not only written: None where it cannot be found out (no strace).
        assert flushes(system) in (True, None)
    finally:
        system.stop()


def test_every_part_is_measured_alone_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "SECONDS", 0.01)
    place = tmp_path / "parts"
    place.mkdir()
    found = ladder.parts(place)
    several = ["coprocess"] if pair.SEALING.wanted else []
    for part in ("AES-256-GCM", "BLAKE3", "fdatasync", "into a thread", "LMDB", "MessagePack", *several):
        assert any(part in name and rate > 0 for name, rate in found.items()), part
    assert os.listdir(place) == []
    assert pair.SEALING.pid is None


def test_the_database_is_written_to_for_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a reader in between: pages that one may still see are not used again, and the map of a fixed size is full."""
    monkeypatch.setattr(ladder, "MIB", 1 << 17)
    monkeypatch.setattr(ladder, "SECONDS", 0.3)
    assert all(rate > 0 for rate in ladder._database(tmp_path / "small").values())


class Forgetful(Fusefs):
    """Loses a log's acknowledged lines, or a large file, when it is killed."""

    lost = ""

    def mount(self) -> None:
        super().mount()
        self._wait(mounted=True)
        # Not there at the first mount.
        with suppress(FileNotFoundError):
            os.truncate(self.path / self.lost, 0)


@pytest.mark.parametrize("lost", ["killed", "killed-large", "killed-log3", "nothing"])
def test_what_a_kill_loses_is_found(tmp_path: Path, lost: str) -> None:
    system = Forgetful(tmp_path)
    system.lost = lost
    try:
        system.start()
        assert survives_kill(system) == (lost == "nothing")
        assert os.listdir(system.path) == [], "what was made to find it out is gone"
    finally:
        system.stop()


def test_a_kill_that_hits_nobody_at_work_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that has failed long before would otherwise pass for one that was killed."""
    whole = Writer.run

    def failing(self: Writer) -> None:
        if self.path.name.endswith("log2"):
            self.acknowledged, self.error = 1, OSError("full, on purpose")
        else:
            whole(self)

    monkeypatch.setattr(Writer, "run", failing)
    system = Fusefs(tmp_path)
    try:
        system.start()
        with pytest.raises(Failed, match="log2 could not be written to: full, on purpose"):
            survives_kill(system)
    finally:
        system.stop()


def test_a_log_that_goes_on_with_something_else_has_not_survived(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log")
    writer.acknowledged = 2
    lines = [writer.line(number) for number in range(3)]
    for found, survived in (
        (lines[:1], False),
        (lines[:2], True),
        ([*lines[:2], lines[2][:4]], True),
        (lines, True),
        ([*lines[:2], bytes(9)], False),
        ([*lines, b"more"], False),
    ):
        writer.path.write_bytes(b"".join(found))
        assert writer.survived() == survived, found


def test_a_write_is_a_flush_where_the_file_was_opened_so_or_it_is_told_to(tmp_path: Path) -> None:
    plain, synchronous = (os.open(tmp_path / str(flag), os.O_WRONLY | os.O_CREAT | flag) for flag in (0, os.O_DSYNC))
    me = os.getpid()
    try:
        assert is_flush(f"{me} fdatasync({plain}) = 0") and is_flush(f"{me}  sync() = 0")
        assert is_flush(f'{me} pwrite64({synchronous}, ""..., 10, 0) = 10') and not is_flush(f'{me} pwrite64({plain}, ""..., 10, 0) = 10')
        assert is_flush(f"{me} pwritev2({plain}, [...], 1, 0, RWF_DSYNC) = 10") and not is_flush(
            f"{me} pwritev2({plain}, [...], 1, 0, 0) = 10"
        )
        assert not is_flush("+++ exited with 0 +++") and not is_flush(f"{me} <... write resumed>) = 3")
    finally:
        os.close(plain)
        os.close(synchronous)


def test_of_growing_volumes_what_was_measured_before_one_failed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    class Told(growth.Grown):
        """Two turns of the larger one go well."""

        def start(self) -> None:
            pass

        unmount = stop = start

        def turn(self) -> dict[str, float]:
            turns.append(self.files)
            if self.files == 7 and turns.count(7) > 2:
                raise Failed("it is full")
            return {"mount, s": float(len(turns))}

    monkeypatch.setattr(growth, "Grown", Told)
    monkeypatch.setattr(growth, "appended", lambda base, total: {f"{total} appends": {"first tenth, appends/s": 1.0}})
    run = Run({})
    add_growth(run, tmp_path, [3, 7], 10, lambda _: None)
    assert turns == [3, 7, 3, 7, 3, 7, 3, 3]
    assert run.growth["7 files"]["mount, s"] == 3.0 and run.growth["3 files"]["mount, s"] == 5.0
    assert run.growth["10 appends"] == {"first tenth, appends/s": 1.0}
    assert run.left_out == {"7 files": "turn 3 of 5: it is full"}


def test_what_is_made_in_a_directory_is_kept_apart_where_the_filesystem_can(tmp_path: Path) -> None:
    kind = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "-T", tmp_path], capture_output=True, text=True, check=True).stdout.strip()
    keep_apart(tmp_path)
    flags = subprocess.run(["lsattr", "-d", tmp_path], capture_output=True, text=True, check=False).stdout.split()
    assert not kind.startswith("ext") or "T" in flags[0]


def test_a_volume_on_seaweedfs_is_measured_beside_obstore_alone_and_the_cluster_is_gone_afterwards(tmp_path: Path) -> None:
    found = benchmarked(tmp_path, "--group", "staging")
    measured = {name: set(rates) for name, rates in found["rates"].items()}
    both = {"write into staging", "upload behind"}
    assert measured == {"disk": {"write into staging"}, "fusefs seaweedfs": both, "obstore alone": {"upload behind"}}
    assert {(floor["work"], floor["of"]) for floor in found["floors"]} == {
        ("write into staging", "disk"),
        ("upload behind", "obstore alone"),
    }
    assert all(floor["reached"] > 0 for floor in found["floors"])
    assert all(floor["ok"] == (floor["rounds"] == "1 of 1") and floor["by round"] == floor["reached"] for floor in found["floors"])
    assert found["peaks"]["fusefs seaweedfs"] > 0
    assert found["survives"] == {"fusefs seaweedfs": True}
    assert [words for words in command_lines() if f"={tmp_path}/".encode() in words] == []


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # Others end meanwhile.
        with suppress(OSError):
            found.append(path.read_bytes())
    return found


#: Shares 64 MiB with a child that has the path nowhere in its command line, and 16 MiB of its own. Ends when its standard input does.
SHARING = f"""
import mmap, os, subprocess, sys
fd = os.memfd_create("shared")
os.ftruncate(fd, {64 << 20})
mapped = mmap.mmap(fd, {64 << 20})
mapped.write(bytes({64 << 20}))
child = "import mmap, sys; own = b'x' * {16 << 20}; mapped = mmap.mmap({{}}, {64 << 20}); mapped[:]; print(flush=True); sys.stdin.read()"
subprocess.run([sys.executable, "-c", child.format(fd)], pass_fds=[fd])
"""


def test_memory_is_of_all_processes_of_a_system_and_what_they_share_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "with a space"
    command = [sys.executable, "-c", SHARING, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdin is not None and started.stdout is not None
        started.stdout.readline()
        pids = serving(path)
        assert len(pids) == 2 and pids[0] == started.pid
        # Two interpreters have some too.
        assert 80 << 20 < memory(pids) < 120 << 20
        started.stdin.close()
    assert memory(pids) == 0


@pytest.mark.parametrize(
    ("line", "has"),
    [
        (b"mount\0/a b/mnt\0", True),
        (b"mount -o rw /a b/mnt\0\0\0\0", True),
        (b"mount\0/a b/mnt2\0", False),
        (b"mount\0/a\0b/mnt\0", False),
        (b"", False),
    ],
)
def test_an_argument_is_found_with_a_space_in_it_and_in_a_title_of_one_piece(line: bytes, has: bool) -> None:
    assert has_argument(line, b"/a b/mnt") is has


def test_a_system_works_where_the_path_has_a_space(tmp_path: Path) -> None:
    system = Fusefs(tmp_path / "with a space")
    try:
        system.start()
        (system.path / "file").write_bytes(bytes(1 << 20))
        assert system.processes() and system.memory() > 1 << 20
        system.unmount()
        assert system.processes() == []
    finally:
        system.stop()
    assert os.listdir(tmp_path / "with a space") == []


def test_without_seaweedfs_its_group_is_left_out_and_the_rest_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise FileNotFoundError(f"there is no {name}")

    monkeypatch.setattr("tests.engines.seaweedfs.program", missing)
    seaweed = Seaweed(tmp_path)
    groups = ["staging", "latency"]
    systems = chosen(tmp_path, seaweed, ["disk", "fusefs seaweedfs", "obstore alone"], groups)
    result = measure(systems, 1, groups, QUICK, lambda _: None)
    seaweed.stop()
    assert {name: "there is no weed" in why for name, why in result.left_out.items()} == {"fusefs seaweedfs": True, "obstore alone": True}
    assert set(result.rates["disk"]) == {"append to seen, us"}
    assert os.listdir(tmp_path) == []


def test_nobody_always_comes_after_the_same_one(tmp_path: Path) -> None:
    systems = everything(tmp_path, Seaweed(tmp_path))
    before: dict[str, set[str]] = {system.name: set() for system in systems}
    for number in range(7):
        order = shuffled(systems, number)
        assert sorted(system.name for system in order) == sorted(before) and order == shuffled(systems, number)
        for first, second in pairwise(order):
            before[second.name].add(first.name)
    assert all(len(names) >= 3 for names in before.values()), before


def test_groups_that_are_for_none_of_the_systems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="staging is not for gocryptfs"):
        chosen(tmp_path, Seaweed(tmp_path), ["gocryptfs"], ["staging"])


def test_floors_are_ratios_of_medians_to_the_best_peer_or_the_disk() -> None:
    run = Run({}, encrypted={"disk": False, "fusefs": True, "gocryptfs": True, "encfs": True}, syncs={"gocryptfs": True, "encfs": False})
    for system, rates in {"disk": (400, 500, 9), "fusefs": (360, 380, 900), "gocryptfs": (200, 300, 310), "encfs": (600, 600, 600)}.items():
        for rate in rates:
            run.add(system, {"write 128 KiB": float(rate)})
    reached = {(floor["system"], floor["of"]): floor["reached"] for floor in run.floors()}
    assert reached["fusefs", "disk"] == pytest.approx(380 / 400, abs=0.01)
    (to_disk,) = (floor for floor in run.floors() if (floor["system"], floor["of"]) == ("fusefs", "disk"))
    # 360 / 400, 380 / 500, 900 / 9.
    assert (to_disk["ok"], to_disk["by round"], to_disk["rounds"]) == (True, 0.9, "2 of 3")
    # Not encfs, which is quicker and does not sync.
    assert reached["fusefs", "best syncing"] == pytest.approx(380 / 300, abs=0.01)
    (compared,) = run.comparisons()
    assert (compared["best peer"], compared["to best peer"]) == ("encfs", pytest.approx(380 / 600, abs=0.01))
    assert (compared["best that syncs"], compared["to best that syncs"]) == ("gocryptfs", pytest.approx(380 / 300, abs=0.01))


def test_the_page_says_what_the_run_found_out() -> None:
    run = Run(
        {"kernel": "1.2"},
        encrypted={"disk": False, "fusefs": True, "gocryptfs": True},
        syncs={"gocryptfs": False},
        versions={"fusefs": "abc"},
    )
    for system, rate in {"disk": 1000.0, "fusefs": 500.0, "gocryptfs": 250.0}.items():
        run.add(system, {"write 128 KiB": rate})
    run.survives, run.growth = {"fusefs": True, "gocryptfs": False}, {"7 files": {"mount, s": 0.25}}
    run.memory, run.peaks = {"fusefs": 45 << 20, "gocryptfs": 8 << 20}, {"fusefs": 230 << 20, "gocryptfs": 9 << 20}
    said = page(run, "scripts/bench --rounds 1")
    assert "on commit abc" in said and "`scripts/bench --rounds 1`" in said
    assert "| write 128 KiB | 1,000 ±0% | 500 ±0% | 250 ±0% |" in said and "gocryptfs\\*" in said
    assert "| write 128 KiB | 0.5 | 2 (gocryptfs) |  |" in said
    assert "| write 128 KiB | fusefs | disk | 0.9 | **0.5** | 0.5 | 0 of 1 |" in said
    assert "kill -9 of fusefs; it was not after one of gocryptfs." in said and "7 files: mount, s: 0.25." in said
    assert "Memory at most, and at the end, anonymous and shared, MiB: fusefs 230 and 45, gocryptfs 9 and 8." in said


def test_of_times_less_is_better() -> None:
    run = Run({}, encrypted={"disk": False, "fusefs": True, "gocryptfs": True}, syncs={"gocryptfs": True})
    for system, micros in {"disk": 10.0, "fusefs": 20.0, "gocryptfs": 80.0}.items():
        run.add(system, {"append to seen, us": micros})
    (compared,) = run.comparisons()
    assert (compared["to disk"], compared["to best peer"]) == (0.5, 4.0)


def test_the_figures_in_the_documents_are_those_of_the_run_they_name() -> None:
    """Whoever runs `scripts/bench` again puts them there with scripts/benchmarks/tables.py."""
    for path, text in documents().items():
        assert path.read_text() == text, f"{path.name}: python -m scripts.benchmarks.tables"
