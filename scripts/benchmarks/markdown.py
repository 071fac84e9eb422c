"""A run as the page that stands in docs/benchmarks: the same tables as in the terminal, for whoever reads the repository."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scripts.benchmarks.report import Run, measures_of


def page(run: Run, command: str) -> str:
    """Everything a run found out. `command`: how it was made."""
    parts = [
        "# How fast",
        f"By `{command}`, on commit {run.versions.get('fusefs', '?')}: every system does every work in each round, in turns. Medians, ± "
        "half the distance of the quartiles; MiB, operations or files per second, where nothing else is said. All of it is in "
        "[bench.json](bench.json).",
        "![ratios to the bare disk](bench.png)",
        _medians(run),
        "\\*: its fsync does not reach the disk, as the run itself found out. " + _killed(run),
        "## Ratios of fusefs",
        "To the bare disk, to the best of the others that seal what they store, and to the best of those whose fsync reaches the disk.",
        _ratios(run),
        "## What the project asks of itself",
        _table(["work", "of", "to", "at least", "reached", "median of rounds", "reached in"], map(_floor, run.floors())),
        "Reached: the ratio of the medians. Median of rounds: of each round's ratio. Bold: below. Why is in "
        "[performance.md](../performance.md).",
    ]
    if run.growth:
        parts += ["## What must not grow", *(f"{title}: {_pairs(found)}" for title, found in run.growth.items())]
    if run.ladder:
        parts += ["## The parts alone", _pairs(run.ladder)]
    parts += [
        "## The machine",
        _pairs_of_text(run.machine),
        "Memory at most, and at the end, anonymous and shared, MiB: "
        + ", ".join(f"{name} {run.peaks.get(name, size) / 2**20:,.0f} and {size / 2**20:,.0f}" for name, size in run.memory.items())
        + ".",
        "Versions: " + "; ".join(f"{name}: {version}" for name, version in run.versions.items()) + ".",
    ]
    parts += [f"Left out: {name}: {why}" for name, why in run.left_out.items()]
    return "\n\n".join(parts) + "\n"


def _medians(run: Run) -> str:
    names = list(run.rates)
    header = ["work", *(name + ("\\*" if run.syncs.get(name) is False else "") for name in names)]
    rows = []
    for measure in measures_of(run):
        row = [measure]
        for name in names:
            value = run.median(name, measure)
            row.append("" if value is None else f"{value:,.0f} ±{100 * run.spread(name, measure):.0f}%")
        rows.append(row)
    return _table(header, rows)


def _ratios(run: Run) -> str:
    rows = []
    for compared in run.comparisons():
        rows.append(
            [
                compared["work"],
                _number(compared["to disk"]),
                f"{_number(compared['to best peer'])} ({compared['best peer']})" if compared["best peer"] else "",
                f"{_number(compared['to best that syncs'])} ({compared['best that syncs']})" if compared["best that syncs"] else "",
            ]
        )
    return _table(["work", "to the disk", "to the best", "to the best that syncs"], rows)


def _floor(row: dict[str, Any]) -> list[str]:
    reached = str(row["reached"])
    told = reached if row["ok"] else f"**{reached}**"
    return [row["work"], row["system"], row["of"], str(row["floor"]), told, str(row["by round"]), row["rounds"]]


def _killed(run: Run) -> str:
    lost = [name for name, survived in run.survives.items() if not survived]
    kept = [name for name, survived in run.survives.items() if survived]
    said = f"What was fsync'ed was there after a kill -9 of {', '.join(kept)}" if kept else ""
    return said + (f"; it was not after one of {', '.join(lost)}." if lost else ".")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _pairs(found: dict[str, float]) -> str:
    return "; ".join(f"{name}: {value:,.4g}" for name, value in found.items()) + "."


def _pairs_of_text(found: dict[str, str]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in found.items()) + "."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
