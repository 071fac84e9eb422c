"""Coverage-guided fuzzing of one target with atheris; `scripts/fuzz` starts it, in an environment that has atheris.

    python -m tests.fuzz.fuzzer TARGET SECONDS WORK

WORK holds libFuzzer's own large corpus between runs, and what it found. A finding ends the run: it is also stored in the corpus of the
target, so that scripts/test fails until the parser is mended, and goes on checking ever after.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

# Only what parses is watched: coverage of the interpreter's own modules, or of the tests', would steer the fuzzer nowhere.
with atheris.instrument_imports(include=["storage", "fusefs"]):
    from tests.fuzz.files import forget_journal_directory
    from tests.fuzz.targets import TARGETS

from tests.fuzz.frames import hash_of
from tests.fuzz.mutation import MAX_INPUT, mutate
from tests.fuzz.target import CORPUS, check

#: Megabytes, and seconds for one input.
MEMORY_MB = 1024
PATIENCE = 10


def main() -> None:
    name, seconds, work = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    target = TARGETS[name]
    logging.disable(logging.WARNING)
    seeds = [*target.seeds(), *target.corpus()]
    small = [seed for seed in seeds if len(seed) <= 8192] or seeds
    last = b""

    def one(data: bytes) -> None:
        nonlocal last
        last = data
        try:
            check(target, data)
        except BaseException:
            keep(data)
            raise

    def keep(data: bytes) -> None:
        directory = CORPUS / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"found-{hash_of(data)[:12]}").write_bytes(data)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        """libFuzzer's own mutations know what was compared with what; ours know MessagePack and JSON."""
        rng = random.Random(seed)
        if target.shape != "bytes" and rng.random() < 0.6:
            return mutate(data, rng, target.shape, small)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    own = work / name
    own.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as start:
        for number, seed in enumerate(seeds):
            if len(seed) <= MAX_INPUT:
                (Path(start) / str(number)).write_bytes(seed)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-timeout={PATIENCE}",
            "-print_final_stats=1",
            f"-artifact_prefix={own.parent}/{name}-",
            "-verbosity=1",
        ]
        atheris.Setup([sys.argv[0], *options, str(own), start], one, custom_mutator=change)
        try:
            atheris.Fuzz()
        finally:
            forget_journal_directory()


if __name__ == "__main__":
    main()
