"""Tables for people, JSON for programs, and the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import msgspec

from simulation.driver import DAY
from simulation.experiment import YEAR, Point
from simulation.markov import loss_rate, mean_time_to_loss
from simulation.statistics import Estimate
from storage.errors import BadArgument
from storage.replication import parse_replication

_HEADERS = ("spec", "speed", "hosts", "host life", "repair", "years", "deaths", "lost", "counted", "expected", "closed form")


def table(points: Sequence[Point]) -> list[str]:
    """One line per point. Losses are per sector and year."""
    rows = [_HEADERS]
    for point in points:
        rows.append(
            (
                point.spec,
                f"{point.speed:g}",
                f"{point.hosts}",
                f"{point.host_life_days:.3g} d",
                f"{point.repair_hours:.2f} h",
                f"{point.years:.3g}",
                f"{point.deaths}",
                f"{point.lost}",
                _interval(point.counted),
                _interval(point.expected),
                f"{point.closed_form:.2g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _interval(estimate: Estimate) -> str:
    if estimate.high == 0.0:
        # No batch had any, so their differences say nothing.
        return "none seen"
    return f"{estimate.mean:.2g} ({estimate.low:.2g} to {estimate.high:.2g})"


def probability(rate: float, sectors: int) -> float:
    """That at least one of so many sectors is lost in a year: each at `rate` per year, and as if by itself, so not too low."""
    return -math.expm1(-rate * sectors)


def fleet_rate(point: Point, hosts: int) -> float:
    """How often per year so many of `hosts` hosts are missing at once that a sector on just these would be lost: no volume on them loses
    something more often, however many sectors it has."""
    spec = parse_replication(point.spec)
    return YEAR / mean_time_to_loss(hosts, spec.hosts_needed - spec.k, 1.0 / (point.host_life_days * DAY), point.repair_hours * 3600.0)


def yearly(points: Sequence[Point], sectors: int, hosts: int) -> list[str]:
    """Per spec, at the real speed: how likely a volume of so many sectors on so many hosts loses something in a year."""
    lines = [f"Probability that a volume of {sectors:,} sectors on {hosts:,} hosts loses one in a year, at the real speed, at most:"]
    for point in points:
        if point.speed != 1.0:
            continue
        bound = fleet_rate(point, max(hosts, parse_replication(point.spec).hosts_needed)) if point.host_life_days else math.inf
        closed = probability(min(point.closed_form * sectors, bound), 1)
        mean, low, high = (probability(rate, sectors) for rate in astuple(point.expected))
        if not point.expected.mean:
            seen = "extrapolated: in the simulation nothing was ever one death away from a loss"
        elif point.closed_form * sectors < bound:
            seen = f"simulated {mean:.2g} ({low:.2g} to {high:.2g})"
        else:
            seen = "so often are enough of its hosts missing at once"
        lines.append(f"  {point.spec:6} closed form {closed:.2g}; {seen}")
    return lines


def write_json(path: Path, settings: dict[str, object], points: Sequence[Point]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode({"settings": settings, "points": points}), indent=2) + b"\n")


def read_json(path: Path) -> list[Point]:
    """The points of `write_json`. BadArgument."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Numbers).points
    except (OSError, msgspec.DecodeError) as error:
        raise BadArgument(f"{path} has no numbers of a simulation: {error}") from None


class _Numbers(msgspec.Struct):
    points: list[Point]


def write_plot(path: Path, points: Sequence[Point]) -> None:
    """Losses per sector and year over the mean life of hosts. BadArgument where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadArgument("the plot needs matplotlib: scripts/bootstrap simulate installs it") from None
    figure = Figure(figsize=(9, 6.5), dpi=110)
    axes = figure.subplots()
    specs = list(dict.fromkeys(point.spec for point in points))
    lives = [point.host_life_days for point in points]
    for number, spec in enumerate(specs):
        colour = f"C{number}"
        mine = [point for point in points if point.spec == spec]
        replication = parse_replication(spec)
        repair = mine[0].repair_hours * 3600.0
        simulated = [point.host_life_days for point in mine if point.expected.mean > 0.0]
        known = max(simulated, default=min(lives))
        steps = [min(lives) * (2 * max(lives) / min(lives)) ** (step / 200) for step in range(201)]

        def rates(days: Sequence[float], replication=replication, repair=repair) -> list[float]:  # type: ignore[no-untyped-def]
            return [loss_rate(replication, 1.0 / (one * DAY), repair) * YEAR for one in days]

        shown = [days for days in steps if days <= known]
        beyond = [days for days in steps if days >= known]
        axes.plot(shown, rates(shown), colour, linewidth=1.2)
        axes.plot(beyond, rates(beyond), colour, linewidth=1.2, linestyle=":")
        axes.annotate(spec, (steps[-1], rates(steps[-1:])[0]), color=colour, xytext=(5, -3), textcoords="offset points")
        for what, marker, face in (("expected", "o", colour), ("counted", "s", "none")):
            seen = [(point.host_life_days, getattr(point, what)) for point in mine if getattr(point, what).mean > 0.0]
            if seen:
                means = [estimate.mean for _, estimate in seen]
                # A logarithmic axis has no zero: an interval that reaches it ends at a twentieth.
                below = [estimate.mean - max(estimate.low, estimate.mean / 20) for _, estimate in seen]
                above = [estimate.high - estimate.mean for _, estimate in seen]
                shift = 1.0 if what == "expected" else 1.07
                axes.errorbar(
                    [days * shift for days, _ in seen],
                    means,
                    yerr=[below, above],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=5,
                    capsize=2,
                    linewidth=1,
                )
    real = max(lives)
    axes.axvline(real, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate(
        "the real speed",
        (real, axes.get_ylim()[1]),
        color="grey",
        ha="right",
        va="top",
        rotation=90,
        xytext=(-3, -5),
        textcoords="offset points",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("mean life of a host, days")
    axes.set_ylabel("losses per sector and year")
    axes.set_title("Data loss: simulated with the real placement and reconcile code (marks), closed form (lines)")
    axes.plot([], [], "ko", markersize=5, label="simulated, expected losses, 95 % interval")
    axes.plot([], [], "ks", markersize=5, markerfacecolor="none", label="simulated, losses counted, 95 % interval")
    axes.plot([], [], "k-", linewidth=1.2, label="closed form")
    axes.plot([], [], "k:", linewidth=1.2, label="closed form, extrapolated beyond what was simulated")
    axes.legend(loc="lower left", fontsize=9)
    axes.grid(visible=True, which="major", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
