"""Types and options that several commands share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from fusefs.cli.startup import importing

F = TypeVar("F", bound=Callable[..., Any])

_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,9}))? ?([a-zA-Z]*)\Z", re.ASCII)
_FACTORS: dict[str, int] = {"": 1, "b": 1} | {
    spelling: base**power
    for power, letter in enumerate("kmgtp", start=1)
    for spelling, base in ((letter, 1024), (f"{letter}ib", 1024), (f"{letter}b", 1000))
}

#: A contract longer than a century is a typing error.
MAX_DAYS = 36525.0

#: Seconds.
DAY = 86400.0


class Size(click.ParamType[int]):
    """A number of bytes: `4194304`, `4MiB`, `4M` (both 4 * 1024 * 1024), `4MB` (4,000,000)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.match(str(value).strip())
        factor = _FACTORS.get(match[3].lower()) if match else None
        if match is None or factor is None:
            self.fail(f"{value!r} is not a size: give bytes, or a number with KiB, MiB or GiB, as in 4MiB", param, ctx)
        # Exact arithmetic: 1.5MiB is a whole number of bytes, and a float would lose it for large ones.
        fraction = match[2] or ""
        scale: int = 10 ** len(fraction)
        size, rest = divmod(int(match[1] + fraction) * factor, scale)
        if rest:
            self.fail(f"{value!r} is not a whole number of bytes", param, ctx)
        return size


class Days(click.ParamType[float]):
    """A length of time in days; fractions are allowed, zero and negative ones are not."""

    name = "days"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            days = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of days", param, ctx)
        if not (math.isfinite(days) and 0 < days <= MAX_DAYS):
            self.fail(f"{value}: between a moment and {MAX_DAYS:.0f} days", param, ctx)
        return days


class Grace(Days):
    """As Days, or none at all."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return 0.0 if str(value).strip() == "0" else super().convert(value, param, ctx)


class DirectoryPath(click.ParamType[Path]):
    """A directory, made absolute without touching the disk. Whether it must exist is for the command to say, with the right exit status."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not value or "\0" in str(value):
            self.fail(f"{value!r} is not a path", param, ctx)
        return Path(os.path.abspath(value))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002 - click's signature
        return [CompletionItem(incomplete, type="dir")]


DIRECTORY_PATH = DirectoryPath()


def passphrase_option(command: F) -> F:
    """`--passphrase-file FILE`."""
    return click.option(
        "--passphrase-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Take the passphrase from the first line of FILE (else FUSEFS_PASSPHRASE, else it is asked for).",
    )(command)


#: A slower line than that takes longer for one sector than a host has for an answer.
MIN_RATE = 4096


class Rate(Size):
    """Bytes a second, as a size."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        rate = super().convert(value, param, ctx)
        if rate < MIN_RATE:
            self.fail(f"{value!r} is too slow: at least 4K a second", param, ctx)
        return rate


def known_host(text: str) -> str:
    """What names a host of a volume: number or id as they are; of a URL the whole path, here, where the working directory is the person's.

    BadArgument, which repeats no secret, if it is no URL.
    """
    if ":" not in text:
        return text
    with importing():
        from storage import parse_url
    return parse_url(text).base


def upload_rate_option(command: F) -> F:
    """`--upload-rate SIZE`."""
    return click.option(
        "--upload-rate", type=Rate(), default=None, metavar="SIZE", help="Send at most so much a second to hosts, all in all, as in 2M."
    )(command)


def volume_argument(command: F) -> F:
    """`VOLUME`, the volume's directory, made absolute without touching the disk."""
    return click.argument("volume", type=DIRECTORY_PATH)(command)
