"""A target, and what counts as a finding."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.errors import Corrupt, FusefsError
from tests.fuzz.mutation import Shape

CORPUS = Path(__file__).parent / "corpus"
GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True, slots=True)
class Target:
    """One parser. `run` returns, or raises one of `errors`; that what the parser returned is what the program relies on, `run` checks."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    #: What the parser's docstring says.
    errors: tuple[type[Exception], ...] = (Corrupt,)
    shape: Shape = "bytes"
    #: Mutations in scripts/test.
    rounds: int = 2500

    def corpus(self) -> list[bytes]:
        """What earlier findings left, by name."""
        directory = CORPUS / self.name
        return [path.read_bytes() for path in sorted(directory.iterdir())] if directory.is_dir() else []


class Finding(AssertionError):
    """The parser did what it must not."""


def check(target: Target, data: bytes) -> None:
    """Finding, saying what is wrong, unless the parser takes the input or refuses it as it should."""
    try:
        target.run(data)
    except target.errors as error:
        if isinstance(error, FusefsError):
            check_message(str(error))


def check_message(message: str) -> None:
    """Finding unless it is one line for a person: it goes to terminals and logs, and parts of it may come from a hostile host."""
    wrong = [character for character in message if unicodedata.category(character) in ("Cc", "Zl", "Zp")]
    if wrong or not message:
        raise Finding(f"a message that is no line of text: {message[:200]!r}")


def same(one: object, other: object) -> None:
    """What was read can be written, and is the same again."""
    if one != other:
        raise AssertionError(f"{one!r} became {other!r}")


def golden(name: str) -> bytes:
    """A golden file of the tests."""
    return (GOLDEN / name).read_bytes()
