"""`fusefs check`: metadata against itself and against the hosts."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusefs.cli import live
from fusefs.cli.arguments import passphrase_option, volume_argument
from fusefs.cli.notices import Notices
from fusefs.cli.output import printable, style, write_line
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run
from fusefs.cli.startup import importing
from fusefs.mounts import mount_of_volume
from storage import counted
from storage.errors import Busy

if TYPE_CHECKING:
    from rich.progress import Progress

    from storage import CheckProgress, CheckReport, Finding


@click.command(short_help="Check the metadata, and what the hosts hold.")
@volume_argument
@click.option("--repair", is_flag=True, help="Mend what can be mended. File data is never deleted.")
@click.option("--data", is_flag=True, help="Read and verify every shard on every host: as long as reading everything takes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding, then one with the totals, for programs.")
@passphrase_option
@click.pass_context
def check(context: click.Context, volume: Path, repair: bool, data: bool, as_json: bool, passphrase_file: Path | None) -> None:
    """Check VOLUME, which nobody may have mounted: its metadata against itself and against what its hosts hold.

    Each finding is one line: where, what, what follows from it, what to do. Ends with 0 if all is well, 20 if everything that was found is
    repaired, 21 if something is left; with another status it could not be checked.

    \b
    Examples:
      fusefs check ~/volume
      fusefs check ~/volume --repair
      fusefs check ~/volume --data --json | jq -c 'select(.kind)'
    """
    _refuse_if_mounted(volume)
    secret = passphrase(passphrase_file)
    with importing():
        import trio

        from storage import CheckProgress, check_volume
    progress = CheckProgress()

    def tell(finding: Finding) -> None:
        write_line(json.dumps(as_fields(finding)) if as_json else in_a_line(finding))

    async def work() -> CheckReport:
        async with trio.open_nursery() as nursery:
            with _stages() as show:
                nursery.start_soon(_follow, progress, show)
                report = await check_volume(volume, passphrase=secret, repair=repair, data=data, on_finding=tell, progress=progress)
                nursery.cancel_scope.cancel()
        return report

    report = run(work)
    collected = context.obj
    if isinstance(collected, Notices):
        # What the layers below warn of while hosts are read is what the findings say.
        collected.forget()
    write_line(json.dumps(_totals(report)) if as_json else _summary(report))
    if report.exit_status:
        context.exit(report.exit_status)


def _refuse_if_mounted(volume: Path) -> None:
    """Busy: what is being changed cannot be held against itself."""
    mount = mount_of_volume(volume)
    if mount is not None and live.is_served(mount.volume):
        raise Busy(
            f"volume {volume} is mounted at {mount.mountpoint}; unmount it first (fusefs umount {mount.mountpoint}), "
            "or ask the mount how it is: fusefs status"
        )


def as_fields(finding: Finding) -> dict[str, str | bool]:
    """For --json."""
    return {
        "kind": finding.kind,
        "where": finding.where,
        "what": finding.what,
        "consequence": finding.consequence,
        "remedy": finding.remedy,
        "repaired": finding.repaired,
        "note": finding.note,
    }


def in_a_line(finding: Finding) -> str:
    """For a person."""
    if finding.note:
        return f"note: {printable(finding.where)}: {printable(finding.what)}; {finding.consequence}"
    if finding.repaired:
        return style("repaired: ", "bold green") + printable(f"{finding.where}: {finding.what}")
    return style("found: ", "bold yellow") + printable(str(finding))


def _totals(report: CheckReport) -> dict[str, object]:
    return {
        "found": report.found.total(),
        "repaired": report.repaired.total(),
        "left": report.left,
        "notes": report.notes.total(),
        "unlisted": report.unlisted,
        "kinds": dict(report.found),
        "looked_at": dict(report.looked_at),
    }


def _summary(report: CheckReport) -> str:
    looked = ", ".join(counted(report.looked_at[f"{what}s"], what) for what in ("file", "name", "value", "sector", "shard"))
    if not report.found:
        return f"nothing found: {looked}"
    more = f" ({report.unlisted:,} not listed)" if report.unlisted else ""
    numbers = f"{report.found.total():,} found{more}, {report.repaired.total():,} repaired, {report.left:,} left"
    return f"{numbers}: {_kinds(report.found)}; {looked}"


def _kinds(found: Counter[str]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in found.most_common())


class _Nothing:
    def show(self, progress: CheckProgress) -> None:
        """Standard error is no terminal."""


class _Bar:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def show(self, progress: CheckProgress) -> None:
        self._bar.update(self._task, description=printable(progress.stage), completed=progress.done, total=progress.total)


@contextmanager
def _stages() -> Iterator[_Bar | _Nothing]:
    """What it is at, and how far, on standard error while the body runs; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield _Nothing()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        yield _Bar(bar)


async def _follow(progress: CheckProgress, show: _Bar | _Nothing) -> None:
    """Until cancelled."""
    import trio

    while True:
        show.show(progress)
        await trio.sleep(0.2)
