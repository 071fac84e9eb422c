"""`fusefs status`: what is stored, where, and what is wrong."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import click
import msgspec

from fusefs.cli import live
from fusefs.cli.arguments import DIRECTORY_PATH, passphrase_option
from fusefs.cli.notices import Notices
from fusefs.cli.output import human_bytes, human_span, human_time, printable, style, write_line, write_table
from fusefs.cli.passphrase import passphrase
from fusefs.cli.session import run, unmounted_volume
from fusefs.control_protocol import MountStatus
from storage import ContractStatus, HostStatus, ScrubStatus, StagingStatus, VolumeStatus, counted, named
from storage.errors import Fenced

#: Warnings shown to a person: where everything is wrong, what is stored must not scroll away.
SHOWN_WARNINGS = 10
#: Refusals shown to a person; --json has all that are kept.
SHOWN_REFUSALS = 5


@click.command(short_help="What is stored, where, and what is wrong.")
@click.argument("path", type=DIRECTORY_PATH, metavar="VOLUME|MOUNTPOINT")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object, for programs.")
@passphrase_option
@click.pass_obj
def status(collected: Notices, path: Path, as_json: bool, passphrase_file: Path | None) -> None:
    """Show files, bytes, sectors, what is pending, refused operations, hosts and contracts.

    Of a mounted volume the running process is asked, and no passphrase is needed.

    \b
    Examples:
      fusefs status ~/mnt
      fusefs status ~/volume --json | jq .pending_bytes
    """
    target = live.resolve(path)
    mount = None
    if target.served:
        with live.client(target.volume) as client:
            mount = client.status()
    now = mount.volume if mount is not None else volume_status(target, passphrase_file, "status")
    # They are among the warnings shown.
    collected.forget()
    if as_json:
        # Not msgspec's own encoder, which refuses the lone surrogates that stand for bytes that are not UTF-8.
        fields = msgspec.to_builtins(now)
        if mount is not None:
            fields |= {"pid": mount.pid, "mountpoint": mount.mountpoint, "phase": mount.phase}
        write_line(json.dumps(fields, indent=2))
    else:
        _show(now, mount)


def volume_status(target: live.Target, passphrase_file: Path | None, command: str) -> VolumeStatus:
    """From the process that has it mounted; else by opening the volume, which takes the passphrase."""
    if target.served:
        with live.client(target.volume) as client:
            return client.status().volume
    secret = passphrase(passphrase_file)

    async def work() -> VolumeStatus:
        try:
            async with unmounted_volume(target.volume, secret, command) as volume:
                return await volume.status()
        except Fenced as error:
            # What is here can still be looked at.
            now = await _read_only_status(target.volume, secret)
            return msgspec.structs.replace(now, read_only_reason=str(error), fenced=True, view="")

    return run(work)


async def _read_only_status(volume: Path, secret: str) -> VolumeStatus:
    from tempfile import TemporaryDirectory

    from storage import ReadOnlySource, open_read_only

    with TemporaryDirectory(prefix="fusefs-") as scratch:
        async with open_read_only(ReadOnlySource(volume, passphrase=secret), scratch=Path(scratch)) as opened:
            return await opened.status()


def _show(now: VolumeStatus, mount: MountStatus | None) -> None:
    found = warnings(now, time.time_ns())
    for warning in found[:SHOWN_WARNINGS]:
        write_line(style("warning: ", "bold yellow") + printable(warning))
    if len(found) > SHOWN_WARNINGS:
        write_line(f"... and {len(found) - SHOWN_WARNINGS} more (see --json)")
    for label, text in _summary(now, mount):
        write_line(style(f"{label:<10}", "bold") + printable(text))
    if now.fenced:
        _show_remedies(now, mount)
    if now.hosts:
        write_line()
        hosts_table(now)
    if now.refusals:
        write_line()
        shown = sorted(now.refusals, key=lambda refusal: refusal.when_ns)[-SHOWN_REFUSALS:]
        write_table(
            ("refused", "program", "file", "offset", "why"),
            [(human_time(r.when_ns), r.program, r.path, str(r.offset), r.reason.removeprefix(f"{r.path}: ")) for r in shown],
            right=(3,),
        )


def _show_remedies(now: VolumeStatus, mount: MountStatus | None) -> None:
    """What the owner of a volume that another machine has gone on with can do here."""
    where = f"it is at {mount.mountpoint}; once that is unmounted: " if mount is not None and mount.phase == "mounted" else ""
    hosts = " ".join(f"--host {shlex.quote(host.url)}" for host in now.hosts)
    for label, text in (
        ("to read", f"what only this machine has: {where}fusefs mount --read-only {shlex.quote(now.path)} MOUNTPOINT"),
        ("to go on", f"fusefs recover NEW_VOLUME {hosts}, and copy there what it lacks"),
    ):
        write_line(style(f"{label:<10}", "bold") + printable(text))


def _summary(now: VolumeStatus, mount: MountStatus | None) -> list[tuple[str, str]]:
    lookups = now.cache_hits + now.cache_misses
    hits = f", {100 * now.cache_hits // lookups} % of reads found there" if lookups else ""
    lines = [
        ("volume", f"{now.path}  (id {now.volume_id})"),
        ("mounted", _mounted(mount)),
        *([("shows", now.view)] if now.view else []),
        ("stored", f"{counted(now.files, 'file')}, {human_bytes(now.bytes)}, in {counted(now.sectors, 'sector')}{_stored_as(now)}"),
        ("pending", _pending(now)),
        *([("staging", _staging(now.staging))] if (now.staging.sectors or now.staging.used) and not now.view else []),
        *([("repair", _repair(now))] if now.repair.pending and not now.view else []),
        *([("moving", _rewrite(now))] if (now.rewrite.files or now.rewrite.directories) and not now.view else []),
        *([("scrub", _scrub(now.scrub))] if not now.view else []),
        *([("metadata", _published(now))] if not now.view else []),
        ("cache", f"{human_bytes(now.cache_bytes)} of {human_bytes(now.cache_limit)}{hits}"),
        ("journal", f"{now.journal_fill * 100:.0f} % full"),
    ]
    if now.refusals_total:
        lines.append(("refused", f"{counted(now.refusals_total, 'operation')} since it was opened"))
    return lines


def _stored_as(now: VolumeStatus) -> str:
    """How often, or as which code; directories may have another replication than the volume."""

    def told(spec: str) -> str:
        return f"as {spec}, data+parity" if "+" in spec else "one copy each" if spec == "1" else spec + " copies each"

    if not now.stored_as:
        return f", {told(now.replication)}" + (", where no directory has another replication" if now.sectors else "")
    if len(now.stored_as) == 1:
        return f", {told(*now.stored_as)}"

    def one_of(spec: str) -> str:
        return f"as {spec} (data+parity)" if "+" in spec else "with one copy" if spec == "1" else "with " + spec + " copies"

    # The volume's own first.
    specs = sorted(now.stored_as, key=lambda spec: (spec != now.replication, "+" in spec, spec))
    return ": " + ", ".join(f"{now.stored_as[spec]:,} {one_of(spec)}" for spec in specs)


def _pending(now: VolumeStatus) -> str:
    """What this machine alone has, as far as that is not in staging."""
    if now.view and now.pending_bytes:
        # Whether the log on the hosts has it is not known to who only reads.
        return f"{human_bytes(now.pending_bytes)} in no sector on the hosts yet"
    if now.pending_bytes:
        rest = f"; {human_bytes(now.logged_bytes)} more in the log on the hosts" if now.logged_bytes else ""
        return f"{human_bytes(now.pending_bytes)} on too few hosts yet{rest}"
    if now.staging.sectors:
        return "nothing in memory"
    rest = f", {human_bytes(now.logged_bytes)} of it in their log" if now.logged_bytes else ""
    return f"nothing: what was written is on its hosts{rest}"


def _staging(now: StagingStatus) -> str:
    """What waits for hosts on the local disk, and what is kept there."""
    used = f"{human_bytes(now.used)} of {human_bytes(now.limit)} used"
    if not now.sectors:
        return f"nothing waits; {used}, as read cache"
    how = f", {human_bytes(int(now.rate))}/s" if now.rate else ""
    left = f", {human_span(now.seconds_left)} left" if now.seconds_left is not None else ""
    return f"{counted(now.sectors, 'sector')} on too few hosts yet, {human_bytes(now.bytes)} to send{how}{left}; {used}"


def _repair(now: VolumeStatus) -> str:
    """What reconcile is at."""
    done = f", {human_bytes(now.repair.bytes)} sent" if now.repair.bytes else ""
    rest = f", {human_bytes(now.repair.pending_bytes)} to send" if now.repair.pending_bytes else ""
    return f"{counted(now.repair.pending, 'sector')} to be made good{rest}{done}"


def _rewrite(now: VolumeStatus) -> str:
    """What changes its replication."""
    done = f", {human_bytes(now.rewrite.bytes)} moved" if now.rewrite.bytes else ""
    trouble = f": {now.rewrite.trouble}" if now.rewrite.trouble else ""
    return f"{counted(now.rewrite.files, 'file')}, {human_bytes(now.rewrite.pending_bytes)}, to another replication{done}{trouble}"


def _scrub(now: ScrubStatus) -> str:
    """What was looked at in the background, and when all was looked at last."""
    parts = []
    if now.begun_ns and now.interval:
        found = now.missing + now.damaged
        told = f", {counted(found, 'bad copy', 'bad copies')}, {now.repaired:,} repaired" if found else ""
        parts.append(f"{now.sectors:,} of {counted(now.sectors + now.sectors_left, 'sector')} looked at since {day(now.begun_ns)}{told}")
    if now.last_ended_ns:
        told = f"{counted(now.last_found, 'bad copy', 'bad copies')}, {now.last_repaired:,} repaired" if now.last_found else "no bad copies"
        parts.append(f"all of them {'read whole, ' if now.last_full else ''}by {human_time(now.last_ended_ns)}: {told}")
    elif not parts:
        parts.append("never" if now.interval else "not in the background, and never")
    if now.found_since:
        parts.append(f"found since it was opened: {counted(now.found_since, 'bad copy', 'bad copies')}, {now.repaired_since:,} repaired")
    return "; ".join(parts)


def _published(now: VolumeStatus) -> str:
    """What a recovery without this machine would find."""
    if not now.published_ns:
        return f"commit {now.commit} here; not on the hosts yet since it was opened"
    since = human_span(max(0.0, (time.time_ns() - now.published_ns) / 1e9))
    rest = "; more has changed since" if now.unpublished else ", everything there is"
    return f"on the hosts as of commit {now.published_commit}, {since} ago{rest}"


def _mounted(mount: MountStatus | None) -> str:
    if mount is None:
        return "no"
    if mount.phase == "mounted":
        return f"on {mount.mountpoint} by process {mount.pid}, {counted(mount.open_handles, 'open file')}"
    return f"no longer: process {mount.pid} is {mount.phase}" if mount.phase != "starting" else f"starting, process {mount.pid}"


def warnings(now: VolumeStatus, now_ns: int) -> list[str]:
    """What needs somebody's attention, the worst first. Each is said once."""
    found: list[str] = []
    if now.read_only and not now.view:
        found.append(f"the volume takes no more writes: {now.read_only_reason}")
    found += now.warnings
    if now.staging.trouble:
        found.append(f"what is staged does not get to its hosts: {now.staging.trouble}" if now.staging.sectors else now.staging.trouble)
    if now.degraded_sectors:
        why = f": {now.repair.trouble}" if now.repair.trouble else ""
        found.append(f"{counted(now.degraded_sectors, 'sector')} with too few copies{why}")
    if now.missing_places:
        found.append(f"hosts have forgotten {counted(now.missing_places, 'shard')}, not made again so far: fusefs check names the files")
    files = f", with bytes of {named(now.damaged_files)}" if now.damaged_files else ""
    if now.scrub.lost:
        found.append(f"{counted(now.scrub.lost, 'sector')} cannot be had from the hosts that answer{files}: {now.scrub.trouble}")
    elif now.scrub.pending:
        why = f": {now.scrub.trouble}" if now.scrub.trouble else ""
        bad = counted(now.scrub.pending, "copy", "copies")
        found.append(f"{bad} on hosts known to be damaged or missing{files}, and not repaired yet{why}")
    elif files:
        found.append(f"some copies are damaged or missing{files}")
    for host in now.hosts:
        # One that was given up, or left, may be away.
        if host.error and host.state not in ("lost", "left") and not any(host.url in text for text in found):
            found.append(_host_warning(host, now_ns))
        found += _contract_warnings(host, [c for c in now.contracts if c.host_number == host.number], now_ns)
    return list(dict.fromkeys(found))


