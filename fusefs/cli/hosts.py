"""`fusefs hosts` and `fusefs contracts`: where a volume's sectors are kept, and until when."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fusefs.cli import live
from fusefs.cli.arguments import DAY, DIRECTORY_PATH, Days, passphrase_option
from fusefs.cli.output import human_bytes, human_span, write_line, write_table
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run, unmounted_volume
from fusefs.cli.status import day, hosts_table, volume_status


@click.command(short_help="List the hosts of a volume; say which is lost.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME")
@click.argument("action", type=click.Choice(["list", "lost", "back"]), default="list", metavar="[list|lost|back]")
@click.argument("host", default=None, required=False, metavar="[HOST]")
@click.option("-l", "long", is_flag=True, help="Also show each host's id, size, reads and writes, and the last error.")
@passphrase_option
def hosts(path: Path, action: str, host: str | None, long: bool, passphrase_file: Path | None) -> None:
    """List the hosts of VOLUME: state, free space, usual latency, recent failures, end of the contract.

    A host that is away may come back, so what was freed stays on the others until it does. Where it never will, say `lost`: from then on
    it holds nothing back, and does not count for the majority that decides whose turn it is to write. HOST is a number, id or URL.

    \b
    Examples:
      fusefs hosts ~/volume
      fusefs hosts ~/volume lost 2
      fusefs hosts ~/volume back 2
    """
    if action != "list":
        if host is None:
            raise click.UsageError(f"{action} needs HOST")
        _mark(live.resolve(path), host, action == "lost", passphrase_file)
        return
    if host is not None:
        raise click.UsageError(f"list takes nothing more, and got {host!r}")
    now = volume_status(live.resolve(path), passphrase_file, "hosts")
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
            f"{host.latency_ms:.1f} ms" if host.latency_ms is not None else "?",
            str(host.reads),
            str(host.writes),
            f"{host.failures:.2f}",
            host.error or "-",
        )
        for host in now.hosts
    ]
    write_table(("host", "id", "url", "state", "free", "latency", "reads", "writes", "failures", "error"), rows, right=(0, 4, 5, 6, 7, 8))


def _mark(target: live.Target, host: str, lost: bool, passphrase_file: Path | None) -> None:
    if target.served:
        with live.client(target.volume) as client:
            client.mark(host, lost)
        return
    secret = passphrase(passphrase_file)

    async def work() -> None:
        async with unmounted_volume(target.volume, secret, "hosts") as volume:
            await volume.mark_host(host, lost=lost)

    run(work)


@click.command(short_help="List, conclude and renew contracts with hosts.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME")
@click.argument("action", type=click.Choice(["list", "conclude", "renew"]), default="list", metavar="[list|conclude|renew]")
@click.argument("what", default=None, required=False, metavar="[HOST|ID]")
@click.argument("days", type=Days(), default=None, required=False, metavar="[DAYS]")
@passphrase_option
def contracts(path: Path, action: str, what: str | None, days: float | None, passphrase_file: Path | None) -> None:
    """List the contracts of VOLUME, conclude a new one with a host, or renew one.

    HOST is a number, id or URL as `fusefs hosts` shows them, ID a contract's id. The new contract runs DAYS from now, and its id is
    printed; the old one runs on to its end. A mount renews by itself when a third of the time is left.

    \b
    Examples:
      fusefs contracts ~/volume
      fusefs contracts ~/volume conclude 2 365
      fusefs contracts ~/volume renew 8c3e0f6e2b1d4c4f9a7be01f3d5a6c70 365
    """
    if action == "list":
        if what is not None:
            raise click.UsageError(f"list takes nothing more, and got {what!r}")
        _list(live.resolve(path), passphrase_file)
        return
    if what is None or days is None:
        raise click.UsageError("conclude needs HOST DAYS" if action == "conclude" else "renew needs ID DAYS")
    write_line(_change(live.resolve(path), action, what, days * DAY, passphrase_file))


def _list(target: live.Target, passphrase_file: Path | None) -> None:
    now = volume_status(target, passphrase_file, "contracts")
    rows = [
        (
            c.contract_id,
            str(c.host_number),
            day(c.start_ns),
            day(c.end_ns),
            f"{human_span((c.end_ns - time.time_ns()) / 1e9)} left" if c.active else "ended",
        )
        for c in sorted(now.contracts, key=lambda c: (c.host_number, c.end_ns))
    ]
    write_table(("contract", "host", "from", "to", "state"), rows, right=(1,))


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
