"""How numbers of things, and lists of files, are said to people."""

from __future__ import annotations

from collections.abc import Collection

#: Files a message names.
EXAMPLES = 5


def counted(number: int, noun: str, several: str = "") -> str:
    """`1 file`, `1,000 files`; `several`: the plural, where it takes more than an s."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def named(paths: Collection[str]) -> str:
    """For messages: these files, as far as there may be no others."""
    return ", ".join(paths) + (" and maybe others" if len(paths) >= EXAMPLES else "")
