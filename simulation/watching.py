"""What a person sees while they wait: on a terminal a bar that is gone at the end, elsewhere a line now and then; on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: What is being done, the share of it that is (0 to 1), and what has been seen meanwhile. Changes nothing in a world.
Watch = Callable[[str, float, str], None]
#: Seconds between two lines where there is no terminal.
LINE_SECONDS = 10.0


def nobody(_what: str, _share: float, _seen: str) -> None:
    """A Watch of which nobody sees anything."""


@contextmanager
def watching(label: str) -> Iterator[Watch]:
    """A Watch for somebody, while the body runs; `label` stands before all that it says."""
    if not sys.stderr.isatty():
        yield _lines(label)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    seen_columns = (TextColumn("{task.fields[seen]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *seen_columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=1.0, seen="")
        doing = ""

        def show(what: str, share: float, seen: str) -> None:
            nonlocal doing
            if what != doing:
                # How long it takes says nothing of what came before.
                doing = what
                bar.reset(task, total=1.0, description=f"{label}: {what}")
            bar.update(task, completed=share, seen=seen)

        yield show


def _lines(label: str) -> Watch:
    due, doing = 0.0, ""

    def show(what: str, share: float, seen: str) -> None:
        nonlocal due, doing
        now = time.monotonic()
        if what != doing or now >= due:
            due, doing = now + LINE_SECONDS, what
            click.echo(f"{label}: {what}, {share:.0%}{', ' if seen else ''}{seen}", err=True)

    return show
