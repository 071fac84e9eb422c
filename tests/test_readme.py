"""The README's example is run as it stands, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.cli_runner import environment, fusefs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs/commands.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    fusefs("init", tmp_path / "demo")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"b'hello\\n'\n{'logs/app': 6}\n"
    # What a program wrote, the command line shows.
    assert fusefs("cat", tmp_path / "demo", "logs/app").out == b"hello\n"


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_scripts_named_are_there() -> None:
    for script in set(re.findall(r"\bscripts/\w+", README)):
        assert (ROOT / script).is_file(), script


def test_commands_named_exist_and_the_reference_has_them_all() -> None:
    names = set(re.findall(r"^  (\w+)  ", fusefs("help").text, re.MULTILINE))
    assert {"init", "mount", "umount"} <= names
    used = set(re.findall(r"\bfusefs ([a-z]+)\b", README)) - {"is"}
    assert used <= names, used - names
    assert set(re.findall(r"`fusefs ([a-z]+)\b", COMMANDS)) >= names


def test_exit_statuses_in_the_reference_are_those_of_the_errors() -> None:
    from storage import errors

    statuses = {kind.exit_status for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FusefsError)}
    listed = {int(number) for row in re.findall(r"^\| ([0-9, ]+) \|", COMMANDS, re.MULTILINE) for number in row.split(",")}
    assert statuses <= listed


def test_tests_named_in_the_documents_are_there() -> None:
    """docs/durability.md says of each promise which test shows it: a test that is renamed or removed must not be leant on."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    there = set(sources).union(*(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE) for text in sources.values()))
    for document in (README, COMMANDS, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("durability.md", "design.md"))):
        named = set(re.findall(r"\btest_\w+", document)) - {"test_"}
        assert named <= there, named - there
