"""`fusefs contracts`: until when a volume's hosts keep what they have."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import msgspec

from fusefs.cli import live
from fusefs.cli.arguments import DAY, DIRECTORY_PATH, Days, known_host, passphrase_option
from fusefs.cli.notices import Notices
from fusefs.cli.output import human_span, write_line, write_table
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run, unmounted_volume
from fusefs.cli.status import day, volume_status
from storage import ContractStatus, RenewalStatus

#: Digits of a contract's id that are shown beside its whole one.
SHORT = 8


@click.command(short_help="List, conclude and renew contracts with hosts.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME")
@click.argument("action", type=click.Choice(["list", "conclude", "renew"]), default="list", metavar="[list|conclude|renew]")
@click.argument("what", default=None, required=False, metavar="[HOST|ID]")
@click.argument("days", type=Days(), default=None, required=False, metavar="[DAYS]")
@click.option("--all", "every", is_flag=True, help="With renew: all that are due, for as long as they were concluded for.")
@click.option("--json", "as_json", is_flag=True, help="With list and renew --all: one JSON object, for programs.")
@passphrase_option
@click.pass_obj
def contracts(
    collected: Notices,
    path: Path,
    action: str,
    what: str | None,
    days: float | None,
    every: bool,
    as_json: bool,
    passphrase_file: Path | None,
) -> None:
    """List the contracts of VOLUME, conclude a new one with a host, or renew one, or all that are due.

    HOST is a number, id or URL as `fusefs hosts` shows them, ID a contract's id. The new contract runs DAYS from now, and its id is
    printed; the old one runs on to its end. An ended contract can be renewed as long as its host holds its record.

    A mount renews by itself when a third of the time is left. For a volume that is not mounted for weeks, `renew --all` does it from cron;
    exit status 1: some contract that is due could not be renewed, and it says which and why.

    \b
    Examples:
      fusefs contracts ~/volume
      fusefs contracts ~/volume renew --all --passphrase-file ~/.volume-passphrase
      fusefs contracts ~/volume conclude 2 365
      fusefs contracts ~/volume renew 8c3e0f6e2b1d4c4f9a7be01f3d5a6c70 365
    """
    if every and action != "renew":
        raise click.UsageError("--all goes with renew")
    if as_json and not (action == "list" or every):
        raise click.UsageError("--json goes with list and renew --all")
    if action == "list" or every:
        if what is not None:
            raise click.UsageError(f"{'list' if action == 'list' else 'renew --all'} takes nothing more, and got {what!r}")
        target = live.resolve(path)
        if every:
            # What could not be renewed is said below, once.
            _renew_all(target, passphrase_file, collected, as_json=as_json)
        else:
            _list(target, passphrase_file, as_json=as_json)
        return
    if what is None or days is None:
        raise click.UsageError("conclude needs HOST DAYS" if action == "conclude" else "renew needs ID DAYS, or --all")
    if action == "conclude":
        what = known_host(what)
    write_line(_change(live.resolve(path), action, what, days * DAY, passphrase_file))


def _list(target: live.Target, passphrase_file: Path | None, *, as_json: bool) -> None:
    now = volume_status(target, passphrase_file, "contracts")
    found = sorted(now.contracts, key=lambda c: (c.host_number, c.end_ns))
    if as_json:
        write_line(json.dumps({"contracts": msgspec.to_builtins(found)}, indent=2))
        return
    rows = [
        (c.contract_id, str(c.host_number), day(c.start_ns), day(c.end_ns), in_words(c.end_ns, time.time_ns()), _state(c)) for c in found
    ]
    write_table(("contract", "host", "from", "to", "ends", "state"), rows, right=(1,))


def in_words(end_ns: int, now_ns: int) -> str:
    """`in 12 days`, `3 days ago`."""
    span = human_span(abs(end_ns - now_ns) / 1e9)
    return f"in {span}" if end_ns > now_ns else f"ended {span} ago"


def _state(contract: ContractStatus) -> str:
    said = contract.state
    if contract.renewed_by:
        # Also of one that has ended: its data go on under the other.
        said = f"{'ended, ' if contract.state == 'ended' else ''}renewed by {contract.renewed_by[:SHORT]}"
    if contract.trouble:
        said = f"{said}, not renewed since {day(contract.trouble_since_ns)}: {contract.trouble}"
    return said


def _renew_all(target: live.Target, passphrase_file: Path | None, collected: Notices, *, as_json: bool) -> None:
    if target.served:
        with live.client(target.volume) as client:
            outcomes = client.renew_all()
    else:
        outcomes = run(partial(_renew_unmounted, target.volume, passphrase(passphrase_file)))
    collected.forget()
    if as_json:
        write_line(json.dumps({"hosts": msgspec.to_builtins(outcomes)}, indent=2))
    else:
        _tell(outcomes)
    if any(outcome.error for outcome in outcomes):
        click.get_current_context().exit(1)


async def _renew_unmounted(path: Path, secret: str) -> list[RenewalStatus]:
    async with unmounted_volume(path, secret, "contracts") as volume:
        # Opening it has renewed what was due already.
        first = {outcome.host_number: outcome for outcome in volume.renewal.at_open}
        return [
            first[now.host_number] if not now.error and not now.renewed and now.host_number in first else now
            for now in await volume.renew_contracts()
        ]


def _tell(outcomes: Sequence[RenewalStatus]) -> None:
    now = time.time_ns()
    for outcome in outcomes:
        if outcome.error:
            write_line(f"{outcome.url}: not renewed, {in_words(outcome.end_ns, now).replace('in ', 'ends in ', 1)}: {outcome.error}")
        elif outcome.renewed:
            write_line(f"{outcome.url}: renewed, to {day(outcome.end_ns)}")
        else:
            write_line(f"{outcome.url}: not due, to {day(outcome.end_ns)}")


def _change(target: live.Target, action: str, what: str, seconds: float, passphrase_file: Path | None) -> str:
    """The new contract's id."""
    if target.served:
        with live.client(target.volume) as client:
            return client.conclude(what, seconds) if action == "conclude" else client.renew(what, seconds)
    secret = passphrase(passphrase_file)

    async def work() -> str:
        async with unmounted_volume(target.volume, secret, "contracts") as volume:
            if action == "conclude":
                return await volume.contractor.conclude_contract(what, seconds)
            return await volume.contractor.renew_contract(what, seconds)

    return run(work)
