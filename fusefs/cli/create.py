"""`fusefs init`: a new volume."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import click

from fusefs.cli.arguments import Days, Size, passphrase_option, volume_argument
from fusefs.cli.hosts import say_what_it_can
from fusefs.cli.output import OutputClosed, flush_output, out_is_terminal, say, write_line
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run
from fusefs.cli.startup import importing
from storage import counted, parse_replication
from storage.errors import BadArgument, Exists, FusefsError, IOFailure, NotADirectory, NotFound


@click.command(short_help="Make a new volume.")
@volume_argument
@click.option("--host", "hosts", multiple=True, metavar="URL", help="Keep sectors on this host, as in dir:/mnt/disk1. Once for each host.")
@click.option(
    "--replication",
    default="1",
    show_default=True,
    metavar="SPEC",
    help="Copies of each sector (3), each on a host of its own; or data+parity (4+2: six hosts, any two may be lost).",
)
@click.option("--sector-size", type=Size(), default="4MiB", show_default=True, metavar="SIZE", help="Bytes of a full sector.")
@click.option(
    "--contract", "days", type=Days(), default=90, show_default=True, metavar="DAYS", help="Length of the contracts with the hosts."
)
@passphrase_option
def init(volume: Path, hosts: tuple[str, ...], replication: str, sector_size: int, days: float, passphrase_file: Path | None) -> None:
    """Make a new volume in the new directory VOLUME.

    Without --host, one directory host is made inside VOLUME.

    The 24 words of the recovery phrase are printed once, alone on standard output. They are the volume's key: whoever has them can
    read it. Write them down and keep them away from this machine.

    \b
    Examples:
      fusefs init ~/volume
      fusefs init ~/volume --replication 2 --host dir:/mnt/disk1 --host dir:/mnt/disk2
    """
    _check_new(volume)
    _check_hosts(hosts, replication)
    secret = passphrase(passphrase_file, twice=True)

    with importing():
        from storage import create_volume

    async def create() -> str:
        return await create_volume(
            volume,
            secret,
            hosts=hosts,
            replication=replication,
            sector_size=sector_size,
            contract_days=days,
            on_host=lambda url, can: say_what_it_can(url, str(can)),
        )

    phrase = run(create)
    if out_is_terminal():
        say("write down these 24 words; they are not shown again, and whoever has them can read the volume:")
    try:
        write_line(phrase)
        flush_output()
    except (FusefsError, OutputClosed) as error:
        # A volume whose phrase nobody has seen must not come into use, and so far nothing is in it.
        shutil.rmtree(volume, ignore_errors=True)
        raise IOFailure(
            f"the recovery phrase had nowhere to go, so volume {volume} was not made: {error or 'standard output is closed'}"
        ) from None
    say(f"volume {volume} is ready: fusefs mount {volume} MOUNTPOINT")


def _check_new(volume: Path) -> None:
    if os.path.lexists(volume):
        raise Exists(f"{volume} exists already: name a new directory")
    if not volume.parent.exists():
        raise NotFound(f"{volume.parent} does not exist: make it first (mkdir -p {volume.parent})")
    if not volume.parent.is_dir():
        raise NotADirectory(f"{volume.parent} is not a directory")


def _check_hosts(hosts: tuple[str, ...], replication: str) -> None:
    """What can be seen without touching a host, before anybody is asked for a passphrase. BadArgument.

    That two URLs are one host can only be seen on the hosts themselves: `create_volume` does, before it makes anything.
    """
    twice = [url for url, count in Counter(hosts).items() if count > 1]
    if twice:
        raise BadArgument(f"--host {twice[0]} is given twice: each copy needs a host of its own")
    for url in hosts:
        if url.lower().startswith("mem:"):
            raise BadArgument(f"--host {url}: a host in this process's memory, for tests, would be gone with it")
    parsed = parse_replication(replication)
    needed, given = parsed.hosts_needed, len(hosts)
    if hosts and needed > given:
        raise BadArgument(
            f"--replication {replication} needs {counted(needed, 'host')}, {given} given: add --host URL for {needed - given} more"
        )
    if not hosts and needed > 1:
        raise BadArgument(f"--replication {replication} needs {counted(needed, 'host')}: give --host URL {needed} times")
