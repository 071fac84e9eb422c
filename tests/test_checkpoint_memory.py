"""A checkpoint takes memory for a chunk or two, however many files there are, and lets the event loop go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = 30_000
#: Two chunks of 4 MiB of records as Python objects, sealed and unsealed, and what the allocator rounds up to.
MIB = 64


@pytest.mark.timeout(300)
def test_a_checkpoint_takes_bounded_memory_and_holds_nobody_up(tmp_path: Path) -> None:
    """A million files: `python -m tests.checkpoint_child fill DIRECTORY 1000000`, then `measure` (docs/durability.md: what it said)."""
    child = [sys.executable, "-m", "tests.checkpoint_child"]
    subprocess.run([*child, "fill", str(tmp_path), str(FILES)], cwd=ROOT, check=True, timeout=240)
    said = subprocess.run([*child, "measure", str(tmp_path)], cwd=ROOT, check=True, timeout=240, capture_output=True, text=True)
    found = json.loads(said.stdout)
    assert found["files"] == FILES
    assert found["records"] > 3 * FILES
    assert found["peak_mib"] - found["before_mib"] < MIB, found
    # In slices: the longest time the loop was away is a small part of the whole.
    assert found["longest_wait_ms"] < max(0.5 * found["seconds"] * 1000, 50), found
