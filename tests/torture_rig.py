"""Rounds of writing, dying, comparing: `KillRounds` (kill -9 of the mount), `LostRounds` (and of its machine), `PowerRounds` (power cuts).

One round: mounted, by a new process with nothing cached; compared with what the journals of all earlier rounds allow; written to by several
programs while sectors merge; dead at a random moment. `python -m tests.torture_rig` (scripts/torture) runs as many as wanted.

A round that shows nothing fails as well: nothing acknowledged, or nothing pending when it ended. Hosts are directories, or on S3
(`torture_hosts`): then sectors are staged and on their way when it dies, and a run in which none ever was fails, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from fusefs.control_client import ControlClient
from fusefs.mounts import mount_at
from storage import create_volume, parse_replication
from storage.keyfile import CHEAP
from tests.cli_runner import ROOT, environment
from tests.mount_child import PASSPHRASE
from tests.mounting import START_SECONDS, Mounted, MountFailed, reap, wait_until
from tests.power_rig import Power
from tests.torture_hosts import PLACES, Directories, DirectoryHost, Place, S3Host, TortureHost
from tests.torture_model import DIRECTORY, Tree

WRITERS = 3
SECTOR_SIZE = 64 * 1024
#: Tails go into sectors, many of them small, and small sectors are merged, several times in a round.
OPTIONS = "commit_interval=0.4,flush_interval=0.15"
#: Seconds in which writers write, at most.
LONGEST = 0.8
#: One round in so many lives until shards are being deleted: that takes a merge, two publications and the deleter's turn, seconds more.
DELETING = 6
COPIES = "2"
#: Bytes per second of a slow line to an S3 host: less than the writers write.
SLOW = 400_000.0


class Lost(AssertionError):
    """A round broke a promise; the text says which, and how to see it again."""


@dataclass(frozen=True)
class Round:
    """What a round was like."""

    number: int
    how: str
    seconds: float
    acknowledged: int
    pending: int

    def __str__(self) -> str:
        return f"round {self.number}: {self.how} after {self.seconds:.2f} s, {self.acknowledged} acknowledged, {self.pending} pending"


class Served(Protocol):
    """A mount in a process of its own."""

    def kill(self) -> None:
        """kill -9; nothing is mounted any more."""
        ...

    def logged(self) -> str: ...


class ByCommand:
    """`fusefs mount -f`, as a person types it."""

    def __init__(self, volume: Path, mountpoint: Path, options: str, log: Path, *, wait: bool = True) -> None:
        self._mountpoint = mountpoint
        self._log = log
        with open(log, "ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fusefs", "mount", "-f", volume, mountpoint, "-o", options],
                env=environment({"FUSEFS_PASSPHRASE": PASSPHRASE}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while wait and mount_at(mountpoint) is None:
            if self._process.poll() is not None:
                raise MountFailed(self._process.returncode, self.logged())
            if time.monotonic() > deadline:
                self.kill()
                raise MountFailed(-1, "not mounted in time:\n" + self.logged())
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()
        reap(self._process, self._mountpoint)
        if mount_at(self._mountpoint) is not None:
            subprocess.run(["fusermount3", "-u", "-z", self._mountpoint], check=True, capture_output=True)

    def logged(self) -> str:
        return self._log.read_text(errors="replace")


class Rounds(ABC):
    """A volume and what is known of it. Use in `with`: whatever happens, all processes are ended, nothing stays mounted."""

    def __init__(self, base: Path, seed: int, replication: str = COPIES) -> None:
        self.base = base
        self.seed = seed
        self.replication = parse_replication(replication)
        self.random = random.Random(seed)
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir()
        self.count = 0
        self.trees = [Tree(f"{seed}/{number}") for number in range(WRITERS)]
        #: Shards that were on the hosts at one look and not at the next: merged ones, and deleted files'.
        self.deleted = 0
        self._shards: set[str] = set()
        self._started = False
        self._writers: list[subprocess.Popen[bytes]] = []
        self._server: Served | None = None

    # ---- one round

    def round(self) -> Round:
        """Raises Lost. What the round before left is compared at the beginning, so the last one of a test is compared by `finish`."""
        self.count += 1
        self._mount()
        if not self._started:
            self._begin()
        self._compare()
        before = time.monotonic()
        self._write()
        try:
            how = self._die()
        finally:
            self._stop_writers()
            self._kill()
            self._gone()
        seconds = time.monotonic() - before
        self._read()
        done = Round(self.count, how, seconds, sum(tree.acknowledged for tree in self.trees), sum(tree.pending for tree in self.trees))
        if not done.acknowledged or not done.pending:
            raise self._lost([f"a round that shows nothing: {done}"])
        return done

    def finish(self) -> None:
        """Compare what the last round left."""
        self.count += 1
        self._mount()
        self._compare()
        self._kill()
        self._gone()

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_writers()
        self._kill()

    # ---- what differs

    hosts: list[TortureHost]

    @abstractmethod
    def _serve(self) -> Served:
        """Mount the volume; made first if there is none."""

    @abstractmethod
    def _die(self) -> str:
        """Let the writers write for a while, then end it. Says how."""

    def _gone(self) -> None:
        """After the mount's process ended."""
        return

    # ---- parts

    def _mount(self) -> None:
        try:
            self._server = self._serve()
        except MountFailed as error:
            raise self._lost([f"the volume cannot be mounted any more: {error}"]) from None

    def _kill(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.kill()

    def _begin(self) -> None:
        for number, tree in enumerate(self.trees):
            (self.mountpoint / f"w{number}").mkdir()
            (self.mountpoint / f"w{number}" / "sub").mkdir()
            tree.names["sub"] = [DIRECTORY]
            for path in (self.mountpoint / f"w{number}", self.mountpoint):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                os.fsync(fd)
                os.close(fd)
        self._started = True

    def _compare(self) -> None:
        wrong: list[str] = []
        for number, tree in enumerate(self.trees):
            root = self.mountpoint / f"w{number}"
            if not root.is_dir():
                raise self._lost([f"w{number}, made and fsync'd, is gone"])
            wrong += [f"w{number}/{line}" for line in tree.compare(root)]
        if wrong:
            raise self._lost(wrong)
        self._look()

    def _look(self) -> int:
        """At the shards on the hosts: how many are gone since the last look."""
        shards = set().union(*(host.shards() for host in self.hosts))
        gone = len(self._shards - shards)
        self.deleted += gone
        self._shards = shards
        return gone

    def _write(self) -> None:
        for number, tree in enumerate(self.trees):
            state = self.base / f"state{number}"
            state.write_text(json.dumps(tree.state()))
            self._journal(number).unlink(missing_ok=True)
            self._journal(number).touch()
            arguments = [str(self.mountpoint / f"w{number}"), str(self._journal(number)), str(state), tree.seed, str(self.count * 100_000)]
            with open(self.base / "writers.log", "ab") as log:
                self._writers.append(
                    subprocess.Popen([sys.executable, "-S", "-m", "tests.torture_writer", *arguments], cwd=ROOT, stderr=log)
                )

    def _journal(self, number: int) -> Path:
        return self.base / f"journal{number}"

    def _busy(self) -> None:
        """Until each writer has written something: a slow machine is no reason for a round that shows nothing."""
        deadline = time.monotonic() + 20
        while not all(self._journal(number).read_bytes().count(b"\n") > 3 for number in range(WRITERS)):
            if time.monotonic() > deadline:
                raise self._lost(["the writers do not get going: " + (self.base / "writers.log").read_text(errors="replace")[-2000:]])
            time.sleep(0.01)

    def _deleting(self) -> None:
        """In one round of some: until shards are being deleted, so that what comes then comes in the middle of it."""
        if self.count % DELETING != 2:
            return
        self._look()
        deadline = time.monotonic() + 30
        while not self._look():
            if any(process.poll() is not None for process in self._writers):
                # Without writers nothing becomes garbage; that one ended is for `_die` to say.
                return
            if time.monotonic() > deadline:
                raise self._lost([f"no shard was deleted in 30 s, of {len(self._shards)}"])
            time.sleep(0.02)

    def _stop_writers(self) -> None:
        for process in self._writers:
            process.kill()

    def _read(self) -> None:
        for process in self._writers:
            process.wait(20)
        self._writers.clear()
        for number, tree in enumerate(self.trees):
            tree.read(self._journal(number))

    def _failures(self) -> list[str]:
        return [f"a program in w{number} got an error: {tree.failure}" for number, tree in enumerate(self.trees) if tree.failure]

    def _lost(self, wrong: Sequence[str]) -> Lost:
        said = self._server.logged()[-3000:] if self._server is not None else ""
        return Lost("\n".join([f"seed {self.seed}, found in round {self.count}:", *wrong[:30], *([said] if said else [])]))


async def _create(volume: Path, hosts: Sequence[TortureHost], replication: str) -> None:
    await create_volume(
        volume, PASSPHRASE, hosts=[host.url for host in hosts], replication=replication, sector_size=SECTOR_SIZE, argon2=CHEAP
    )


class KillRounds(Rounds):
    """kill -9 of `fusefs mount`, started by the command line. Now and then while it is only starting. Lines to S3 hosts are slow in half of
    the rounds, and in some one is cut, until another round says otherwise: it is mounted again with that host away."""

    #: Hosts besides those the replication needs.
    MORE = 0
    #: May a line be cut?
    CUTS = True

    def __init__(self, base: Path, seed: int, replication: str = COPIES, place: Place | None = None) -> None:
        super().__init__(base, seed, replication)
        self._volume = base / "volume"
        place = place or Directories(base)
        self.hosts = [place.make(number) for number in range(self.replication.hosts_needed + self.MORE)]
        self.far = any(isinstance(host, S3Host) for host in self.hosts)
        #: Rounds that died with sectors in staging and nowhere else.
        self.staged = 0
        trio.run(_create, self._volume, self.hosts, replication)

    def finish(self) -> None:
        super().finish()
        if self.far and not self.staged:
            raise self._lost(["a run that shows nothing: no sector was staged when it died"])

    def _serve(self) -> Served:
        if self.count > 1 and self.random.random() < 0.2:
            # Recovery is no safer a time to die than any other.
            short = ByCommand(self._volume, self.mountpoint, OPTIONS, self.base / "log", wait=False)
            time.sleep(0.3 + self.random.random() * 0.7)
            short.kill()
        return ByCommand(self._volume, self.mountpoint, OPTIONS, self.base / "log")

    def _weather(self) -> str:
        """Of the lines to hosts. Says what it is."""
        lines = [host.line for host in self.hosts if isinstance(host, S3Host)]
        # Where deletions are waited for, what they need is there: a majority, and publications not behind a minute of sectors.
        fair = self.count % DELETING == 2
        slow = not fair and self.random.random() < 0.5
        for line in lines:
            line.rate, line.cut = SLOW if slow else None, False
        said = ", slow lines" if lines and slow else ""
        if lines and self.CUTS and not fair and self.random.random() < 0.4:
            cut = self.random.randrange(len(lines))
            lines[cut].cut = True
            said += f", host {cut} cut off"
        return said

    def _in_staging(self) -> str:
        """Before it dies: what is nowhere but here. Says how much."""
        if not self.far:
            return ""
        with ControlClient.connect(self._volume) as client:
            sectors = client.status().volume.staging.sectors
        self.staged += sectors > 0
        return f", {sectors} sectors staged"

    def _die(self) -> str:
        weather = self._weather()
        self._busy()
        self._deleting()
        time.sleep(self.random.random() ** 2 * LONGEST)
        weather += self._in_staging()
        # Before the kill: afterwards errors are what there is to expect.
        ended = [number for number, process in enumerate(self._writers) if process.poll() is not None]
        self._kill()
        if ended:
            self._stop_writers()
            self._read()
            raise self._lost(self._failures() or [f"the program in w{number} ended by itself" for number in ended])
        return f"killed{weather}"


class LostRounds(KillRounds):
    """The machine is lost: the mount is killed, its volume directory and, every other time, a host are gone. Back by `fusefs recover`.

    Half of the rounds with `-o fsync=hosts`: what was acknowledged must be there. In the others what was acknowledged when a `fusefs flush`
    that returned began, or before a publication that another one followed (whose cut is later). There is one host more than the replication
    needs: one may go.
    """

    MORE = 1
    CUTS = False

    def __init__(self, base: Path, seed: int, replication: str = COPIES, place: Place | None = None) -> None:
        super().__init__(base, seed, replication, place)
        self._at_once = False
        #: Bytes of each journal up to which what is acknowledged must be there; None: all.
        self._covered: list[int] | None = None

    def _serve(self) -> Served:
        if self.count > 1:
            self._lose()
        self._at_once = self.random.random() < 0.5
        self._covered = None
        options = f"{OPTIONS},fsync=hosts" if self._at_once else OPTIONS
        return ByCommand(self._volume, self.mountpoint, options, self.base / "log")

    def _die(self) -> str:
        if self._at_once:
            return super()._die() + ", fsync=hosts,"
        self._acknowledging()
        time.sleep(self.random.random() ** 2 * LONGEST)
        how = "flushed" if self.random.random() < 0.5 else "published"
        (self._flush if how == "flushed" else self._published)()
        return f"{how}, {super()._die()}"

    def _read(self) -> None:
        for process in self._writers:
            process.wait(20)
        self._writers.clear()
        for number, tree in enumerate(self.trees):
            tree.read(self._journal(number), None if self._covered is None else self._covered[number])

    def _acknowledging(self) -> None:
        """Until something is."""
        self._busy()
        wait_until(lambda: any(b'ed",' in self._journal(number).read_bytes() for number in range(WRITERS)), "an fsync", 20)

    def _sizes(self) -> list[int]:
        return [self._journal(number).stat().st_size for number in range(WRITERS)]

    def _flush(self) -> None:
        covered = self._sizes()
        self._command("flush", self.mountpoint)
        self._covered = covered

    def _published(self) -> None:
        """Until there is a publication after one before which something was acknowledged."""
        seen: list[tuple[int, list[int]]] = []
        first, before = self._sizes(), 0
        deadline = time.monotonic() + 30
        with ControlClient.connect(self._volume) as client:
            while self._covered is None:
                if time.monotonic() > deadline:
                    raise self._lost([f"no two publications in 30 s: {client.status()}"])
                sizes = self._sizes()
                seen.append((time.time_ns(), sizes))
                published = client.status().volume.published_ns
                if before and published != before:
                    latest = next((sizes for at, sizes in reversed(seen) if at <= before), first)
                    self._covered = latest if latest != first else None
                before = published
                time.sleep(0.01)

    def _command(self, *words: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "fusefs", *words],
            env=environment({"FUSEFS_PASSPHRASE": PASSPHRASE}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise self._lost([f"fusefs {' '.join(map(str, words))}: {done.stderr}"])

    def _lose(self) -> None:
        if keep := os.environ.get("FUSEFS_TORTURE_KEEP"):
            shutil.rmtree(Path(keep) / "left", ignore_errors=True)
            shutil.copytree(self.base, Path(keep) / "left", symlinks=True, ignore=shutil.ignore_patterns("control.sock", "mnt", "s3"))
        shutil.rmtree(self._volume)
        self._volume = self.base / f"volume{self.count}"
        away = self.random.choice(self.hosts) if self.random.random() < 0.5 else None
        if away is not None:
            away.leave()
        there = [host for host in self.hosts if host != away]
        # One is enough: it names the others.
        given = self.random.choice(there)
        self._command("recover", self._volume, "--host", given.url)
        if away is not None:
            # It comes back with what it had: an ancestor by now.
            away.come_back()


class PowerRounds(Rounds):
    """Power cuts of what holds the volume and its hosts. `without`: rules of `tests.mount_child` that are taken out."""

    def __init__(self, base: Path, seed: int, without: Sequence[str] = (), only: str = "", replication: str = COPIES) -> None:
        super().__init__(base, seed, replication)
        self._without = without
        self._only = only
        self.power = Power(base)
        self._volume = self.power.mountpoint / "volume"
        self._directories = [self.power.mountpoint / f"host{number}" for number in range(self.replication.hosts_needed)]
        self.hosts = [DirectoryHost(path) for path in self._directories]
        self._cut_seed: int | None = None

    def __enter__(self) -> Rounds:
        self.power.start()
        try:
            for path in self._directories:
                path.mkdir()
            fd = os.open(self.power.mountpoint, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            trio.run(_create, self._volume, self.hosts, str(self.replication))
            # Made is made.
            self.power.cut(None)
        finally:
            self.power.end()
        return self

    def _serve(self) -> Served:
        if keep := os.environ.get("FUSEFS_TORTURE_KEEP"):
            # What the cut left, to be looked at when the round after it fails.
            shutil.rmtree(Path(keep) / "survived", ignore_errors=True)
            shutil.copytree(self.power.backing, Path(keep) / "survived", symlinks=True, ignore=shutil.ignore_patterns("control.sock"))
        self.power.start()
        if self.count > 1 and self.random.random() < 0.15:
            self._cut_while_starting()
        return self._served()

    def _served(self) -> Served:
        return Mounted(self.base / "run", self._volume, self.mountpoint, OPTIONS, ["small-journal", *self._without])

    def _cut_while_starting(self) -> None:
        self._choose()
        self.power.arm(self.random.randint(1, 60), self._cut_seed)
        try:
            server = self._served()
        except MountFailed:
            pass  # by the cut
        else:
            if self.power.wait_cut(0.01) is None:
                self.power.cut(self._cut_seed)
            server.kill()
        self.power.end()
        self.power.start()

    def _choose(self) -> None:
        """What the next cut takes: all that is volatile, or a random part of it."""
        drop = self._only == "drop" or (self._only != "random" and self.random.random() < 0.35)
        self._cut_seed = None if drop else self.random.randrange(1 << 32)

    def _die(self) -> str:
        self._choose()
        self._busy()
        self._deleting()
        what = "all dropped" if self._cut_seed is None else "a random part dropped"
        if self.random.random() < 0.5:
            time.sleep(self.random.random() * LONGEST)
            if self.random.random() < 0.3:
                # The process goes first: what it was in the middle of is not even visible.
                self._kill()
            volatile = self.power.cut(self._cut_seed)
        else:
            time.sleep(self.random.random() * LONGEST / 2)
            self.power.arm(self.random.randint(1, 400), self._cut_seed)
            cut = self.power.wait_cut(LONGEST / 2)
            volatile = cut if cut is not None else self.power.cut(self._cut_seed)
            # What is acknowledged after a cut must have been durable before it.
            time.sleep(self.random.choice((0.0, 0.1)))
        return f"cut, {what}, {volatile} volatile,"

    def _gone(self) -> None:
        if self._server is None:
            self.power.end()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.power.end()


@contextmanager
def temporary() -> Iterator[Path]:
    """A directory with a short name: a volume's control socket lies inside."""
    path = Path(tempfile.mkdtemp(prefix="ft."))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description="Rounds of writing, dying and comparing; stops at the first loss.")
    parser.add_argument("what", choices=["kill", "power", "lost"])
    parser.add_argument("rounds", type=int)
    parser.add_argument("--seed", type=int, default=None, help="of a run that is to be seen again (times still differ)")
    parser.add_argument("--replication", default=COPIES, help=f"of the volume, on as many hosts as that takes; default {COPIES}")
    parser.add_argument(
        "--hosts",
        choices=sorted(PLACES),
        default="dir",
        help="kill and lost: directories (default), or s3: a SeaweedFS that runs for all rounds (scripts/bootstrap engines), each host"
        " behind a line that is slow or cut at times, so that sectors are staged and on their way when it dies",
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="RULE", help="power only: a rule of tests/mount_child.py to take out"
    )
    arguments = parser.parse_args()
    if arguments.what == "power" and arguments.hosts != "dir":
        parser.error("power cuts are of a disk, with the hosts on it: --hosts is for kill and lost")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(
        f"{arguments.what}: {arguments.rounds} rounds, --replication {arguments.replication} --hosts {arguments.hosts} --seed {seed}",
        flush=True,
    )
    # Ended from outside, too, it takes its mounts away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ExitStack() as stack:
        base = stack.enter_context(temporary())
        rounds: Rounds
        if arguments.what == "power":
            rounds = PowerRounds(base, seed, arguments.without, replication=arguments.replication)
        else:
            place = stack.enter_context(closing(PLACES[arguments.hosts](base)))
            rounds = (KillRounds if arguments.what == "kill" else LostRounds)(base, seed, arguments.replication, place)
        stack.enter_context(rounds)
        try:
            for _ in range(arguments.rounds):
                print(rounds.round(), flush=True)
            rounds.finish()
        except Lost as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{arguments.rounds} rounds: nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
