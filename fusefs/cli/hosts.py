"""`fusefs hosts` and `fusefs repair`: where a volume's sectors are kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from fusefs.cli import live
from fusefs.cli.arguments import DAY, DIRECTORY_PATH, Days, known_host, passphrase_option, upload_rate_option
from fusefs.cli.notices import Notices
from fusefs.cli.output import human_bytes, progress_bar, say, write_line, write_table
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run, unmounted_volume, with_bar
from fusefs.cli.startup import importing
from fusefs.cli.status import hosts_table, milliseconds, volume_status
from storage import counted

if TYPE_CHECKING:
    from storage import RepairStatus

#: Days shown by `hosts -l`; --json has all that are kept.
SHOWN_DAYS = 7


@click.command(short_help="List the hosts of a volume; add one, leave one, say which is lost.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME")
@click.argument("action", type=click.Choice(["list", "add", "leave", "lost", "back"]), default="list", metavar="[list|add|leave|lost|back]")
@click.argument("host", default=None, required=False, metavar="[URL|HOST]")
@click.option("--contract", "days", type=Days(), default=None, metavar="DAYS", help="With add: length of the contract; else as the others.")
@click.option("-l", "long", is_flag=True, help="Also each host's id, size, speed, reads, writes, last error; requests and bytes per day.")
@click.option("--json", "as_json", is_flag=True, help="With list: everything, as a JSON array, for programs.")
@passphrase_option
@click.pass_obj
def hosts(
    collected: Notices,
    path: Path,
    action: str,
    host: str | None,
    days: float | None,
    long: bool,
    as_json: bool,
    passphrase_file: Path | None,
) -> None:
    """List the hosts of VOLUME: state, free space, latency (of half, and of 95 in 100 small reads), recent failures, end of the contract.

    \b
    add URL    one host more; a mount moves its share of the sectors there
    leave HOST its sectors go to the other hosts, nothing new goes there; once its state is "left" it may be unplugged
    lost HOST  it is never coming back: its sectors are made again elsewhere, nothing waits for it, and it has no vote any more
    back HOST  take `leave` or `lost` back

    A host that is merely away is waited for, an hour long, before its sectors are made again on others. HOST is a number, id or URL.
    What has to move does so in the background of a mount, or at once by `fusefs repair`.

    \b
    Examples:
      fusefs hosts ~/volume
      fusefs hosts ~/volume add dir:/mnt/disk4#domain=rack2
      fusefs hosts ~/volume leave dir:/mnt/disk1
      fusefs hosts ~/volume lost 2
    """
    if action != "list":
        if as_json:
            raise click.UsageError("--json goes with list")
        if host is None:
            raise click.UsageError(f"{action} needs {'URL' if action == 'add' else 'HOST'}")
        if days is not None and action != "add":
            raise click.UsageError("--contract goes with add")
        if action == "add":
            _add(live.resolve(path), host, days, passphrase_file)
            # What could not be mended for want of this host.
            collected.forget_of("fusefs.reconcile")
        else:
            _mark(live.resolve(path), known_host(host), action, passphrase_file)
        return
    if host is not None:
        raise click.UsageError(f"list takes nothing more, and got {host!r}")
    if days is not None:
        raise click.UsageError("--contract goes with add")
    now = volume_status(live.resolve(path), passphrase_file, "hosts")
    if as_json:
        write_line(json.dumps([msgspec.to_builtins(host) for host in now.hosts], indent=2))
        return
    if not long:
        hosts_table(now)
        return
    rows = [
        (
            str(host.number),
            host.host_id,
            host.url,
            host.state,
            f"{human_bytes(host.free)} of {human_bytes(host.total)}" if host.free is not None and host.total is not None else "?",
            milliseconds(host.median_ms if host.median_ms is not None else host.latency_ms),
            milliseconds(host.p95_ms),
            _rate(host.read_rate),
            _rate(host.write_rate),
            f"{host.reads:,}",
            f"{host.writes:,}",
            f"{host.overtaken:,} of {host.hedged:,}",
            f"{host.failures:.2f}",
            f"{host.failed:,}",
            host.abilities or "?",
            host.error or "-",
        )
        for host in now.hosts
    ]
    columns = ("host", "id", "url", "state", "free", "latency", "p95", "reading", "writing", "reads", "writes", "hedges won", "failures")
    write_table((*columns, "failed", "can", "error"), rows, right=(0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13))
    traffic = [
        (day.date, str(host.number), host.url, f"{day.requests:,}", human_bytes(day.sent), human_bytes(day.received))
        for host in now.hosts
        for day in host.days[-SHOWN_DAYS:]
    ]
    if traffic:
        write_line()
        write_table(("day (UTC)", "host", "url", "requests", "sent", "received"), sorted(traffic), right=(1, 3, 4, 5))


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{human_bytes(round(value))}/s"


def _add(target: live.Target, url: str, days: float | None, passphrase_file: Path | None) -> None:
    with importing():
        from storage import parse_url
    # Here, where the working directory is the person's.
    text = str(parse_url(url))
    if target.served:
        with live.client(target.volume) as client:
            number = client.add_host(text, days * DAY if days is not None else None)
            can = next((host.abilities for host in client.hosts() if host.number == number), "")
        write_line(f"host {number}: {text}")
        say_what_it_can(text, can)
        return
    secret = passphrase(passphrase_file)

    async def work() -> tuple[int, str]:
        async with unmounted_volume(target.volume, secret, "hosts") as volume:
            number = await volume.add_host(text, days)
            return number, str(volume.hosts.record(number).capabilities)

    number, can = run(work)
    write_line(f"host {number}: {text}")
    say_what_it_can(text, can)


def say_what_it_can(url: str, can: str) -> None:
    """What was found by probing. Of directories only what is unusual: they can all do the same."""
    if not url.startswith("dir:") or "no conditional puts" in can:
        say(f"{url}: {can}")


def _mark(target: live.Target, host: str, action: str, passphrase_file: Path | None) -> None:
    if target.served:
        with live.client(target.volume) as client:
            client.mark(host, "lost" if action == "lost" else "leave" if action == "leave" else "back")
        return
    secret = passphrase(passphrase_file)

    async def work() -> None:
        async with unmounted_volume(target.volume, secret, "hosts") as volume:
            if action == "leave":
                await volume.leave_host(host, leave=True)
            else:
                await volume.mark_host(host, lost=action == "lost")

    run(work)


@click.command(short_help="Make every sector good again, now.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME|MOUNTPOINT")
@upload_rate_option
@passphrase_option
def repair(path: Path, upload_rate: int | None, passphrase_file: Path | None) -> None:
    """Bring every sector to its replication on hosts that keep it, and wait until that is done.

    A mount does this by itself, in the background; this is for a volume that is not mounted, and for whoever wants to know when it is done.
    Exit status 1: some sectors could not be made good, and it says why.

    \b
    Example:
      fusefs hosts ~/volume lost 2 && fusefs repair ~/volume
    """
    target = live.resolve(path)
    if target.served and upload_rate is not None:
        raise click.UsageError("the rate of a mount is given when it is mounted: fusefs mount --upload-rate")
    if target.served:
        with live.client(target.volume) as client, progress_bar("making copies") as advance:
            outcome = client.repair(advance)
    else:
        outcome = run(partial(_repair_unmounted, target.volume, passphrase(passphrase_file), upload_rate))
    if outcome.pending:
        write_line(f"not as it should be: {counted(outcome.pending, 'sector')}: {outcome.trouble or 'see fusefs status'}")
        click.get_current_context().exit(1)
    write_line("every sector is as it should be")


async def _repair_unmounted(path: Path, secret: str, upload_rate: float | None) -> RepairStatus:
    async with unmounted_volume(path, secret, "repair", upload_rate) as volume:
        return await with_bar("making copies", volume.repair, volume.repair_progress)
