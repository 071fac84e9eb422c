"""Runs seeds, corpus and seeded mutations of both through the targets, in a process that has little memory and little patience.

python -m tests.fuzz.replay [--seed N] [--scale F] TARGET...      one JSON line per target: {"target", "inputs", "findings": [...]}
python -m tests.fuzz.replay TARGET FILE                          one input, with its traceback
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import msgspec

from tests.fuzz.files import forget_journal_directory
from tests.fuzz.mutation import mutate
from tests.fuzz.target import Target, check
from tests.fuzz.targets import TARGETS

#: Bytes of address space for everything, interpreter and libraries (some 300 MB) included.
MEMORY = 1536 * 1024 * 1024
#: Seconds of processor time for one input. The slowest good one unpacks 64 MB, in a fifth of a second.
PATIENCE = 3.0
#: Findings of one target that are told; the rest is more of the same.
_TOLD = 5


class Hang(BaseException):
    """An input took longer than `PATIENCE`. Not an Exception: no parser may take it for one of its own."""


def _inputs(target: Target, rng: random.Random, rounds: int) -> Iterator[bytes]:
    good = [*target.seeds(), *target.corpus()]
    yield from good
    # Large ones are there for what they unpack to; changed at random they are noise.
    small = [data for data in good if len(data) <= 8192] or good
    for _ in range(rounds):
        yield mutate(rng.choice(small), rng, target.shape, small)


def replay(target: Target, seed: int, scale: float) -> dict[str, object]:
    """Everything of one target; findings as text."""
    rng = random.Random(f"{seed}/{target.name}")
    findings: list[str] = []
    count = 0
    started = time.process_time()
    for data in _inputs(target, rng, int(target.rounds * scale)):
        count += 1
        if len(findings) >= _TOLD:
            break
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
        try:
            check(target, data)
        except BaseException as error:  # noqa: BLE001 (which is the finding; trio wraps what is no Exception, too)
            last = traceback.extract_tb(error.__traceback__)[-1]
            findings.append(
                f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno}), input {data[:400].hex()}"
            )
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return {"target": target.name, "inputs": count, "seconds": round(time.process_time() - started, 2), "findings": findings}


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"longer than {PATIENCE} s")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGVTALRM, _hang)
    try:
        if len(options.names) == 2 and options.names[1] not in TARGETS:
            check(TARGETS[options.names[0]], Path(options.names[1]).read_bytes())
            return 0
        for name in options.names or TARGETS:
            # Said before it runs: a target that takes the process with it is known by name.
            print(msgspec.json.encode({"begun": name}).decode(), flush=True)
            print(msgspec.json.encode(replay(TARGETS[name], options.seed, options.scale)).decode(), flush=True)
    finally:
        forget_journal_directory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
