"""Whatever the bytes, a parser returns something that makes sense or raises an error of ours: no other exception, hang, or lots of memory.

Seeds, corpus and some thousand seeded mutations of each target in tests/fuzz, in a process of its own with a limit on its memory. To look
for more, guided by coverage: `scripts/fuzz`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storage.errors import Corrupt
from tests.fuzz.mutation import MAX_INPUT, mutate
from tests.fuzz.target import CORPUS, Finding, Target, check
from tests.fuzz.targets import TARGETS
from tests.metadata_rig import quick_directory

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for all targets; they take about ten.
TIMEOUT = 180
#: Bytes of all inputs that are kept: a corpus is for what would not be found again at once.
MAX_CORPUS = 300_000


def run_replay(names: list[str], *options: str, program: str = "from tests.fuzz.replay import main; main()") -> tuple[dict[str, Any], str]:
    """Target -> its result, for those that were finished; and what went wrong with the process, if anything did."""
    with quick_directory() as temporary:
        try:
            done = subprocess.run(
                [sys.executable, "-X", "faulthandler", "-c", program, *options, *names],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
                capture_output=True,
                timeout=TIMEOUT,
                check=False,
            )
            said, trouble = (
                done.stdout,
                "" if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr[-2000:].decode(errors='replace')}",
            )
        except subprocess.TimeoutExpired as error:
            said, trouble = error.stdout or b"", f"still running after {TIMEOUT} s"
    lines = [json.loads(line) for line in said.decode().splitlines()]
    begun = [line["begun"] for line in lines if "begun" in line]
    results = {line["target"]: line for line in lines if "target" in line}
    if begun and begun[-1] not in results:
        results[begun[-1]] = {"inputs": 0, "findings": [f"it took the process with it: {trouble}"]}
    return results, trouble


@pytest.fixture(scope="module")
def replayed() -> tuple[dict[str, Any], str]:
    return run_replay(list(TARGETS))


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_takes_any_input_or_refuses_it(name: str, replayed: tuple[dict[str, Any], str]) -> None:
    results, trouble = replayed
    assert name in results, f"not reached: {trouble}"
    assert results[name]["findings"] == [], "python -m tests.fuzz.replay TARGET FILE shows where an input goes"
    assert results[name]["inputs"] > TARGETS[name].rounds


@pytest.mark.parametrize("name", TARGETS)
def test_a_targets_first_seed_is_a_good_input(name: str) -> None:
    """Mutations of what is refused at the door would test the door."""
    target = TARGETS[name]
    strict = Target(name, target.run, target.seeds, errors=())
    if name in {"names", "keys"}:  # several parsers, of which no input pleases all
        strict = target
    with quick_directory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(temporary))
        patch.setattr("tests.fuzz.files._journal_directory", lambda: temporary)
        check(strict, target.seeds()[0])


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_CORPUS
    assert {path.parent.name for path in files} <= set(TARGETS)
    assert all(path.stat().st_size <= MAX_INPUT for path in files)


def test_mutations_are_the_same_for_the_same_seed_and_change_something() -> None:
    seed = msgspec.msgpack.encode([1, "text", [b"bytes", {"a": None}]])
    one, other = ([mutate(seed, random.Random(n), "msgpack", [seed]) for n in range(200)] for _ in range(2))
    assert one == other
    assert sum(changed != seed for changed in one) > 180
    assert len(set(one)) > 100


# --------------------------------------------------------------------------------------------- findings are found

BROKEN = """
import sys
from tests.fuzz import replay
from tests.fuzz.target import Target

def run(data):
    if data == b"seed":
        {body}

replay.TARGETS["broken"] = Target("broken", run, lambda: [b"seed"], rounds=3)
replay.PATIENCE = 0.3
sys.exit(replay.main())
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("bytes(2 << 30)", "MemoryError"),
        ("while True: pass", "Hang"),
        ("raise __import__('storage.errors').errors.Unavailable('another kind')", "Unavailable"),
        ("raise __import__('storage.errors').errors.Corrupt('')", "no line of text"),
        ("__import__('ctypes').string_at(0)", "took the process with it"),
    ],
)
def test_what_must_not_happen_is_noticed(body: str, said: str) -> None:
    results, _ = run_replay(["broken"], program=BROKEN.format(body=body))
    assert any(said in finding for finding in results["broken"]["findings"]), results


def test_a_message_is_one_line_whatever_it_names() -> None:
    def run(data: bytes) -> None:
        raise Corrupt(f"file {data.decode()!s} is damaged")

    check(Target("t", run, list), b"two\nlines\x1b[2J\x85\xe2\x80\xa8".replace(b"\x85", b"\xc2\x85"))
    with pytest.raises(Finding):
        check(Target("t", lambda data: run(b"x") if data else (_ for _ in ()).throw(Corrupt("")), list), b"")
