"""Coverage-guided fuzzing of one target with atheris; `scripts/fuzz` starts it, in an environment that has atheris.

    python -m tests.fuzz.fuzzer TARGET SECONDS WORK

WORK holds libFuzzer's own large corpus between runs. A finding ends the run, its input kept as WORK/TARGET-crash-..., -timeout-... or
-oom-...; the script puts it into the target's corpus, so that scripts/test fails until the parser is mended, and looks for it ever after.
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

from tests.fuzz.mutation import MAX_INPUT, mutate
from tests.fuzz.target import check

#: Megabytes, and seconds for one input.
MEMORY_MB = 1024
PATIENCE = 10


def main() -> None:
    name, seconds, work = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    target = TARGETS[name]
    logging.disable(logging.WARNING)
    seeds = [*target.seeds(), *target.corpus()]
    small = [seed for seed in seeds if len(seed) <= 8192] or seeds

    def one(data: bytes) -> None:
        check(target, data)

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
