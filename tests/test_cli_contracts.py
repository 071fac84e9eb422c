"""`fusefs contracts` and `fusefs host prune` through the real command line, on volumes that are mounted and that are not."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli_runner import environment, fusefs
from tests.cli_runner import init as make_volume

#: Days: due after two seconds, ended after three.
SHORT = "0.0000347"


def init(base: Path, *hosts: str, contract: str = "90") -> Path:
    options = [option for host in hosts for option in ("--host", f"dir:{base / host}")]
    make_volume(base / "v", "--replication", str(len(hosts)), "--contract", contract, *options)
    return base / "v"


def contracts(volume: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(fusefs("contracts", volume, "list", "--json").text)["contracts"]
    return found


def set_back(base: Path, host: str) -> None:
    """A host that lost its contracts' records, or was pruned of them."""
    for path in (base / host).glob("volumes/*/contracts/*.json"):
        path.unlink()


def test_the_list_says_ends_in_words_and_which_renews_which(tmp_path: Path) -> None:
    volume = init(tmp_path, "a")
    (first,) = contracts(volume)
    assert first["state"] == "in force" and first["renewed_by"] == ""
    second = fusefs("contracts", volume, "renew", first["contract_id"], "200").text.strip()
    text = fusefs("contracts", volume).text
    lines = text.splitlines()[1:]
    assert re.search(r"in 89 days +renewed by " + second[:8], lines[0]), text
    assert re.search(r"in 199 days +in force", lines[1]), text
    one, two = contracts(volume)
    assert (one["renewed_by"], two["renews"], two["lineage"]) == (second, first["contract_id"], first["contract_id"])


def test_an_unmounted_volume_is_renewed_from_cron(tmp_path: Path) -> None:
    volume = init(tmp_path, "a", "b")
    assert "not due" in fusefs("contracts", volume, "renew", "--all").text
    (tmp_path / "soon").mkdir()
    soon = init(tmp_path / "soon", "c", "d", contract=SHORT)
    time.sleep(3.5)
    text = fusefs("contracts", soon, "renew", "--all").text
    assert len(re.findall("renewed, to", text)) == 2, text
    states = [contract["state"] for contract in contracts(soon)]
    assert sorted(states) == ["ended", "ended", "in force", "in force"]
    assert "ended, renewed by" in fusefs("contracts", soon).text
    outcome = json.loads(fusefs("contracts", soon, "renew", "--all", "--json").text)["hosts"]
    assert [(host["renewed"], host["error"]) for host in outcome] == [(False, ""), (False, "")]


def test_what_cannot_be_renewed_is_said_by_every_command_and_ends_with_1(tmp_path: Path) -> None:
    volume = init(tmp_path, "a", "b", contract=SHORT)
    time.sleep(3.5)
    set_back(tmp_path, "a")
    done = fusefs("contracts", volume, "renew", "--all", expect=1)
    assert f"dir:{tmp_path / 'a'}: not renewed, ended" in done.text
    assert f"dir:{tmp_path / 'b'}: renewed, to" in done.text
    assert done.err == ""
    said = fusefs("status", volume).text
    assert re.search(r"warning: the contract with dir:\S+/a ended on \d{4}-\d\d-\d\d.*conclude a new one", said), said
    (bad,) = [host for host in json.loads(fusefs("status", volume, "--json").text)["hosts"] if host["state"] == "ended"]
    assert bad["url"].endswith("/a")
    assert "not renewed since" in fusefs("contracts", volume).text
    (tmp_path / "mnt").mkdir()
    mounted = fusefs("mount", volume, tmp_path / "mnt")
    try:
        assert re.search(r"warning: the contract with dir:\S+/a ended on", mounted.err), mounted.err
        assert fusefs("contracts", volume, "renew", "--all", expect=1).text.count("not renewed") == 1
        fusefs("contracts", volume, "conclude", "1", "90")
        assert "not due" in fusefs("contracts", volume, "renew", "--all").text
        assert "warning: the contract" not in fusefs("status", volume).text
        (tmp_path / "mnt" / "x").write_bytes(b"data")
        fusefs("flush", tmp_path / "mnt")
    finally:
        fusefs("umount", tmp_path / "mnt")


@pytest.mark.parametrize(
    "arguments",
    [
        ["renew", "--all", "x"],
        ["conclude", "1", "3", "--all"],
        ["list", "--all"],
        ["renew", "x", "3", "--json"],
        ["renew"],
    ],
)
def test_contracts_bad_usage(arguments: list[str], tmp_path: Path) -> None:
    assert fusefs("contracts", tmp_path, *arguments, expect=2).error_line


