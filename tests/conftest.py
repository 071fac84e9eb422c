"""What holds for every test.

- In CI a skipped test fails, unless the reason it gives starts with `CANNOT_CHANGE`: a test that quietly stops running
  checks nothing. Elsewhere a skip is a skip.
- A run that leaves a mount or a process behind fails, and what it left is taken away.
- Files that take long come first: with a file at a time on each core, and one more, none then waits for the others at the end.

Tests are coroutines or plain functions: pytest-trio's `trio_mode` is on (pyproject.toml). `tests` is a package:
`from tests.fakes import ...`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from storage.coprocess import pair

# The machine may be busy with another worker's tests: how long an example takes says nothing.
settings.register_profile("busy machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

#: A skip whose reason starts so is for what CI cannot be: "cannot change: this kernel has no such-and-such".
CANNOT_CHANGE = "cannot change:"
#: How long what the last tests started may take to end by itself: an unmount goes on until all is on the hosts.
GRACE_S = float(os.environ.get("FUSEFS_TEST_GRACE", "15"))
#: Inherited by every process a test starts, however it detaches itself, and found again in /proc.
SESSION_VARIABLE = "FUSEFS_TEST_SESSION"


#: Files that take a quarter of a minute or more, roughly the longest first.
LONG_FILES = (
    "test_mount_hosts",
    "test_mount_scale",
    "test_power_cut",
    "test_kill_rounds",
    "test_crash_points",
    "test_host",
    "test_engine_lock",
    "test_mount_programs",
    "test_full_disk",
    "test_mount_appends",
    "test_mount_read_only",
    "test_engine_volumes",
    "test_mount_machine",
    "test_merging_cost",
    "test_cli_mount",
    "test_lost_machine",
    "test_coded_rounds",
    "test_cli_volume",
    "test_cli_bad_input",
    "test_scrub",
    "test_cli_scrub",
    "test_cli_contracts",
    "test_cli_replication",
    "test_cli_reconcile",
    "test_contract_year",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See the module. Within a file, and among the others, the order stays."""
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


# --------------------------------------------------------------------------------------------------------------- skips


def refuse_skip(report: pytest.TestReport | pytest.CollectReport, *, in_ci: bool) -> bool:
    """Turn a report of a skip into one of a failure if the policy forbids it; True if it did."""
    if not (in_ci and report.skipped) or hasattr(report, "wasxfail"):
        return False
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason.startswith(CANNOT_CHANGE):
        return False
    report.outcome = "failed"
    report.longrepr = f"skipped in CI: {reason!r}. Make it run there, or begin the reason with {CANNOT_CHANGE!r} if CI cannot change it."
    return True


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


# Outermost, so that marks, skip() and unittest's way have all become a report by then.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    refuse_skip(report, in_ci=in_ci())
    make_text(report)
    return report


def make_text(report: pytest.TestReport) -> None:
    """Log lines name files whose names are no text; a report that goes from one process to another must be."""
    report.sections = [(name, as_text(content)) for name, content in report.sections]
    if report.longrepr is not None and as_text(said := str(report.longrepr)) != said:
        report.longrepr = as_text(said)


def as_text(said: str) -> str:
    return said.encode("utf-8", "backslashreplace").decode("utf-8")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refuse_skip(report, in_ci=in_ci())
    return report


# ----------------------------------------------------------------------------------------------------- nothing is left


def fusefs_mounts(under: Path) -> list[str]:
    """Mount points of type fuse.fusefs below a directory, innermost first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        # The kernel writes space, tab, newline and backslash as \\ooo.
        target = fields.split()[4].decode("unicode_escape").encode("latin-1").decode("utf-8", "surrogateescape")
        if rest.split()[0] in (b"fuse.fusefs", b"fuse") and Path(target).is_relative_to(under):
            found.append(target)
    return found[::-1]


def processes_of(session: str) -> dict[int, str]:
    """Processes other than this one that inherited the session's variable: pid to command line."""
    marker = f"{SESSION_VARIABLE}={session}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the run if a mount below its temporary directory or a process that it started outlives it. Torn down last."""
    base = tmp_path_factory.getbasetemp().resolve()
    session = secrets.token_hex(8)
    os.environ[SESSION_VARIABLE] = session
    yield
    # This process's own end with it, which is too late here.
    pair.close()
    deadline = time.monotonic() + GRACE_S
    while (mounts := fusefs_mounts(base)) or (processes := processes_of(session)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    else:
        return
    processes = processes_of(session)
    # Lazily: what hangs must not hang this too.
    for target in mounts:
        subprocess.run(["fusermount3", "-u", "-z", target], check=False)
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    # A killed process takes a while to be gone, on a busy machine longer.
    deadline = time.monotonic() + GRACE_S + 10
    while processes_of(session).keys() & processes.keys() and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [f"mounted on {target}" for target in mounts] + [f"process {pid}: {command}" for pid, command in processes.items()]
    pytest.fail("left behind, and now taken away:\n" + "\n".join(left), pytrace=False)
