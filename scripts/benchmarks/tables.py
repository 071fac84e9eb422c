"""Puts the figures of docs/benchmarks/bench.json into the documents that tell of them, between their marks:

python -m scripts.benchmarks.tables

<!-- table: NAME, by scripts.benchmarks.tables -->
...
<!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.systems import ROOT

RUN = ROOT / "docs" / "benchmarks" / "bench.json"
Found = dict[str, Any]

#: Work as the run calls it, and as README.md does.
IN_SHORT = {
    "write 128 KiB": "sequential write in 128 KiB, with fsync, MiB/s",
    "read cold": "sequential read, cold, MiB/s",
    "append 100 B": "appends of 100 B, one fsync at the end, /s",
    "append 200 B + fsync": "appends of 200 B, an fsync after each, /s",
    "append 200 B + fsync, 8 writers": "the same, 8 writers, /s",
    "create 4 KiB": "create files of 4 KiB, /s",
    "list": "list a directory, entries/s",
    "read 4 KiB cold": "read files of 4 KiB, cold, /s",
    "unlink": "unlink, /s",
    "random 4 KiB cold": "random reads of 4 KiB, cold, /s",
    "random 4 KiB warm": "random reads of 4 KiB, in the cache, /s",
    "append to seen, us": "from an append until a reader sees it, us",
}
#: Systems as README.md calls them, in its order.
SYSTEMS = {
    "fusefs": "fusefs",
    'fusefs "2"': "two copies",
    'fusefs "4+2"': "`4+2`",
    "gocryptfs": "gocryptfs",
    "encfs": "EncFS",
    "cryfs": "CryFS",
    "juicefs": "JuiceFS",
    "rclone crypt": "rclone crypt",
    "disk": "the disk itself",
}
#: Work and system as the run has them, and as docs/performance.md calls the line.
BESIDE_FLOORS = [
    ("write 128 KiB", "fusefs", "write 128 KiB + fsync"),
    ("write 1 MiB", "fusefs", "write 1 MiB + fsync"),
    ("read cold", "fusefs", "read cold"),
    ("read warm", "fusefs", "read warm"),
    ("random 4 KiB cold", "fusefs", "random 4 KiB cold"),
    ("random 64 KiB cold", "fusefs", "random 64 KiB cold"),
    ("random 4 KiB warm", "fusefs", "random 4 KiB warm"),
    ("append 100 B", "fusefs", "appends of 100 B, one fsync"),
    ("append 200 B + fsync", "fusefs", "appends of 200 B, fsync each"),
    ("append 200 B + fsync, 8 writers", "fusefs", "the same, 8 writers"),
    ("create 4 KiB", "fusefs", "create 4 KiB"),
    ("list", "fusefs", "list"),
    ("stat", "fusefs", "stat"),
    ("read 4 KiB cold", "fusefs", "read 4 KiB cold"),
    ("unlink", "fusefs", "unlink"),
    ("write 128 KiB", 'fusefs "2"', "two copies on one disk, write"),
    ("write 128 KiB", 'fusefs "4+2"', '"4+2" on one disk, write'),
    ("write into staging", "fusefs seaweedfs", "write into staging (SeaweedFS host)"),
    ("upload behind", "fusefs seaweedfs", "upload behind"),
]


def _rate(found: Found, system: str, work: str) -> str:
    median = found["medians"].get(system, {}).get(work)
    return "" if median is None else f"{median['median']:,.0f}"


def _table(rows: list[list[str]]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def in_short(found: Found) -> str:
    """For README.md."""
    machine, rounds = found["machine"], max(len(rates) for rates in found["rates"]["fusefs"].values())
    names = {system: name + ("\\*" if found["syncs"].get(system) is False else "") for system, name in SYSTEMS.items()}
    there = [system for system in names if system in found["medians"]]
    rows = [["work", *(names[system] for system in there)]]
    rows += [[title, *(_rate(found, system, work) for system in there)] for work, title in IN_SHORT.items()]
    kernel = re.sub("-.*", "", machine["kernel"])
    said = f"Medians of {rounds} rounds in turns, hosts and all on one disk, {machine['cores']} cores ({machine['cpu']}), Linux {kernel}"
    return f"{said}, commit {found['versions']['fusefs']}, by `scripts/bench`:\n\n{_table(rows)}"


def beside_floors(found: Found) -> str:
    """For docs/performance.md. Bold: below."""
    rows = [["work", "disk", "null pyfuse3", "fusefs", "gocryptfs", "ratio reached", "floor", "of each round: median (reached in)"]]
    for work, system, title in BESIDE_FLOORS:
        floors = [floor for floor in found["floors"] if (floor["work"], floor["system"]) == (work, system)]
        # Floors are compared before ratios are rounded.
        below = ["" if floor["ok"] or floor["reached"] < floor["floor"] else "just below " for floor in floors]
        reached = [f"{less}{floor['reached']} x {floor['of']}" for less, floor in zip(below, floors, strict=True)]
        row = [title, _rate(found, "disk", work), _rate(found, "null", work), _rate(found, system, work), _rate(found, "gocryptfs", work)]
        row.append("; ".join(text if floor["ok"] else f"**{text}**" for text, floor in zip(reached, floors, strict=True)))
        row.append("; ".join(str(floor["floor"]) for floor in floors))
        row.append("; ".join(f"{floor['by round']} ({floor['rounds']})" for floor in floors))
        rows.append(row)
    return _table(rows)


def growth(found: Found) -> str:
    """For docs/performance.md."""
    of = found["growth"]
    sizes = [title for title in of if title.endswith("files")]
    names = list(dict.fromkeys(name for title in sizes for name in of[title]))
    rows = [["", *(f"{int(title.split()[0]):,} files" for title in sizes)]]
    for name in names:
        values = [of[title].get(name) for title in sizes]
        rows.append([name, *("" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in values)])
    return _table(rows)


#: By document, and by the name in its marks.
TABLES: dict[str, dict[str, Callable[[Found], str]]] = {
    "README.md": {"in short": in_short},
    "docs/performance.md": {"beside floors": beside_floors, "growth": growth},
}


def filled(text: str, tables: dict[str, Callable[[Found], str]], found: Found) -> str:
    """A document with its tables as the run has them. ValueError: a mark is missing."""
    for name, table in tables.items():
        begin, end = f"<!-- table: {name}, by scripts.benchmarks.tables -->\n", "\n<!-- end -->"
        before, mark, rest = text.partition(begin)
        _, other, after = rest.partition(end)
        if not mark or not other:
            raise ValueError(f"there is no table {name!r}")
        text = f"{before}{begin}\n{table(found)}\n{end}{after}"
    return text


def documents() -> dict[Path, str]:
    """Each document as it is to be, by the run that was written last."""
    found = json.loads(RUN.read_text())
    return {ROOT / name: filled((ROOT / name).read_text(), tables, found) for name, tables in TABLES.items()}


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
