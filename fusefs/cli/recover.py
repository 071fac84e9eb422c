"""`fusefs recover`: a volume back from its hosts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from fusefs.cli.arguments import DIRECTORY_PATH, passphrase_option
from fusefs.cli.live import VOLUME_FILE
from fusefs.cli.notices import Notices
from fusefs.cli.output import human_bytes, human_time, printable, progress_bar, say, write_line, write_table
from fusefs.cli.passphrase import PHRASE_ENVIRONMENT, new_passphrase, passphrase, recovery_phrase
from fusefs.cli.session import run
from fusefs.cli.startup import importing
from storage import counted
from storage.errors import BadArgument, Exists

if TYPE_CHECKING:
    from storage import RecoveryReport, SalvageReport, VolumeOnHosts

#: Lines about one kind of trouble.
MANY = 20


@click.command(short_help="Get a volume back from its hosts.")
@click.argument("volume", type=DIRECTORY_PATH, required=False)
@click.option("--host", "hosts", multiple=True, metavar="URL", help="A host of the volume, as in dir:/mnt/disk1. One is enough.")
@click.option("--list", "listing", is_flag=True, help="Only list the volumes on the hosts. Needs no passphrase.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@passphrase_option
@click.option("--phrase", "by_phrase", is_flag=True, help="Use the 24 words: asked for, or in FUSEFS_PHRASE.")
@click.option("--phrase-file", type=click.Path(path_type=Path), metavar="FILE", help="Take the 24 words from the first line of FILE.")
@click.option(
    "--new-passphrase-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With the 24 words: the passphrase from now on (else FUSEFS_NEW_PASSPHRASE, else it is asked for).",
)
@click.option("--volume", "volume_id", metavar="ID", help="Which volume, where hosts hold several: the beginning of its id.")
@click.option("--superblock", metavar="NAME", help="Which generation or history, where somebody has to choose.")
@click.option("--salvage", is_flag=True, help="No superblock is left: bring back files into the directory VOLUME, from sectors alone.")
@click.option("--keyfile", type=click.Path(path_type=Path), metavar="FILE", help="With --salvage and a passphrase: a copy of keys.json.")
@click.pass_obj
def recover(
    collected: Notices,
    volume: Path | None,
    hosts: tuple[str, ...],
    listing: bool,
    as_json: bool,
    passphrase_file: Path | None,
    by_phrase: bool,
    phrase_file: Path | None,
    new_passphrase_file: Path | None,
    volume_id: str | None,
    superblock: str | None,
    salvage: bool,
    keyfile: Path | None,
) -> None:
    """Get a volume back from its hosts, into the new directory VOLUME.

    One surviving host that has all of it is enough, with the passphrase or the 24 words of the recovery phrase. The volume comes back as
    of the last commit that reached the hosts; a machine that still has it mounted is shut out from then on. Nothing on the hosts is
    deleted. A recovery that was interrupted is started over by the same command.

    \b
    Examples:
      fusefs recover --list --host dir:/mnt/disk1
      fusefs recover ~/volume --host dir:/mnt/disk1 --host dir:/mnt/disk2
      fusefs recover ~/volume --host dir:/mnt/disk1 --phrase

    If no superblock is left on any host, --salvage brings back what the sectors hold: as plain files, in the directory VOLUME,
    which is then no volume.
    """
    if not hosts:
        raise BadArgument("recover: name a host of the volume: --host URL, as in --host dir:/mnt/disk1")
    with importing():
        from storage import list_volumes, recover_volume, salvage_volume
    if listing:
        _tell_volumes(run(lambda: list_volumes(hosts)), as_json)
        return
    if volume is None:
        raise BadArgument("recover: name the new directory VOLUME, or see what the hosts hold with --list")
    _check(volume, salvage, superblock, keyfile)
    words = None
    if by_phrase or phrase_file is not None or (passphrase_file is None and PHRASE_ENVIRONMENT in os.environ):
        if keyfile is not None:
            raise BadArgument("recover: --keyfile is for a passphrase; the 24 words need none")
        words = recovery_phrase(phrase_file)
        # Before a new passphrase is asked for.
        with importing():
            from storage import master_of_phrase
        master_of_phrase(words)
    secret = passphrase(passphrase_file) if words is None else None
    if salvage:
        with progress_bar("salvaging") as advance:
            salvaged = run(
                lambda: salvage_volume(
                    volume, hosts, passphrase=secret, phrase=words, keyfile=keyfile, volume_id=volume_id, progress=advance
                )
            )
        _tell_salvaged(salvaged, volume, as_json)
        return
    new = None if words is None else new_passphrase(new_passphrase_file)
    with progress_bar("from the hosts") as advance:
        report = run(
            lambda: recover_volume(
                volume,
                hosts,
                passphrase=secret,
                phrase=words,
                new_passphrase=new,
                volume_id=volume_id,
                superblock=superblock,
                progress=advance,
            )
        )
    # Of hosts that are away, and what they lack, the report speaks.
    collected.forget_of("fusefs.history", "fusefs.volume")
    _tell(report, volume, as_json)


def _check(volume: Path, salvage: bool, superblock: str | None, keyfile: Path | None) -> None:
    """What can be seen before anybody is asked for a passphrase."""
    if (volume / VOLUME_FILE).exists():
        raise Exists(f"{volume} is a volume already, and is not overwritten: name a new directory")
    if salvage and superblock is not None:
        raise BadArgument("recover: --salvage is for where there is no superblock; give one of --salvage and --superblock")
    if keyfile is not None and not salvage:
        raise BadArgument("recover: --keyfile is for --salvage; otherwise the superblocks on the hosts hold the key slots")


def _tell_volumes(volumes: list[VolumeOnHosts], as_json: bool) -> None:
    if as_json:
        write_line(msgspec.json.encode(volumes).decode())
        return
    rows = [
        (v.volume_id, str(v.generation), str(v.epoch), human_time(v.written_ns), ", ".join(v.hosts))
        if v.generation
        else (v.volume_id, "-", "-", "no superblock", ", ".join(v.hosts))
        for v in volumes
    ]
    if rows:
        write_table(("VOLUME", "GENERATION", "EPOCH", "WRITTEN", "HOSTS"), rows, right=(1, 2))
    else:
        say("there is no volume on these hosts")
    for note in dict.fromkeys(note for v in volumes for note in v.notes):
        say(f"warning: {note}")


def _tell(report: RecoveryReport, volume: Path, as_json: bool) -> None:
    if as_json:
        write_line(msgspec.json.encode(report).decode())
    else:
        write_line(f"volume      {report.volume_id}, in {printable(str(volume))}")
        write_line(f"as of       commit {report.sequence}, {human_time(report.written_ns)}, superblock {report.generation}")
        write_line(f"written by  {printable(report.machine)}:{printable(report.directory)}")
        write_line(f"holds       {counted(report.files, 'file')}, {human_bytes(report.bytes)} in {counted(report.sectors, 'sector')}")
        write_line(f"epoch       {report.epoch}, begun here")
    for note in report.notes[:MANY]:
        say(f"note: {note}")
    for host in report.silent[:MANY]:
        say(f"warning: a host did not answer: {host}")
    degraded = report.degraded
    if degraded.unreadable:
        examples = f", as of {', '.join(degraded.paths)}" if degraded.paths else ""
        sectors = counted(degraded.unreadable, "sector")
        say(f"warning: on no host that answers: {sectors}{examples}: what is there cannot be read until one does")
    if degraded.fewer:
        say(f"warning: {counted(degraded.fewer, 'sector')} with too few copies on the hosts that answer")
    if not report.majority:
        say(
            "warning: no majority of the hosts knows of this recovery yet: a machine that still has the volume is not shut out "
            f"({report.trouble}); mount here, and it is as soon as they answer"
        )
    elif report.trouble:
        say(f"warning: the hosts do not have everything yet, they get it at the next mount: {report.trouble}")


def _tell_salvaged(report: SalvageReport, volume: Path, as_json: bool) -> None:
    if as_json:
        write_line(msgspec.json.encode(report).decode())
    else:
        write_line(f"salvaged    {counted(report.files, 'file')}, {human_bytes(report.bytes)}, into {printable(str(volume))}")
        write_line(f"from        {counted(report.sectors, 'sector')} of volume {report.volume_id}")
        write_line("these are plain files: not a volume, and without owners, modes, times, links and empty files")
    for name, missing in report.holes[:MANY]:
        say(f"warning: {name}: {human_bytes(missing)} are missing and read as zeros")
    if len(report.holes) > MANY:
        say(f"warning: and holes in {counted(len(report.holes) - MANY, 'file')} more (--json lists them)")
    if report.versions:
        say(f"note: older contents of a name that another file has, named NAME.value-N: {counted(report.versions, 'file')}")
    if report.nameless:
        say(f"note: without a name, in {volume / 'lost+found'}: {counted(report.nameless, 'file')}")
    for note in report.notes[:MANY]:
        say(f"warning: {note}")
