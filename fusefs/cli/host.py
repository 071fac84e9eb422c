"""`fusefs host`: for whoever owns a host, and not the volumes on it. (`fusefs hosts` is for the owner of a volume.)"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import click
import msgspec

from fusefs.cli.arguments import Grace
from fusefs.cli.contracts import in_words
from fusefs.cli.output import human_bytes, out_is_terminal, progress_bar, say, write_line, write_table
from fusefs.cli.session import run
from storage import DEFAULT_GRACE_DAYS, HeldVolume, Pruner, counted, open_pruner
from storage.errors import FusefsError

#: What a person types.
CONFIRMATION = "prune"


@click.group(short_help="For the owner of a host: take away what no contract covers.")
def host() -> None:
    """For whoever owns the disk or bucket that volumes of others are kept on. Needs no volume and no passphrase.

    The owner of a volume says with `fusefs hosts` where it is kept.
    """


@host.command(short_help="Take away volumes whose contracts ended long ago.")
@click.argument("url", metavar="URL")
@click.option(
    "--grace", type=Grace(), default=DEFAULT_GRACE_DAYS, show_default=True, metavar="DAYS", help="Keep a volume so long after its end."
)
@click.option("--force", "forced", multiple=True, metavar="ID", help="Also this volume, though its contracts are damaged or missing.")
@click.option("--yes", is_flag=True, help="Delete; without it nothing is, unless you say so on the terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def prune(url: str, grace: float, forced: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """List the volumes on the host at URL, with the ends of their contracts, and delete those that no contract covers any more.

    A contract covers its volume until it ends, and for --grace days after. Whatever is covered stays, also with --force; so does, without
    it, a volume one of whose contract files is damaged or unknown, or that has none. Without --yes, and where nobody confirms it on a
    terminal, nothing is deleted. What was broken off is gone on with the next time.

    Exit status 1: something needs a look: it is unclear what covers a volume, or it could not be deleted.

    \b
    Examples:
      fusefs host prune dir:/mnt/disk1
      fusefs host prune dir:/mnt/disk1 --grace 90 --yes
    """
    if not run(partial(_prune, url, grace, forced, yes=yes, as_json=as_json)):
        click.get_current_context().exit(1)


async def _prune(url: str, grace: float, forced: tuple[str, ...], *, yes: bool, as_json: bool) -> bool:
    """False: something needs a look."""
    async with open_pruner(url, grace_days=grace, forced=forced) as pruner:
        with progress_bar("looking", unit="objects") as advance:
            held = await pruner.survey(advance)
        wanted = [volume for volume in held if volume.prunable]
        if not as_json:
            _show(held)
        if wanted and (yes or (not as_json and _confirmed(wanted))):
            for volume in wanted:
                await _delete(pruner, volume)
        elif wanted and not as_json:
            write_line(f"nothing was deleted; --yes deletes {_sum(wanted)}")
        if as_json:
            fields = {"host_id": pruner.host_id, "url": pruner.host.url, "grace_days": grace, "volumes": msgspec.to_builtins(held)}
            write_line(json.dumps(fields, indent=2))
        else:
            for volume in held:
                if volume.pruned:
                    write_line(f"volume {volume.volume_id}: deleted, {_sum([volume])}")
    return not any(volume.problems and not volume.pruned for volume in held)


async def _delete(pruner: Pruner, volume: HeldVolume) -> None:
    with progress_bar(f"deleting {volume.volume_id[:8]}", total=volume.objects, unit="objects") as advance:
        try:
            await pruner.prune(volume, advance)
        except FusefsError as error:
            volume.problems.append(str(error))
            say(f"volume {volume.volume_id}: {error}")


def _confirmed(wanted: list[HeldVolume]) -> bool:
    """Did a person type it? Never where nobody can."""
    if not sys.stdin.isatty() or not out_is_terminal():
        return False
    answer: str = click.prompt(f"type {CONFIRMATION!r} to delete {_sum(wanted)} for good", default="", show_default=False, err=True)
    return answer.strip() == CONFIRMATION


def _sum(volumes: list[HeldVolume]) -> str:
    objects, size = sum(volume.objects for volume in volumes), sum(volume.bytes for volume in volumes)
    return f"{counted(objects, 'object')}, {human_bytes(size)}"


def _show(held: list[HeldVolume]) -> None:
    now = time.time_ns()
    rows = [
        (
            volume.volume_id,
            f"{len(volume.contracts)}",
            in_words(volume.end_ns, now) if volume.end_ns else "?",
            f"{volume.objects:,}",
            human_bytes(volume.bytes),
            volume.verdict + (", to be deleted" if volume.prunable else ""),
        )
        for volume in held
    ]
    write_table(("volume", "contracts", "covered", "objects", "bytes", "state"), rows, right=(1, 3, 4))
    for volume in held:
        for problem in volume.problems:
            write_line(f"volume {volume.volume_id}: {problem}")