def _host_warning(host: HostStatus, now_ns: int) -> str:
    if host.error_ns:
        what = host.error if host.url in host.error else f"host {host.url} had an error: {host.error}"
        return f"{human_span(max(0.0, (now_ns - host.error_ns) / 1e9))} ago: {what}"
    if host.state in ("ok", "failing"):
        return f"host {host.url} does not have its part of the metadata: {host.error}"
    return host.error if host.url in host.error else f"host {host.url} cannot be used: {host.error}"


def _contract_warnings(host: HostStatus, contracts: list[ContractStatus], now_ns: int) -> list[str]:
    if host.state in ("lost", "left") or any(c.trouble for c in contracts):
        # Nothing is wanted of it any more; or a warning of the volume's says it better.
        return []
    active = [c for c in contracts if c.active]
    if not active:
        return [f"no contract is in force with {host.url}: fusefs contracts VOLUME renew --all, or conclude one"]
    last = max(active, key=lambda c: c.end_ns)
    left = last.end_ns - now_ns
    if last.state == "ending":
        return [f"the contract with {host.url} ends in {human_span(left / 1e9)}"]
    return []


def hosts_table(now: VolumeStatus) -> None:
    """The hosts, with the end of each one's last contract."""
    rows = []
    for host in now.hosts:
        ends = [c.end_ns for c in now.contracts if c.host_number == host.number and c.active]
        rows.append(
            (
                str(host.number),
                host.url,
                host.state,
                human_bytes(host.free) if host.free is not None else "?",
                milliseconds(host.median_ms if host.median_ms is not None else host.latency_ms),
                milliseconds(host.p95_ms),
                f"{host.failures:.0f}",
                f"to {day(max(ends))}" if ends else "none",
            )
        )
    write_table(("host", "url", "state", "free", "latency", "p95", "failures", "contract"), rows, right=(0, 3, 4, 5, 6))


def milliseconds(value: float | None) -> str:
    """For a table."""
    return "?" if value is None else f"{value:.1f} ms"


def day(ns: int) -> str:
    """Local date."""
    return human_time(ns).split()[0]
