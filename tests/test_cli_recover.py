"""`fusefs recover` through the real command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli_runner import PASSPHRASE, fusefs, init, quick

DATA = bytes(range(256)) * 1000


@dataclass(frozen=True)
class Gone:
    """A volume whose directory is lost."""

    base: Path
    phrase: str

    def host(self, number: int) -> str:
        return f"dir:{self.base / f'host{number}'}"

    def volumes(self, number: int) -> Path:
        return self.base / f"host{number}" / "volumes"


@pytest.fixture
def gone(tmp_path: Path) -> Gone:
    """Two hosts with a file `docs/data` and an empty one; the machine is lost after a flush."""
    hosts = [option for number in range(2) for option in ("--host", f"dir:{tmp_path / f'host{number}'}")]
    phrase = init(tmp_path / "volume", "--replication", "2", *hosts)
    fusefs("put", tmp_path / "volume", "-", "docs/data", stdin=DATA)
    fusefs("put", tmp_path / "volume", "-", "empty", stdin=b"")
    shutil.rmtree(tmp_path / "volume")
    return Gone(tmp_path, phrase)


def test_lists_what_is_there_without_a_passphrase(gone: Gone) -> None:
    no_secret = {"FUSEFS_PASSPHRASE": None}
    result = fusefs("recover", "--list", "--host", gone.host(0), "--host", gone.host(1), env=no_secret)
    header, line = result.text.splitlines()
    assert header.split() == ["VOLUME", "GENERATION", "EPOCH", "WRITTEN", "HOSTS"]
    assert gone.host(0) in line and gone.host(1) in line
    listed = json.loads(fusefs("recover", "--list", "--json", "--host", gone.host(0), env=no_secret).text)
    assert [volume["volume_id"] for volume in listed] == [line.split()[0]]
    assert listed[0]["generation"] > 0


@pytest.mark.parametrize("host", [0, 1])
def test_the_volume_is_back(gone: Gone, host: int) -> None:
    result = fusefs("recover", gone.base / "new", "--host", gone.host(host))
    assert "as of       commit" in result.text and "2 files, 250.0 KiB" in result.text
    assert result.err == ""
    assert fusefs("cat", gone.base / "new", "docs/data").out == DATA
    assert fusefs("ls", gone.base / "new").text.splitlines() == ["docs/data", "empty"]
    fusefs("put", gone.base / "new", "-", "more", stdin=b"more")


def test_the_phrase_from_a_file_and_a_new_passphrase(gone: Gone) -> None:
    (gone.base / "phrase").write_text(gone.phrase + "\n")
    (gone.base / "phrase").chmod(0o600)
    new = {"FUSEFS_PASSPHRASE": None, "FUSEFS_NEW_PASSPHRASE": "another one"}
    fusefs("recover", gone.base / "new", "--host", gone.host(0), "--phrase-file", gone.base / "phrase", env=new)
    assert fusefs("cat", gone.base / "new", "docs/data", env={"FUSEFS_PASSPHRASE": "another one"}).out == DATA
    fusefs("cat", gone.base / "new", "docs/data", env={"FUSEFS_PASSPHRASE": PASSPHRASE}, expect=12)


def test_the_phrase_from_the_environment(gone: Gone) -> None:
    new = {"FUSEFS_PASSPHRASE": None, "FUSEFS_PHRASE": gone.phrase, "FUSEFS_NEW_PASSPHRASE": PASSPHRASE}
    result = json.loads(fusefs("recover", gone.base / "new", "--host", gone.host(0), "--json", env=new).text)
    assert result["files"] == 2 and result["majority"] is True
    assert fusefs("cat", gone.base / "new", "docs/data").out == DATA


def test_says_what_is_degraded(gone: Gone) -> None:
    shutil.rmtree(gone.base / "host1")
    result = fusefs("recover", gone.base / "new", "--host", gone.host(0))
    assert gone.host(1) in result.err
    assert "with too few copies" in result.err
    assert "no majority of the hosts knows of this recovery yet" in result.err


def test_salvage_brings_back_plain_files(gone: Gone) -> None:
    for number in range(2):
        for block in gone.volumes(number).glob("*/superblock.*"):
            block.unlink()
    refused = fusefs("recover", gone.base / "new", "--host", gone.host(0), expect=3)
    assert "--salvage" in refused.error_line
    words = {"FUSEFS_PHRASE": gone.phrase}
    result = fusefs("recover", gone.base / "out", "--host", gone.host(0), "--salvage", "--phrase", env=words)
    assert "1 file," in result.text and "not a volume" in result.text
    assert (gone.base / "out" / "docs" / "data").read_bytes() == DATA


WRONG: list[tuple[list[str], int, str]] = [
    ([], 2, "--host URL"),
    (["--host", "dir:/nowhere/at/all"], 2, "VOLUME"),
    (["NEW", "--host", "nonsense"], 2, "nonsense"),
    (["NEW", "--host", "dir:/nowhere/at/all"], 10, "no host answers"),
    (["NEW", "--host", "HOST", "--passphrase-file", "/nowhere"], 3, "/nowhere"),
    (["NEW", "--host", "HOST", "--volume", "zzzz"], 3, "there is no volume 'zzzz'"),
    (["NEW", "--host", "HOST", "--superblock", "99"], 3, "no superblock '99'"),
    (["NEW", "--host", "HOST", "--keyfile", "k"], 2, "--salvage"),
    (["NEW", "--host", "HOST", "--salvage", "--superblock", "1"], 2, "--salvage"),
    (["HOST_PATH", "--host", "HOST"], 2, "not empty"),
    (["NEW/deeper", "--host", "HOST"], 2, "make it first"),
]


def test_what_is_wrong_is_said_in_one_line(gone: Gone, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    names = {"HOST_PATH": str(gone.base / "host0"), "HOST": gone.host(0), "NEW": str(gone.base / "new")}
    for arguments, status, says in WRONG:
        # In this process, which starts quicker; the variable is taken out each time.
        monkeypatch.setenv("FUSEFS_PASSPHRASE", PASSPHRASE)
        given = [names.get(a, a.replace("NEW/", names["NEW"] + "/")) for a in arguments]
        assert says in quick(capfd, "recover", *given, expect=status).error_line, arguments
        assert not (gone.base / "new").exists(), arguments


def test_a_wrong_passphrase_and_an_existing_volume(gone: Gone) -> None:
    result = fusefs("recover", gone.base / "new", "--host", gone.host(0), env={"FUSEFS_PASSPHRASE": "wrong"}, expect=12)
    assert "passphrase" in result.error_line and not (gone.base / "new").exists()
    fusefs("recover", gone.base / "new", "--host", gone.host(0))
    result = fusefs("recover", gone.base / "new", "--host", gone.host(0), expect=4)
    assert "is a volume already" in result.error_line
    assert fusefs("cat", gone.base / "new", "docs/data").out == DATA


def test_help_names_the_ways(capfd: pytest.CaptureFixture[str]) -> None:
    text = " ".join(quick(capfd, "recover", "--help").text.split())
    for option in ("--list", "--phrase-file", "--salvage", "--superblock"):
        assert option in text
