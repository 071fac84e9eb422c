"""How numbers of things are said to people."""

from __future__ import annotations


def counted(number: int, noun: str, several: str = "") -> str:
    """`1 file`, `1,000 files`; `several`: the plural, where it takes more than an s."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"
