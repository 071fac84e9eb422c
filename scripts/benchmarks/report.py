"""Medians, spread and ratios of a run: a table for the terminal, JSON, and plots."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchmarks.works import TIMES

#: The floors of the project: measure -> (system, at least this ratio, of what).
FLOORS: list[tuple[str, str, float, str]] = [
    ("write 128 KiB", "fusefs", 0.9, "disk"),
    ("write 128 KiB", "fusefs", 1.3, "best syncing"),
    ("read cold", "fusefs", 1.5, "best"),
    ("append 100 B", "fusefs", 0.5, "disk"),
    ("append 100 B", "fusefs", 5.0, "best"),
    ("append 200 B + fsync", "fusefs", 1.0, "gocryptfs"),
    ("append 200 B + fsync, 8 writers", "fusefs", 0.6, "gocryptfs"),
    ("create 4 KiB", "fusefs", 0.65, "null"),
    ("stat", "fusefs", 0.7, "null"),
    ("list", "fusefs", 0.7, "null"),
    ("unlink", "fusefs", 0.6, "null"),
    ("read 4 KiB cold", "fusefs", 0.5, "null"),
    ("random 4 KiB cold", "fusefs", 0.4, "gocryptfs"),
    ("random 4 KiB warm", "fusefs", 0.8, "gocryptfs"),
    ("write 128 KiB", 'fusefs "2"', 0.45, "fusefs"),
    ("write 128 KiB", 'fusefs "4+2"', 0.5, "fusefs"),
    ("write into staging", "fusefs seaweedfs", 0.9, "disk"),
    ("upload behind", "fusefs seaweedfs", 0.8, "obstore alone"),
]


@dataclass
class Run:
    """Everything a run found out. `rates`: system -> measure -> one number a round."""

    machine: dict[str, str]
    #: Of the works: bytes, appends, files.
    sizes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    encrypted: dict[str, bool] = field(default_factory=dict)
    #: Does fsync reach the disk: every time, not, or not known.
    syncs: dict[str, bool | None] = field(default_factory=dict)
    survives: dict[str, bool] = field(default_factory=dict)
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    #: Anonymous and shared, bytes: at the end, and at most while it worked.
    memory: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    ladder: dict[str, float] = field(default_factory=dict)
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, system: str, results: dict[str, float]) -> None:
        """One round's."""
        for measure, value in results.items():
            self.rates.setdefault(system, {}).setdefault(measure, []).append(value)

    def median(self, system: str, measure: str) -> float | None:
        """None where it was not measured."""
        values = self.rates.get(system, {}).get(measure)
        return statistics.median(values) if values else None

    def spread(self, system: str, measure: str) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        values = self.rates[system][measure]
        if len(values) < 4:
            return (max(values) - min(values)) / 2 / statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        return (high - low) / 2 / statistics.median(values)

    def peers(self) -> list[str]:
        """Other people's, with encryption."""
        return [name for name in self.rates if self.encrypted.get(name) and not name.startswith("fusefs")]

    def best(self, measure: str, *, syncing: bool = False) -> tuple[str, float] | None:
        """The best peer."""
        found = [(name, value) for name in self.peers() if (value := self.median(name, measure)) is not None]
        found = [(name, value) for name, value in found if not syncing or self.syncs.get(name)]
        if not found:
            return None
        return min(found, key=lambda pair: pair[1]) if measure in TIMES else max(found, key=lambda pair: pair[1])

    def reference(self, measure: str, what: str) -> str:
        """Whose number a floor's ratio is of; "": nobody's."""
        if what in ("best", "best syncing"):
            best = self.best(measure, syncing=what == "best syncing")
            return best[0] if best is not None else ""
        return what

    def comparisons(self) -> list[dict[str, Any]]:
        """Each work with what fusefs did, as a ratio to the bare disk and to the best peer; of times, how many times quicker."""
        rows: list[dict[str, Any]] = []
        for measure in measures_of(self):
            value, best, syncing = self.median("fusefs", measure), self.best(measure), self.best(measure, syncing=True)
            if value is None:
                continue

            def ratio(other: float | None, value: float = value, measure: str = measure) -> float | None:
                if not other:
                    return None
                return round(other / value if measure in TIMES else value / other, 2)

            rows.append(
                {
                    "work": measure,
                    "fusefs": value,
                    "to disk": ratio(self.median("disk", measure)),
                    "best peer": best and best[0],
                    "to best peer": ratio(best and best[1]),
                    "best that syncs": syncing and syncing[0],
                    "to best that syncs": ratio(syncing and syncing[1]),
                }
            )
        return rows

    def floors(self) -> list[dict[str, Any]]:
        """Each floor with what was reached: the ratio of the medians, which is what counts. And how firmly: the median of each round's
        ratio, and the rounds in which it was reached."""
        rows = []
        for measure, system, least, what in FLOORS:
            whose = self.reference(measure, what)
            value, other = self.median(system, measure), self.median(whose, measure)
            if value is None or not other:
                continue
            each = [one / another for one, another in zip(self.rates[system][measure], self.rates[whose][measure], strict=False)]
            rows.append(
                {
                    "work": measure,
                    "system": system,
                    "of": what,
                    "floor": least,
                    "reached": round(value / other, 2),
                    "ok": value / other >= least,
                    "by round": round(statistics.median(each), 2),
                    "rounds": f"{sum(ratio >= least for ratio in each)} of {len(each)}",
                }
            )
        return rows

    def as_json(self) -> str:
        """All of it."""
        medians = {
            name: {measure: {"median": self.median(name, measure), "spread": round(self.spread(name, measure), 3)} for measure in measures}
            for name, measures in self.rates.items()
        }
        return json.dumps({**asdict(self), "medians": medians, "comparisons": self.comparisons(), "floors": self.floors()}, indent=1)


