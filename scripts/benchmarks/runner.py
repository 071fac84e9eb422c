"""Rounds: every system does a group of works, then every system the next group, in another order in each round."""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import lmdb

from scripts.benchmarks import growth, ladder, syncing
from scripts.benchmarks.processes import Peak
from scripts.benchmarks.report import Run
from scripts.benchmarks.seaweed import FusefsSeaweed, ObstoreAlone, Seaweed
from scripts.benchmarks.systems import ON_SEAWEEDFS, PEERS, Disk, Failed, Fusefs, Null, Pipeline, SealedLog, System, run
from scripts.benchmarks.works import GROUPS, Sizes
from storage.errors import FusefsError

Say = Callable[[str], None]


def everything(base: Path, seaweed: Seaweed) -> list[System]:
    """All there is to measure."""
    ours = [Fusefs(base), Fusefs(base, 'fusefs "2"', "2", 2), Fusefs(base, 'fusefs "4+2"', "4+2", 6)]
    return [
        Disk(base),
        Null(base),
        Pipeline(base),
        SealedLog(base),
        *ours,
        *(peer(base) for peer in PEERS),
        FusefsSeaweed(base, seaweed),
        ObstoreAlone(base, seaweed),
    ]


def chosen(base: Path, seaweed: Seaweed, names: Sequence[str], groups: Sequence[str]) -> list[System]:
    """Those named, all without names, for which one of the groups is. ValueError for a name that is none, and where nothing is left."""
    systems = everything(base, seaweed)
    unknown = set(names) - {system.name for system in systems}
    if unknown:
        raise ValueError(f"no such system: {', '.join(sorted(unknown))}; there are: {', '.join(system.name for system in systems)}")
    found = [system for system in systems if (not names or system.name in names) and any(map(system.does, groups))]
    if not found:
        raise ValueError(f"{', '.join(groups)} is not for {', '.join(names)}")
    return found


def machine() -> dict[str, str]:
    """What it ran on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "kernel": os.uname().release,
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 30} GiB",
        "python": platform.python_version(),
        "obstore": version("obstore"),
        "fusermount3": run(["fusermount3", "--version"]).strip(),
    }


def shuffled(systems: Sequence[System], number: int) -> list[System]:
    """The order of round `number`, the same in each run. Not only turned: who always comes after the same one has what that leaves behind,
    in caches, on the disk and in the phases of the machine, in every round."""
    return random.Random(number).sample(systems, len(systems))  # noqa: S311


def measure(
    systems: list[System], rounds: int, groups: Sequence[str], sizes: Sizes, say: Say, keep: Callable[[Run], object] | None = None
) -> Run:
    """The rounds. What fails is left out, and said. `keep` is called after each with what there is: whoever is interrupted has that."""
    result = Run({**machine(), "begun": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}, sizes=asdict(sizes))
    running: list[System] = []
    try:
        for system in systems:
            try:
                system.start()
                result.versions[system.name] = system.version()
            except (Failed, OSError) as error:
                result.left_out[system.name] = str(error)
                system.stop()
                continue
            result.encrypted[system.name] = system.encrypted
            running.append(system)
            if system.encrypted:
                result.syncs[system.name] = syncing.flushes(system)
        say(f"measuring {', '.join(system.name for system in running)}")
        for number in range(rounds):
            for group in groups:
                if group == ON_SEAWEEDFS and not any(system.groups for system in running):
                    continue
                for system in shuffled(running, number):
                    if system.name in result.left_out or not system.does(group):
                        continue
                    try:
                        with Peak(system.processes) as peak:
                            result.add(system.name, GROUPS[group](system, sizes))
                        if system.encrypted:
                            result.peaks[system.name] = max(result.peaks.get(system.name, 0), peak.bytes)
                    except (Failed, OSError, RuntimeError) as error:
                        result.left_out[system.name] = f"{group}: {error}"
                say(f"round {number + 1} of {rounds}: {group}")
            if keep is not None:
                keep(result)
        for system in running:
            if system.encrypted and system.name not in result.left_out:
                result.memory[system.name] = system.memory()
                try:
                    result.survives[system.name] = syncing.survives_kill(system)
                except (Failed, OSError) as error:
                    result.left_out[f"{system.name}, kill -9"] = str(error)
    finally:
        for system in systems:
            system.stop()
    return result


def add_ladder(result: Run, base: Path, sizes: Sizes) -> None:
    """The parts alone, and storage without FUSE."""
    place = base / "ladder"
    place.mkdir()
    try:
        result.ladder |= ladder.parts(place)
        result.ladder |= ladder.library(place, sizes)
    except (Failed, FusefsError, OSError, lmdb.Error) as error:
        result.left_out["the parts alone"] = str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def add_growth(result: Run, base: Path, counts: Sequence[int], appends: int, say: Say) -> None:
    """What must not grow."""
    found, left_out = growth.grown(base, counts)
    result.growth |= found
    result.left_out |= left_out
    say(f"volumes with {', '.join(map(str, counts))} files")
    try:
        result.growth |= growth.appended(base, appends)
    except (Failed, OSError) as error:
        # What was measured before stays worth having.
        result.left_out[f"{appends} appends"] = str(error)
    say(f"{appends} appends")
