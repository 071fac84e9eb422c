"""The command line on a volume that is not mounted, from init to passwd, through the real program."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from storage import VolumeStatus
from tests.cli_runner import PASSPHRASE, environment, fusefs, init


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    init(path)
    return path


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def put(volume: Path, name: str, data: bytes) -> None:
    fusefs("put", volume, "-", name, stdin=data)


# ---------------------------------------------------------------------------------------------------------------- init


def test_init_prints_the_phrase_alone_on_standard_output(tmp_path: Path) -> None:
    result = fusefs("init", "volume", cwd=tmp_path)
    assert re.fullmatch(r"([a-z]+ ){23}[a-z]+\n", result.text)
    assert result.text.strip() not in result.err
    assert "fusefs mount" in result.error_line
    assert stat.S_IMODE((tmp_path / "volume").stat().st_mode) == 0o700


def test_nothing_of_content_or_name_or_passphrase_is_readable_on_a_host(tmp_path: Path) -> None:
    hosts = [tmp_path / name for name in ("a", "b", "c")]
    for host in hosts:
        host.mkdir()
    fusefs("init", tmp_path / "v", "--replication", "2", *(word for host in hosts for word in ("--host", f"dir:{host}")))
    put(tmp_path / "v", "very/secret-name", b"very secret content" * 100)
    stored = [found for host in hosts for found in host.rglob("*") if found.is_file()]
    assert stored
    for found in stored:
        assert b"secret" not in str(found.relative_to(tmp_path)).encode() + found.read_bytes()
    shards = [found for found in stored if found.parent.parent.name == "sectors"]
    # Two copies on two distinct hosts: each name is there exactly twice.
    names = [shard.name for shard in shards]
    assert names
    assert all(names.count(name) == 2 for name in names)


def test_a_relative_host_stays_where_it_was_meant(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    fusefs("init", "volume", "--host", "dir:host", cwd=tmp_path)
    put(tmp_path / "volume", "x", b"data")
    (tmp_path / "other").mkdir()
    assert fusefs("cat", tmp_path / "volume", "x", cwd=tmp_path / "other").out == b"data"


# --------------------------------------------------------------------------------------------------------------- files


def test_put_cat_append_rm_ls(volume: Path, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "local").write_bytes(data)
    fusefs("put", volume, tmp_path / "local", "backups/")
    fusefs("put", volume, tmp_path / "local", "backups/copy")
    fusefs("append", volume, "backups/copy", stdin=b" and more")
    fusefs("append", volume, "log", stdin=b"first\n")
    fusefs("append", volume, "log", tmp_path / "local")
    assert fusefs("ls", volume).out == b"backups/copy\nbackups/local\nlog\n"
    assert fusefs("ls", volume, "backups/l").out == b"backups/local\n"
    assert fusefs("cat", volume, "backups/local", "backups/copy").out == data + data + b" and more"
    assert fusefs("cat", volume, "log").out == b"first\n" + data
    fusefs("rm", volume, "backups/local", "log")
    assert fusefs("ls", volume).out == b"backups/copy\n"
    assert "no such file" in fusefs("cat", volume, "log", expect=3).error_line


def test_put_does_not_replace(volume: Path) -> None:
    put(volume, "x", b"old")
    assert "exists" in fusefs("put", volume, "-", "x", stdin=b"new", expect=4).error_line
    assert fusefs("cat", volume, "x").out == b"old"


def test_rm_removes_what_it_can_and_says_what_it_cannot(volume: Path) -> None:
    put(volume, "a", b"a")
    put(volume, "b", b"b")
    result = fusefs("rm", volume, "missing1", "a", "missing2", "b", expect=3)
    assert [line.startswith("fusefs: ") for line in result.err.splitlines()] == [True, True]
    assert fusefs("ls", volume).out == b""


def test_ls_long_is_plain_text_without_tabs(volume: Path) -> None:
    put(volume, "some name", b"12345")
    line = fusefs("ls", "-l", volume).text
    assert re.fullmatch(r"-rw-r--r-- +5 \d{4}-\d\d-\d\d \d\d:\d\d some name\n", line)


def test_names_are_any_bytes_and_come_out_as_they_are(volume: Path) -> None:
    name = b"odd \xff\n\x1b[31m/\xc3\xa9"
    fusefs("put", volume, "-", name, stdin=b"x")
    assert fusefs("ls", volume).out == name + b"\n"
    assert fusefs("cat", volume, name).out == b"x"
    # A message about it is still one line without control characters.
    assert "\x1b" not in fusefs("put", volume, "-", name, stdin=b"x", expect=4).error_line
    fusefs("rm", volume, name)
    assert fusefs("ls", volume).out == b""


def test_an_empty_file_is_a_file(volume: Path) -> None:
    put(volume, "empty", b"")
    assert fusefs("ls", volume).out == b"empty\n"
    assert fusefs("cat", volume, "empty").out == b""


def test_a_reader_that_goes_away_is_no_error_message(volume: Path) -> None:
    put(volume, "big", bytes(5_000_000))
    child = subprocess.Popen(
        [sys.executable, "-m", "fusefs", "cat", volume, "big"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 128 + signal.SIGPIPE


def test_a_full_disk_behind_the_output_is_an_error(volume: Path) -> None:
    put(volume, "x", b"data")
    with open("/dev/full", "wb") as full:
        for command in (["cat", volume, "x"], ["ls", volume]):
            done = subprocess.run(
                [sys.executable, "-m", "fusefs", *command], stdout=full, stderr=subprocess.PIPE, env=environment(), check=False
            )
            assert done.returncode == 6
            assert done.stderr.startswith(b"fusefs: standard output")
            assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_put_leaves_no_half_file(number: signal.Signals, volume: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "fusefs", "put", volume, "-", "half"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert child.stdin is not None
    assert child.stderr is not None
    child.stdin.write(bytes(3_000_000))
    child.stdin.flush()
    # It holds the volume, so it is past opening it.
    wait_for(lambda: (volume / "lock").read_text().startswith(f"{child.pid} "))
    child.send_signal(number)
    assert child.wait(60) == 128 + number
    assert child.stderr.read() == b"fusefs: interrupted\n"
    child.stdin.close()
    child.stderr.close()
    assert fusefs("ls", volume).out == b""


def test_what_an_interrupted_append_had_appended_stays(volume: Path) -> None:
    put(volume, "log", b"before ")
    child = subprocess.Popen(
        [sys.executable, "-m", "fusefs", "append", volume, "log"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
    )
    assert child.stdin is not None
    child.stdin.write(b"after")
    child.stdin.flush()
    # Looked at without taking the lock: a command that polls could have it at the very moment the child wants it.
    wait_for(lambda: (volume / "lock").read_text().startswith(f"{child.pid} "))
    time.sleep(1.5)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143
    child.stdin.close()
    assert fusefs("cat", volume, "log").out == b"before after"


def test_a_damaged_copy_is_read_from_the_other_host_and_no_wrong_byte_comes_out(tmp_path: Path) -> None:
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
    volume = tmp_path / "volume"
    init(volume, "--replication", "2", "--host", f"dir:{hosts[0]}", "--host", f"dir:{hosts[1]}")
    data = os.urandom(200_000)
    put(volume, "x", data)

    def damage(host: Path) -> None:
        for shard in (found for found in host.rglob("*") if found.is_file() and found.parent.parent.name == "sectors"):
            shard.chmod(0o600)
            raw = bytearray(shard.read_bytes())
            raw[len(raw) // 2] ^= 1
            shard.write_bytes(raw)

    damage(hosts[0])
    assert fusefs("cat", volume, "x").out == data
    damage(hosts[1])
    result = fusefs("cat", volume, "x", expect=9)
    assert data.startswith(result.out)
    assert "sector" in result.error_line


# -------------------------------------------------------------------------------------------------------------- status


def test_status_json_is_the_volume_status(volume: Path) -> None:
    put(volume, "x", b"12345")
    text = fusefs("status", volume, "--json").text
    status = msgspec.json.decode(text, type=VolumeStatus, strict=True)
    assert set(json.loads(text)) == {field.name for field in msgspec.structs.fields(VolumeStatus)}
    assert status.path == str(volume)
    assert status.bytes == 5
    assert status.pending_bytes == 0
    assert len(status.hosts) == 1
    assert len(status.contracts) == 1


def test_status_for_people_is_plain_when_piped(volume: Path) -> None:
    put(volume, "x", bytes(1536))
    text = fusefs("status", volume).text
    assert "\t" not in text
    assert "\x1b" not in text
    assert "1.5 KiB" in text
    assert re.search(r"^pending +nothing", text, re.MULTILINE)
    assert re.search(r"^mounted +no", text, re.MULTILINE)
    assert "warning" not in text


def test_a_host_that_is_gone_is_warned_about_first(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    hosts = [word for name in ("a", "b", "c") for word in ("--host", f"dir:{tmp_path / name}")]
    volume = tmp_path / "volume"
    init(volume, "--replication", "2", *hosts)
    put(volume, "x", b"data")
    (tmp_path / "b").rename(tmp_path / "gone")
    text = fusefs("status", volume).text
    assert text.startswith("warning: ")
    assert str(tmp_path / "b") in text.splitlines()[0]
    assert fusefs("cat", volume, "x").out == b"data"


def test_hosts_and_contracts(volume: Path) -> None:
    put(volume, "x", b"data")
    text = fusefs("hosts", volume).text
    assert f"dir:{volume}/host" in text
    assert "\t" not in text
    long, traffic = fusefs("hosts", "-l", volume).text.split("\n\n")
    assert len(long.splitlines()) == 2 and "hedges won" in long
    (described,) = json.loads(fusefs("hosts", "--json", volume).text)
    # Sectors and metadata of `put` and of the commands since; also over midnight.
    asked = described["days"]
    assert sum(day["requests"] for day in asked) > 5 and sum(day["sent"] for day in asked) > 1000
    assert f"{asked[0]['date']}  " in traffic
    assert described["writes"] > 0 and described["url"] == f"dir:{volume}/host"
    assert fusefs("hosts", volume, "lost", "1", "--json", expect=2).error_line
    (first,) = [line.split()[0] for line in fusefs("contracts", volume).text.splitlines()[1:]]
    second = fusefs("contracts", volume, "conclude", "1", "365").text.strip()
    third = fusefs("contracts", volume, "renew", first, "180").text.strip()
    assert all(re.fullmatch(r"[0-9a-f]{32}", contract) for contract in (first, second, third))
    listed = [line.split()[0] for line in fusefs("contracts", volume, "list").text.splitlines()[1:]]
    assert set(listed) == {first, second, third}
    ends = {c["contract_id"]: c["end_ns"] for c in json.loads(fusefs("status", volume, "--json").text)["contracts"]}
    assert ends[first] < ends[third] < ends[second]
    assert fusefs("contracts", volume, "renew", "0" * 32, "3", expect=3).error_line
    assert fusefs("contracts", volume, "conclude", "dir:/nowhere", "3", expect=3).error_line
    (volume / "host").rename(volume / "away")
    assert fusefs("contracts", volume, "renew", third, "3", expect=10).error_line
    (volume / "away").rename(volume / "host")


def test_a_host_is_marked_lost_and_back(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"h{number}").mkdir()
    volume = tmp_path / "v"
    init(volume, "--host", f"dir:{tmp_path}/h0", "--host", f"dir:{tmp_path}/h1")

    def states() -> list[str]:
        return [host["state"] for host in json.loads(fusefs("status", volume, "--json").text)["hosts"]]

    assert fusefs("hosts", volume, "lost", "2").out == b""
    assert states() == ["ok", "lost"]
    # The last one that is left cannot be.
    assert "last one" in fusefs("hosts", volume, "lost", f"dir:{tmp_path}/h0", expect=2).error_line
    fusefs("hosts", volume, "back", f"dir:{tmp_path}/h1")
    assert states() == ["ok", "ok"]
    assert fusefs("hosts", volume, "lost", "7", expect=3).error_line
    assert fusefs("hosts", volume, "lost", expect=2).error_line


# -------------------------------------------------------------------------------------------------------------- passwd


def test_passwd_changes_the_passphrase_and_says_what_it_cannot_revoke(volume: Path, tmp_path: Path) -> None:
    put(volume, "x", b"data")
    old = (volume / "keys.json").read_bytes()
    result = fusefs("passwd", volume, env={"FUSEFS_NEW_PASSPHRASE": "battery staple"})
    assert "cannot revoke" in result.err
    assert result.out == b""
    assert fusefs("ls", volume, expect=12).error_line
    assert fusefs("cat", volume, "x", env={"FUSEFS_PASSPHRASE": "battery staple"}).out == b"data"
    # What it says: a copy of the old key file opens with the old passphrase.
    (volume / "keys.json").write_bytes(old)
    assert fusefs("cat", volume, "x").out == b"data"


def test_passwd_with_files(volume: Path, tmp_path: Path) -> None:
    for name, text in (("old", PASSPHRASE), ("new", "battery staple\nsecond line")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    fusefs(
        "passwd", volume, "--passphrase-file", tmp_path / "old", "--new-passphrase-file", tmp_path / "new", env={"FUSEFS_PASSPHRASE": None}
    )
    fusefs("ls", volume, env={"FUSEFS_PASSPHRASE": "battery staple"})


@pytest.mark.parametrize(("old", "new", "status"), [("wrong", "battery staple", 12), (PASSPHRASE, "", 2), (PASSPHRASE, None, 2)])
def test_passwd_that_fails_changes_nothing(old: str, new: str | None, status: int, volume: Path) -> None:
    before = (volume / "keys.json").read_bytes()
    assert fusefs("passwd", volume, env={"FUSEFS_PASSPHRASE": old, "FUSEFS_NEW_PASSPHRASE": new}, expect=status).error_line
    assert (volume / "keys.json").read_bytes() == before
