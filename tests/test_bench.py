"""scripts/bench: it measures what it says, of each system the same, and leaves nothing behind; its ratios are of medians."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.report import Run
from tests.cli_runner import ROOT


def test_a_quick_run_measures_the_disk_and_fusefs_alike_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.benchmarks", "--quick", "--rounds", "1", "--no-ladder", "--on", tmp_path]
    done = subprocess.run(
        [*command, "--system", "disk", "--system", "fusefs", "--group", "latency", "--output", tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["left_out"] == {}
    assert set(found["rates"]) == {"disk", "fusefs"}
    assert all(rates["append to seen, us"][0] > 0 for rates in found["rates"].values())
    # What the benchmark itself checks: fsync reaches the disk, and what was fsync'd survives a kill -9.
    assert found["survives"] == {"fusefs": True}
    assert found["syncs"]["fusefs"] in (True, None)
    assert os.listdir(tmp_path) == ["out"]


def test_floors_are_ratios_of_medians_to_the_best_peer_or_the_disk() -> None:
    run = Run({}, encrypted={"disk": False, "fusefs": True, "gocryptfs": True, "encfs": True}, syncs={"gocryptfs": True, "encfs": False})
    for system, rates in {"disk": (400, 500, 9), "fusefs": (360, 380, 900), "gocryptfs": (200, 300, 310), "encfs": (600, 600, 600)}.items():
        for rate in rates:
            run.add(system, {"write 128 KiB": float(rate)})
    reached = {(floor["system"], floor["of"]): floor["reached"] for floor in run.floors()}
    assert reached["fusefs", "disk"] == pytest.approx(380 / 400, abs=0.01)
    # Not encfs, which is quicker and does not sync.
    assert reached["fusefs", "best syncing"] == pytest.approx(380 / 300, abs=0.01)