def measures_of(run: Run) -> list[str]:
    """In the order they were measured."""
    return list(dict.fromkeys(measure for rates in run.rates.values() for measure in rates))


def show(run: Run, console: Console) -> None:
    """For the terminal."""
    table = Table(title="medians, ± half the quartile distance; per second (MiB, operations, files), higher is better, unless said")
    table.add_column("work")
    for name in run.rates:
        table.add_column(name + ("*" if run.syncs.get(name) is False else ""), justify="right")
    for measure in measures_of(run):
        row = [measure]
        for name in run.rates:
            value = run.median(name, measure)
            row.append("" if value is None else f"{value:,.0f} ±{100 * run.spread(name, measure):.0f}%")
        table.add_row(*row)
    console.print(table)
    if any(value is False for value in run.syncs.values()):
        console.print("*: its fsync does not reach the disk")
    for name, survived in run.survives.items():
        if not survived:
            console.print(f"{name}: what was fsync'd did not survive a kill -9")
    if run.peers() and "fusefs" in run.rates:
        ratios = Table(title="fusefs: ratios to the bare disk, to the best peer, and to the best whose fsync reaches the disk")
        for column in ("work", "to disk", "to best peer", "", "to best that syncs", ""):
            ratios.add_column(column, justify="right" if column.startswith("to") else "left")
        shown = ("to disk", "to best peer", "best peer", "to best that syncs", "best that syncs")
        for compared in run.comparisons():
            ratios.add_row(compared["work"], *("" if compared[column] is None else str(compared[column]) for column in shown))
        console.print(ratios)
    floors = Table(title="floors")
    for column in ("work", "system", "of", "floor", "reached", "", "median of rounds", "reached in"):
        floors.add_column(column)
    for floor in run.floors():
        verdict = "ok" if floor["ok"] else "BELOW"
        shown = (floor["floor"], floor["reached"], verdict, floor["by round"], floor["rounds"])
        floors.add_row(floor["work"], floor["system"], floor["of"], *map(str, shown))
    console.print(floors)
    for title, pairs in [("the parts alone", run.ladder), *run.growth.items()]:
        if pairs:
            console.print(f"{title}: " + "; ".join(f"{name} {value:,.4g}" for name, value in pairs.items()))
    for name, size in run.memory.items():
        most = run.peaks.get(name, size)
        console.print(f"memory of {name}: {most / 2**20:,.0f} MiB at most, {size / 2**20:,.0f} at the end, anonymous and shared")
    console.print("; ".join(f"{name} {value}" for name, value in run.machine.items()))
    console.print("; ".join(f"{name}: {value}" for name, value in run.versions.items()))
    for name, why in run.left_out.items():
        console.print(f"left out: {name}: {why}")


def plot(run: Run, path: Path) -> None:
    """Each work as a ratio to the bare disk, or to the best there is where the disk does not do it; logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = [measure for measure in measures_of(run) if measure not in TIMES and run.median("disk", measure)]
    names = [name for name in run.rates if name != "disk"]
    figure, axes = pyplot.subplots(figsize=(12, 0.62 * len(measures) + 2))
    height = 0.8 / max(1, len(names))
    # Not the red of fusefs.
    others = cycle(color for at, color in enumerate(matplotlib.color_sequences["tab10"]) if at != 3)
    for place, name in enumerate(names):
        values = [(run.median(name, measure) or 0) / (run.median("disk", measure) or 1) for measure in measures]
        at = [row + 0.4 - height * (place + 0.5) for row in range(len(measures))]
        color = "#c0392b" if name == "fusefs" else next(others)
        star = "*" if run.syncs.get(name) is False else ""
        axes.barh(at, values, height=height, label=name + star, color=color)
    axes.set_yticks(range(len(measures)), measures)
    axes.set_ylim(len(measures) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("rate, relative to the bare disk (1.0); *: its fsync does not reach the disk")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_title(f"{run.versions.get('fusefs', '')} on {run.machine.get('cpu', '')}, Linux {run.machine.get('kernel', '')}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
