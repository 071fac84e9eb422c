"""The real command line as a child process, for tests: no terminal, an environment that is known, output apart from errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from fusefs.cli import main
from fusefs.cli.create import init as init_command
from storage import create_volume
from storage.keyfile import CHEAP

ROOT = Path(__file__).resolve().parent.parent
PASSPHRASE = "correct horse"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def error_line(self) -> str:
        """Standard error, which must be one line that begins with the program's name, and no traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("fusefs: "), self.err
        return lines[0]


def environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's, with a passphrase and without what would change the outcome; `extra` adds, or removes with None."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEFS_", "_FUSEFS")) or k == "FUSEFS_TEST_SESSION"}
    variables |= {"FUSEFS_PASSPHRASE": PASSPHRASE, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}
    for key, value in (extra or {}).items():
        if value is None:
            variables.pop(key, None)
        else:
            variables[key] = value
    return variables


def quick(capfd: pytest.CaptureFixture[str], *arguments: str, expect: int = 0) -> Result:
    """As `fusefs`, in this process: for what opens no volume and needs no terminal. Output is text."""
    status = main(arguments)
    captured = capfd.readouterr()
    assert status == expect, f"{arguments} ended with {status}: {captured.err}"
    return Result(status, captured.out.encode(), captured.err)


def init(volume: Path, *options: str) -> str:
    """The volume that `fusefs init VOLUME OPTIONS` makes, in this process; returns its phrase. What unlocking it costs, each later command
    pays: here next to nothing. For tests of what comes after `init`."""
    given = init_command.make_context("init", [str(volume), *options]).params

    async def create() -> str:
        return await create_volume(
            given["volume"],
            PASSPHRASE,
            hosts=given["hosts"],
            replication=given["replication"],
            sector_size=given["sector_size"],
            contract_days=given["days"],
            argon2=CHEAP,
        )

    return trio.run(create)


def fusefs(
    *arguments: str | bytes | Path,
    stdin: bytes = b"",
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    expect: int | None = 0,
) -> Result:
    """Run one command; fails the test unless it ends with `expect` (None: whatever).

    In a session of its own: it has no terminal to ask at.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fusefs", *arguments],
        input=stdin,
        capture_output=True,
        env=environment(env),
        cwd=cwd,
        timeout=TIMEOUT_S,
        start_new_session=True,
        check=False,
    )
    result = Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "backslashreplace"))
    assert "Traceback" not in result.err, result.err
    if expect is not None:
        assert result.status == expect, f"{arguments} ended with {result.status}: {result.err}"
    return result
