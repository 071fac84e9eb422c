"""`python -m simulation`: see docs/simulation.md."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

import click

from simulation.driver import DAY, Rates
from simulation.experiment import Point, Settings, simulate
from simulation.report import read_json, table, write_json, write_plot, yearly
from simulation.watching import watching
from storage.errors import FusefsError
from storage.replication import parse_replication

_NUMBER = click.FloatRange(min=0, min_open=True)
_NUMBER_OR_NONE = click.FloatRange(min=0)


@click.command(context_settings={"max_content_width": 120, "show_default": True})
@click.option("--spec", "specs", multiple=True, default=("2", "3", "4+2", "10+4"), help="A replication; may be given several times.")
@click.option("--hosts", type=click.IntRange(2, 100_000), default=2000, help="Hosts of the fleet at the real speed.")
@click.option("--fast-hosts", type=click.IntRange(2, 100_000), default=48, help="Hosts of the fleet at higher speeds.")
@click.option("--sectors", type=click.FloatRange(min=0.01), default=1.0, help="Sectors simulated, for each host.")
@click.option("--host-life", type=_NUMBER, default=1000.0, help="Mean days until a host dies.")
@click.option("--domains", type=click.IntRange(0, 10_000), default=0, help="Failure domains the hosts are spread over; 0: each its own.")
@click.option("--domain-life", type=_NUMBER_OR_NONE, default=0.0, help="Mean days until a whole domain dies; 0: never.")
@click.option("--away-every", type=_NUMBER_OR_NONE, default=30.0, help="Mean days between two absences of a host; 0: none.")
@click.option("--away-for", type=_NUMBER, default=20.0, help="Mean minutes of an absence.")
@click.option("--replace-after", type=_NUMBER, default=24.0, help="Hours from a death to an empty host in its place.")
@click.option("--grace", type=_NUMBER, default=60.0, help="Minutes a host may be away before its shards are made again (away_grace).")
@click.option("--data", type=_NUMBER, default=1e12, help="Bytes on each host.")
@click.option("--disk", type=_NUMBER, default=4e12, help="Bytes a host can take.")
@click.option("--repair-rate", type=_NUMBER, default=50e6, help="Bytes per second that each host gives to repairs.")
@click.option(
    "--speed",
    "speeds",
    type=click.FloatRange(min=1),
    multiple=True,
    default=(300.0, 1000.0, 3000.0),
    help="Also as if hosts died and were replaced so many times as quickly, for losses that can be counted; may be given several times.",
)
@click.option(
    "--deaths", type=click.IntRange(1), default=100, help="Deaths of hosts for each estimate, at least; at the real speed a fifth."
)
@click.option("--volume", type=click.IntRange(1), default=250_000, help="Sectors of the volume for which a year's probability is told.")
@click.option("--volume-hosts", type=click.IntRange(1), default=20, help="Hosts of that volume.")
@click.option("--seed", type=int, default=1, help="Everything follows from it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all numbers there.")
@click.option("--redraw", type=click.Path(path_type=Path, dir_okay=False), help="Simulate nothing: show what --json wrote there.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="Draw a picture there (PNG; needs matplotlib).")
def main(
    specs: tuple[str, ...],
    hosts: int,
    fast_hosts: int,
    sectors: float,
    host_life: float,
    domains: int,
    domain_life: float,
    away_every: float,
    away_for: float,
    replace_after: float,
    grace: float,
    data: float,
    disk: float,
    repair_rate: float,
    speeds: tuple[float, ...],
    deaths: int,
    volume: int,
    volume_hosts: int,
    seed: int,
    json_file: Path | None,
    redraw: Path | None,
    plot_file: Path | None,
) -> None:
    """Simulate loss of data, with the real placement and reconcile code on virtual hosts, and print it beside the closed form."""
    # What cannot be mended is this program's subject, not its trouble.
    logging.disable(logging.CRITICAL)
    fleet = Settings(
        hosts=hosts,
        domains=domains,
        sectors=max(1, round(sectors * hosts)),
        rates=Rates(host_life * DAY, domain_life * DAY, away_every * DAY, away_for * 60.0, replace_after * 3600.0),
        grace=grace * 60.0,
        data=data,
        disk=disk,
        repair_rate=repair_rate,
        speeds=(1.0,),
        deaths=max(1, deaths // 5),
        seed=seed,
    )
    fast = replace(fleet, hosts=fast_hosts, sectors=max(1, round(2 * sectors * fast_hosts)), speeds=speeds, deaths=deaths)
    try:
        for spec in specs:
            needed = parse_replication(spec).hosts_needed
            if needed > min(hosts, fast_hosts if speeds else hosts):
                raise click.UsageError(f"{spec} needs {needed} hosts")
        if domain_life and not domains:
            raise click.UsageError("--domain-life needs --domains")
        points: list[Point] = []
        if redraw is not None:
            points, specs = read_json(redraw), ()
            for line in table(points):
                click.echo(line)
        for spec in specs:
            with watching(f"spec {spec}") as watch:
                done = [point for settings in (fleet, fast) if settings.speeds for point in simulate(spec, settings, watch)]
            points += done
            for line in table(done):
                click.echo(line)
            click.echo()
        for line in yearly(points, volume, volume_hosts):
            click.echo(line)
        if json_file is not None:
            write_json(json_file, {"fleet": asdict(fleet), "fast": asdict(fast)}, points)
        if plot_file is not None:
            write_plot(plot_file, points)
    except FusefsError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main(prog_name="scripts/simulate")