# ------------------------------------------------------------------------------------------------------------ host prune


def prune(base: Path, *options: str, expect: int = 0) -> dict[str, Any]:
    done = fusefs("host", "prune", f"dir:{base / 'a'}", "--json", *options, expect=expect)
    report: dict[str, Any] = json.loads(done.text)
    return report


def files(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base / "a")) for path in (base / "a" / "volumes").rglob("*") if path.is_file())


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A volume with a file, whose contracts have ended."""
    volume = init(tmp_path, "a", "b", contract=SHORT)
    fusefs("put", volume, "-", "x", stdin=os.urandom(10_000))
    # The put has renewed, for a day: contracts that end now are what the host has.
    for path in (tmp_path / "a").glob("volumes/*/contracts/*.json"):
        if json.loads(path.read_bytes())["renewed_from"] is not None:
            path.unlink()
    time.sleep(3.5)
    return tmp_path


def test_prune_is_dry_unless_told_and_respects_the_grace(ended: Path) -> None:
    before = files(ended)
    (held,) = prune(ended)["volumes"]
    assert (held["verdict"], held["prunable"], held["pruned"], held["shards"]) == ("in grace", False, False, 1)
    assert held["objects"] == len(before) and held["bytes"] > 10_000 and held["contracts"]
    (held,) = prune(ended, "--yes")["volumes"]
    assert not held["pruned"]
    text = fusefs("host", "prune", f"dir:{ended / 'a'}", "--grace", "0").text
    assert "over, to be deleted" in text and "ended" in text and "nothing was deleted; --yes deletes" in text
    assert files(ended) == before
    text = fusefs("host", "prune", f"dir:{ended / 'a'}", "--grace", "0", "--yes").text
    assert "deleted, " in text
    assert files(ended) == []
    assert prune(ended)["volumes"] == []
    # No passphrase was asked for, and the owner goes on with what the other host has.
    assert len(fusefs("cat", ended / "v", "x").out) == 10_000


def test_an_unclear_volume_is_pointed_out_and_goes_by_name_alone(ended: Path) -> None:
    (volume,) = (path.name for path in (ended / "a" / "volumes").iterdir())
    (ended / "a" / "volumes" / volume / "contracts" / "x.json").write_bytes(b"{}")
    report = prune(ended, "--grace", "0", "--yes", expect=1)
    assert report["volumes"][0]["verdict"] == "unclear"
    assert files(ended)
    text = fusefs("host", "prune", f"dir:{ended / 'a'}", "--grace", "0", expect=1).text
    assert "x.json" in text or "no contract" in text
    assert fusefs("host", "prune", f"dir:{ended / 'a'}", "--force", "ab", expect=2).error_line
    assert fusefs("host", "prune", f"dir:{ended / 'a'}", "--force", "ab" * 16, expect=3).error_line
    assert prune(ended, "--grace", "0", "--yes", "--force", volume)["volumes"][0]["pruned"]
    assert files(ended) == []


def test_on_a_terminal_it_asks_and_only_the_word_deletes(ended: Path) -> None:
    def answer(text: str) -> str:
        leader, follower = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "fusefs", "host", "prune", f"dir:{ended / 'a'}", "--grace", "0"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment({"TERM": "dumb"}),
            start_new_session=True,
        ) as child:
            os.close(follower)
            os.write(leader, f"{text}\n".encode())
            said = b""
            try:
                while chunk := os.read(leader, 4096):
                    said += chunk
            except OSError:
                pass  # a terminal whose other end has closed
            assert child.wait(60) == 0, said
        os.close(leader)
        return said.decode()

    before = files(ended)
    for text in ("", "yes", "prune!"):
        assert "type 'prune' to delete" in answer(text)
        assert files(ended) == before
    assert "deleted" in answer("prune")
    assert files(ended) == []


def test_prune_says_what_is_no_host(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert "fusefs-host.json" in fusefs("host", "prune", f"dir:{tmp_path / 'x'}", expect=3).error_line
    assert fusefs("host", "prune", f"dir:{tmp_path / 'nowhere'}", expect=10).error_line
    assert fusefs("host", "prune", str(tmp_path), expect=2).error_line
    assert fusefs("host", "prune", f"dir:{tmp_path}", "--grace", "-1", expect=2).error_line
    assert fusefs("host", expect=2).error_line
    text = fusefs("help", "host", "prune").text
    assert "--grace" in text
    assert "fusefs hosts" in fusefs("help", "host").text
