"""`fusefs scrub`: are all copies on the hosts still there, and what was sealed?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from fusefs.cli import live
from fusefs.cli.arguments import DIRECTORY_PATH, passphrase_option
from fusefs.cli.notices import Notices
from fusefs.cli.output import human_bytes, printable, progress_bar, write_line
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run, unmounted_volume, with_bar
from storage import counted, named

if TYPE_CHECKING:
    from storage import ScrubReport


@click.command(short_help="Look at what the hosts keep, and put right what is damaged.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME|MOUNTPOINT")
@click.option("--full", is_flag=True, help="Read every shard whole, from every host: as long as reading everything takes.")
@click.option(
    "--sample",
    type=float,
    default=1.0,
    metavar="FRACTION",
    help="Look at this share of the sectors only, chosen at random, as in 0.05.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object, for programs.")
@passphrase_option
@click.pass_context
def scrub(context: click.Context, path: Path, full: bool, sample: float, as_json: bool, passphrase_file: Path | None) -> None:
    """Ask the hosts for a random block of every copy they keep, or for all of it, verify it, and put right what is missing or damaged.

    A block of each finds whatever is missing, cut off or exchanged, and of a single damaged block one time in as many as there are; a mount
    does that by itself, every two weeks (scrub_interval). Ends with 0 if all is well, 20 if everything that was found is repaired, 21 if
    something is left, has too few copies, or a host did not answer.

    \b
    Examples:
      fusefs scrub ~/mnt
      fusefs scrub ~/volume --full
      fusefs scrub ~/mnt --sample 0.01 --json | jq .damaged
    """
    # Written so that it is also true for not-a-number.
    if not 0 < sample <= 1:
        raise click.UsageError(f"--sample {sample:g}: more than 0 and at most 1")
    target = live.resolve(path)
    if target.served:
        with live.client(target.volume) as client, progress_bar("looking at copies", unit="sectors") as advance:
            report = client.scrub(full, sample, advance)
    else:
        report = run(partial(_unmounted, target.volume, passphrase(passphrase_file), full, sample))
    collected = context.obj
    if isinstance(collected, Notices):
        # What the layers below warn of while hosts are asked is what the report says.
        collected.forget()
    if as_json:
        write_line(json.dumps(msgspec.to_builtins(report) | {"left": report.left}))
    else:
        for line in lines(report):
            write_line(printable(line))
    if report.exit_status:
        context.exit(report.exit_status)


async def _unmounted(path: Path, secret: str, full: bool, sample: float) -> ScrubReport:
    async with unmounted_volume(path, secret, "scrub") as volume:
        work = partial(volume.scrub, full=full, sample=sample)
        return await with_bar("looking at copies", work, volume.scrub_progress, unit="sectors")


def lines(report: ScrubReport) -> list[str]:
    """For a person: what is wrong, then what was looked at."""
    told = [f"host {host}" for host in report.hosts_failing]
    if report.unanswered:
        told.append(f"{counted(report.unanswered, 'copy', 'copies')} could not be looked at; no answer from {', '.join(report.hosts_away)}")
    files = f", with bytes of {named(report.files)}" if report.files else ""
    if report.lost:
        told.append(f"{counted(report.lost, 'sector')} cannot be had from the hosts that answer{files}: {report.trouble}")
    elif report.left and report.trouble:
        told.append(f"not good yet: {counted(report.left, 'copy', 'copies')}{files}: {report.trouble}")
    if report.degraded_sectors:
        told.append(f"{counted(report.degraded_sectors, 'sector')} with too few copies: {report.shortage}")
    bad = report.missing + report.damaged
    good = "those looked at are good" if report.unanswered or report.degraded_sectors else "all good"
    found = f"{report.missing:,} missing, {report.damaged:,} damaged, {report.repaired:,} repaired, {report.left:,} left" if bad else good
    how = "read whole" if report.full else "a block of each read"
    looked = f"{counted(report.shards, 'copy', 'copies')} of {counted(report.sectors, 'sector')}, {how} ({human_bytes(report.bytes)})"
    return [*told, f"{found}: {looked}"]
