"""Every crash point: after a crash at any single durable step nothing acknowledged is lost, nothing is half, and nothing stays behind.

See tests/crash_points.py. Here: every point between which and the next something changes on a disk. `scripts/torture` does all hits, and
random scripts with double crashes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from storage.errors import Corrupt
from storage.metadata.journal import Journal
from storage.sectors.sweep import Sweeper
from tests import crash_points
from tests.crash_points import DeadFrom, Run, Script, Work
from tests.metadata_rig import quick_directory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def base() -> Iterator[Path]:
    with quick_directory() as path:
        yield path


@pytest.mark.parametrize(
    ("work", "step", "far"),
    [
        pytest.param(crash_points.crash, 1, False, id="a crash, then the next mount"),
        pytest.param(crash_points.lose, 6, False, id="the machine lost instead of mounted again"),
        pytest.param(crash_points.recover, 1, False, id="a crash during a recovery, then another one"),
        pytest.param(crash_points.crash, 3, True, id="a crash, with hosts that are far away"),
        pytest.param(crash_points.lose, 6, True, id="the machine lost, with hosts that are far away"),
    ],
)
def test_nothing_acknowledged_is_lost_and_nothing_is_left_behind_after_a_crash(base: Path, work: Work, step: int, far: bool) -> None:
    died = crash_points.every_point(base, work, step=step, far=far)
    assert sum(died.values()) > 20
    assert len(died) > 5


def test_the_script_comes_by_every_failpoint_there_is(base: Path) -> None:
    """Breaks if a durable step with a failpoint of its own is added, and no crash is ever tried there."""
    there = set()
    for path in (ROOT / "storage").rglob("*.py"):
        there |= set(re.findall(r"hit\(\s*\"([a-z_.]+)\"", path.read_text(encoding="utf-8")))
    before = crash_points.hasten()
    try:
        run, met = Run(base / "run"), set[str]()
        failpoints = DeadFrom(0)

        async def everything() -> None:
            await run.make(failpoints)
            await run.live(failpoints, Script.short)
            await run.lose_machine(failpoints)
            far = Run(base / "far", far=True)
            await far.make()
            await far.live(failpoints, Script.short)

        trio.run(everything)
        met = set(failpoints.hits)
    finally:
        crash_points.restore(before)
    assert sorted(there - met - NEEDS_MORE) == []
    assert len(there) > 20


#: Failpoints no ordinary script comes by, each with the test that does.
NEEDS_MORE = {
    "host_io.replace.before_delete",  # tests/conformance/test_host_io.py
    "handing_down.before_apply",  # tests/test_replication_change.py
    "rewrite.before_unmark",  # tests/test_replication_change.py
    "damage.after_put",  # tests/test_scrub.py
}


@pytest.mark.parametrize("what", ["no sweep", "an fsync that writes nothing"])
def test_it_notices(base: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The comparison is worth something: with a step taken out, some crash is not survived."""
    if what == "no sweep":

        async def nothing(self: Sweeper) -> list[int]:
            return []

        monkeypatch.setattr(Sweeper, "sweep", nothing)
    else:
        real: Callable[[Journal, object, list[bytes], int], None] = Journal._flush  # type: ignore[assignment]
        count = 0

        def forgetful(self: Journal, segment: object, pieces: list[bytes], end: int) -> None:
            nonlocal count
            count += 1
            real(self, segment, [bytes(len(piece)) for piece in pieces] if count % 29 == 0 else pieces, end)

        monkeypatch.setattr(Journal, "_flush", forgetful)
    # Corrupt: the journal's own reader may be the first to notice.
    with pytest.raises(
        (AssertionError, Corrupt), match="on hosts and unknown" if what == "no sweep" else "crash at|stands behind|the journal is gone"
    ):
        crash_points.every_point(base, crash_points.crash)
