"""The command behind scripts/bench."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from scripts.benchmarks import markdown, report, runner
from scripts.benchmarks.seaweed import Seaweed
from scripts.benchmarks.systems import ROOT, keep_apart
from scripts.benchmarks.works import GROUPS, QUICK, Sizes


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=7, show_default=True, help="Rounds; every system does every work in each.")
@click.option("--system", "systems", multiple=True, help="Only these, as named in the table. Repeat.")
@click.option("--group", "groups", multiple=True, type=click.Choice(list(GROUPS)), help="Only these works. Repeat.")
@click.option("--quick", is_flag=True, help="Small sizes: to see that it runs, not to compare.")
@click.option("--growth", "counts", multiple=True, type=int, help="Also a volume with so many files: mounting, listing, memory. Repeat.")
@click.option("--appends", default=10_000_000, show_default=True, help="With --growth: appends to one log.")
@click.option("--ladder/--no-ladder", default=True, help="The parts alone as well.")
@click.option("--on", "disk", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The disk to measure on: a directory.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Write README.md, bench.json and bench.png there.")
def main(
    rounds: int,
    systems: tuple[str, ...],
    groups: tuple[str, ...],
    quick: bool,
    counts: tuple[int, ...],
    appends: int,
    ladder: bool,
    disk: Path | None,
    output: Path | None,
) -> None:
    """Measure fusefs beside its peers and the bare disk, turn by turn. As root: caches are dropped in between."""
    if os.geteuid() != 0:
        raise click.ClickException("the kernel's caches are dropped between works: run it as root")
    console = Console(width=None if sys.stdout.isatty() else 200)
    started = time.monotonic()

    def say(text: str) -> None:
        Console(stderr=True).print(f"{time.monotonic() - started:6.0f} s  {text}")

    # As Ctrl-C: what is mounted is unmounted on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = Path(tempfile.mkdtemp(prefix="fusefs-bench-", dir=disk))
    sizes = QUICK if quick else Sizes()
    works = groups or tuple(GROUPS)
    seaweed = Seaweed(base)
    try:
        keep_apart(base)
        try:
            chosen = runner.chosen(base, seaweed, systems, works)
            result = runner.measure(chosen, rounds, works, sizes, say, lambda so_far: _write(so_far, output, say))
        finally:
            seaweed.stop()
        # Once more with the rest, which can take long, and fail.
        _write(result, output, say)
        if ladder:
            runner.add_ladder(result, base, sizes)
        if counts:
            runner.add_growth(result, base, counts, appends, say)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    finally:
        shutil.rmtree(base, ignore_errors=True)
    report.show(result, console)
    _write(result, output, say)
    if output is not None:
        say(f"written to {os.path.relpath(output, ROOT)}")


def _write(result: report.Run, output: Path | None, say: Callable[[str], None]) -> None:
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench.json").write_text(result.as_json() + "\n")
    (output / "README.md").write_text(markdown.page(result, shlex.join(["scripts/bench", *sys.argv[1:]])))
    try:
        report.plot(result, output / "bench.png")
    except ImportError:
        say("no plot: matplotlib is not installed (scripts/bootstrap measure)")


if __name__ == "__main__":
    main()
