"""What people read: `1 file` and `2 files`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.wording import EXAMPLES, counted, named

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("fusefs", "storage") for path in (ROOT / package).rglob("*.py"))

#: Things there may be one of. Not bytes: most of what is said in bytes is a length that is wrong, for who mends programs.
NOUNS = (
    r"(?:(?:more|other|similar|different|deleted|metadata) )?"
    r"(?:sectors|files|hosts|copies|shards|objects|values|contracts|volumes|entries|operations|messages|inodes)\b"
)


@pytest.mark.parametrize(("number", "told"), [(0, "0 copies"), (1, "1 copy"), (2, "2 copies"), (1000, "1,000 copies")])
def test_one_is_not_several(number: int, told: str) -> None:
    assert counted(number, "copy", "copies") == told
    assert counted(number, "file") == told.replace("copies", "files").replace("copy", "file")


def test_a_list_that_may_be_longer_says_so() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named(["f"] * EXAMPLES).endswith("f and maybe others")


def numbered(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each message with a number that is not fixed right before a plural."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, following in zip(node.values, node.values[1:], strict=False):
                if isinstance(value, ast.FormattedValue) and isinstance(following, ast.Constant):
                    fixed = isinstance(value.value, ast.Name) and value.value.id.isupper()
                    text = str(following.value)
                    if re.match(" " + NOUNS, text) and not fixed and not before(node, value).endswith("of the last "):
                        yield node.lineno, text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search("%d " + NOUNS, node.value):
            yield node.lineno, node.value


def before(whole: ast.JoinedStr, value: ast.FormattedValue) -> str:
    """The text right before a value."""
    at = whole.values.index(value)
    text = whole.values[at - 1] if at else None
    return str(text.value) if isinstance(text, ast.Constant) else ""


def test_no_message_has_a_number_before_a_plural_that_may_be_one() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}: {text}" for path in SOURCES for line, text in numbered(ast.parse(path.read_text()))]
    assert found == [], "storage.wording.counted says both"
