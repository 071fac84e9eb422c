"""Bad input on the command line: one line that says what is wrong, the exit status of its kind, nothing made, nothing changed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli_runner import PASSPHRASE, environment, fusefs, init, quick

COMMAND_NAMES = "init mount umount flush status hosts contracts ls put append cat rm passwd worm completion".split()  # noqa: SIM905


def tree(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["--frobnicate"],
        ["init"],
        ["init", "a", "b"],
        ["init", "a", "--frobnicate"],
        ["mount", "a"],
        ["cat", "a"],
        ["ls", ""],
        ["completion", "tcsh"],
        ["contracts", "a", "burn"],
        ["contracts", "a", "conclude"],
        ["contracts", "a", "renew", "id"],
        ["contracts", "a", "renew", "id", "-3"],
        ["contracts", "a", "list", "x"],
        ["help", "frobnicate"],
        ["help", "init", "frobnicate"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = quick(capfd, *arguments, expect=2)
    assert result.out == b""
    assert result.error_line
    assert tree(tmp_path) == []


def test_help_and_version_go_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert fusefs("--version").text.startswith("fusefs ")
    assert "Examples:" in quick(capfd, "init", "--help").text
    assert quick(capfd, "help", "init").text == quick(capfd, "init", "--help").text
    overview = quick(capfd, "help").text
    for command in COMMAND_NAMES:
        assert f"\n  {command} " in overview
        assert "Example" in quick(capfd, "help", command).text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "_FUSEFS_COMPLETE" in quick(capfd, "completion", shell).text


def test_completion_knows_commands_and_options() -> None:
    def complete(words: str, number: str) -> list[str]:
        env = {"_FUSEFS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
        return [line.split(",")[-1] for line in fusefs(env=env).text.splitlines()]

    assert complete("fusefs um", "1") == ["umount"]
    assert "--replication" in complete("fusefs init --re", "2")


# ----------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--replication", "3", "--host", "dir:a", "--host", "dir:b"], "needs 3 hosts"),
        (["--replication", "2"], "needs 2 hosts"),
        (["--replication", "2", "--host", "dir:a", "--host", "dir:a"], "twice"),
        (["--replication", "2", "--host", "dir:a", "--host", "dir:./a"], "a"),
        (["--replication", "2", "--host", "dir:a", "--host", "dir:link"], "a"),
        (["--replication", "0"], "replication"),
        (["--replication", "many"], "replication"),
        (["--replication", "2+1", "--host", "dir:a", "--host", "dir:b"], "needs 3 hosts"),
        (["--replication", "4+2"], "needs 6 hosts"),
        (["--replication", "200+56"], "255"),
        (["--host", "ftp://example.org/x"], "ftp"),
        (["--host", "s3://bucket/x?color=red"], "color"),
        (["--host", "s3://bucket/x?secret_key=12345"], "secret"),
        (["--host", "mem:x"], "mem"),
        (["--host", "nonsense"], "nonsense"),
        (["--host", ""], "host"),
        (["--host", "dir:a", "--host", "ftp://example.org/x"], "ftp"),
        (["--sector-size", "1KiB"], "sector"),
        (["--sector-size", "100001"], "sector"),
        (["--sector-size", "1GiB"], "sector"),
        (["--sector-size", "huge"], "size"),
        (["--contract", "0"], "contract"),
        (["--contract", "nan"], "contract"),
    ],
)
def test_init_refuses_what_makes_no_sense_and_leaves_nothing_behind(options: list[str], says: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    before = tree(tmp_path)
    result = fusefs("init", "volume", *options, cwd=tmp_path, expect=2)
    assert says in result.error_line
    assert result.out == b""
    assert tree(tmp_path) == before


def test_init_refuses_a_directory_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    assert "exists" in fusefs("init", "volume", cwd=tmp_path, expect=4).error_line
    (tmp_path / "file").write_text("mine")
    assert "exists" in fusefs("init", "file", cwd=tmp_path, expect=4).error_line
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "exists" in fusefs("init", "dangling", cwd=tmp_path, expect=4).error_line
    assert "mkdir" in fusefs("init", "no/volume", cwd=tmp_path, expect=3).error_line
    assert "not a directory" in fusefs("init", "file/volume", cwd=tmp_path, expect=2).error_line


def test_init_whose_phrase_cannot_be_printed_leaves_no_volume(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fusefs", "init", "volume"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
    assert done.returncode == 14
    assert b"phrase" in done.stderr
    assert tree(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------- passphrase


def test_without_any_source_the_passphrase_is_a_bad_argument(tmp_path: Path) -> None:
    line = fusefs("init", "volume", cwd=tmp_path, env={"FUSEFS_PASSPHRASE": None}, expect=2).error_line
    assert "--passphrase-file" in line
    assert "FUSEFS_PASSPHRASE" in line
    assert tree(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\nsecond line"])
def test_an_empty_first_line_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(content)
    file.chmod(0o600)
    assert "empty" in fusefs("init", "volume", "--passphrase-file", file, cwd=tmp_path, expect=2).error_line
    assert tree(tmp_path) == ["passphrase"]


def test_an_empty_variable_is_refused_and_does_not_fall_through_to_a_question(tmp_path: Path) -> None:
    assert "empty" in fusefs("init", "volume", cwd=tmp_path, env={"FUSEFS_PASSPHRASE": ""}, expect=2).error_line


def test_a_passphrase_file_that_is_missing_or_no_file(tmp_path: Path) -> None:
    assert "does not exist" in fusefs("init", "volume", "--passphrase-file", "no", cwd=tmp_path, expect=3).error_line
    assert "cannot be read" in fusefs("init", "volume", "--passphrase-file", ".", cwd=tmp_path, expect=2).error_line


def ask(arguments: list[str], answers: list[bytes], cwd: Path, timeout: float = 60) -> tuple[int, bytes]:
    """Run a command with a terminal of its own and answer each question; returns (status, all that the terminal showed)."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(cwd)
            os.execve(sys.executable, [sys.executable, "-m", "fusefs", *arguments], environment({"FUSEFS_PASSPHRASE": None}))  # noqa: S606
        finally:
            os._exit(127)
    # Closing the terminal hangs the child up: nothing is left behind when a test is killed.
    shown, asked, deadline = b"", 0, time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not data:
                break
            shown += data
        while asked < len(answers) and shown.count(b": ") > asked:
            os.write(terminal, answers[asked] + b"\n")
            asked += 1
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown


def test_on_a_terminal_the_passphrase_is_asked_for_twice_and_not_shown(tmp_path: Path) -> None:
    status, shown = ask(["init", "volume"], [b"open sesame", b"open sesame"], tmp_path)
    assert status == 0, shown
    assert b"sesame" not in shown
    fusefs("ls", tmp_path / "volume", env={"FUSEFS_PASSPHRASE": "open sesame"})


def test_two_different_answers_make_no_volume(tmp_path: Path) -> None:
    status, shown = ask(["init", "volume"], [b"open sesame", b"open sesam"], tmp_path)
    assert status == 2
    assert b"differ" in shown
    assert tree(tmp_path) == []


def test_ctrl_c_at_the_question_is_130(tmp_path: Path) -> None:
    status, shown = ask(["init", "volume"], [b"\x03"], tmp_path)
    assert status == 130
    assert b"Traceback" not in shown
    assert tree(tmp_path) == []


# --------------------------------------------------------------------------------------------------------------- volumes


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    init(path)
    return path


@pytest.fixture(scope="module")
def shared_volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that must not change it."""
    path = tmp_path_factory.mktemp("shared") / "volume"
    init(path)
    return path


COMMANDS = [
    ["ls"],
    ["status"],
    ["hosts"],
    ["contracts"],
    ["contracts", "VOLUME", "conclude", "1", "3"],
    ["cat", "VOLUME", "x"],
    ["rm", "VOLUME", "x"],
]


def with_volume(command: list[str], volume: Path) -> list[str]:
    if "VOLUME" not in command:
        return [*command, str(volume)]
    return [str(volume) if word == "VOLUME" else word for word in command]


def content(path: Path) -> dict[str, bytes]:
    """What matters of a volume: all but the lock, whose text is only for messages."""
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file() and found.name != "lock"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_wrong_passphrase_has_a_status_of_its_own_and_changes_nothing(command: list[str], shared_volume: Path) -> None:
    before = content(shared_volume)
    result = fusefs(*with_volume(command, shared_volume), env={"FUSEFS_PASSPHRASE": "wrong horse"}, expect=12)
    assert "passphrase" in result.error_line
    assert result.out == b""
    assert content(shared_volume) == before


def test_a_damaged_key_file_is_told_from_a_wrong_passphrase(volume: Path) -> None:
    keys = volume / "keys.json"
    whole = keys.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"{}", b"\xff" * 100, b"[" * 10000):
        keys.write_bytes(damaged)
        before = content(volume)
        line = fusefs("ls", volume, expect=9).error_line
        assert "keys.json" in line
        assert content(volume) == before
    keys.unlink()
    assert "keys.json" in fusefs("ls", volume, expect=9).error_line
    keys.write_bytes(whole)
    fusefs("ls", volume)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_is_no_volume_is_said_to_be_none(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        assert "volume" in fusefs(*with_volume(command, path), expect=2).error_line
    assert tree(tmp_path) == ["file"]


def test_a_newer_format_is_refused_by_name(volume: Path) -> None:
    config = volume / "volume.json"
    text = config.read_text()
    assert '"format_version": 3' in text
    config.write_text(text.replace('"format_version": 3', '"format_version": 4'))
    before = content(volume)
    line = fusefs("ls", volume, expect=None)
    assert line.status in (2, 9)
    assert "version" in line.error_line
    assert content(volume) == before


def test_local_files_that_cannot_be_put(volume: Path, tmp_path: Path) -> None:
    assert "does not exist" in fusefs("put", volume, tmp_path / "missing", "x", expect=3).error_line
    assert "directory" in fusefs("put", volume, tmp_path, "x", expect=2).error_line
    assert fusefs("ls", volume).out == b""


@pytest.mark.parametrize("name", ["/", "", "a//b", "../x", "a/./b", "x" * 256])
def test_names_that_are_none_are_refused(name: str, shared_volume: Path) -> None:
    assert fusefs("put", shared_volume, "-", name, stdin=b"x", expect=2).error_line
    assert fusefs("ls", shared_volume).out == b""


def test_a_locked_volume_is_busy(volume: Path) -> None:
    # A put that waits for its input holds the volume.
    child = subprocess.Popen(
        [sys.executable, "-m", "fusefs", "put", volume, "-", "x"], stdin=subprocess.PIPE, env=environment(), start_new_session=True
    )
    assert child.stdin is not None
    try:
        deadline = time.monotonic() + 30
        # Looked at without taking the lock: a command that polls could have it at the very moment the child wants it.
        while not (volume / "lock").read_text().startswith(f"{child.pid} ") and time.monotonic() < deadline:
            time.sleep(0.1)
        line = fusefs("ls", volume, expect=7)
        assert str(child.pid) in line.error_line
    finally:
        child.stdin.close()
        assert child.wait(60) == 0
    assert fusefs("cat", volume, "x").out == b""


# ----------------------------------------------------------------------------------- closed descriptors, an early Ctrl-C


def run_in_shell(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """A line of sh, in which "$@" is a fusefs command."""
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "fusefs", *arguments]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False)
    assert b"Traceback" not in done.stderr
    return done


def test_a_closed_standard_output_is_one_line_and_no_file_takes_its_place(volume: Path) -> None:
    fusefs("put", volume, "-", "x", stdin=b"precious")
    for arguments in (["cat", volume, "x"], ["ls", volume], ["ls", "--help"], ["--version"], ["status", volume, "--json"]):
        done = run_in_shell('"$@" >&-', *arguments)
        assert (done.returncode, done.stderr) == (14, b"fusefs: standard output cannot be written: it is closed\n"), arguments
    # Nothing to print, nothing to complain about.
    done = run_in_shell('echo more | "$@" >&-', "append", volume, "x")
    assert (done.returncode, done.stderr) == (0, b"")
    # Descriptor 1 was never one of the volume's files: nothing of what was meant to be printed is in there, or in its way.
    assert all(b"precious" not in data for data in content(volume).values())
    assert fusefs("cat", volume, "x").out == b"preciousmore\n"


def test_a_closed_standard_error_or_input_is_no_traceback(volume: Path) -> None:
    fusefs("put", volume, "-", "x", stdin=b"precious")
    assert run_in_shell('"$@" 2>&-', "cat", volume, "x").stdout == b"precious"
    assert run_in_shell('"$@" 2>&-', "cat", volume, "missing").returncode == 3
    assert run_in_shell('"$@" <&- >&- 2>&-', "cat", volume, "x").returncode == 14
    done = run_in_shell('"$@" <&-', "put", volume, "-", "y")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"standard input" in done.stderr
    assert fusefs("ls", volume).out == b"x\n"


def test_help_and_version_on_a_full_disk_are_no_space() -> None:
    for arguments in (["--version"], ["help"], ["init", "--help"]):
        done = run_in_shell('"$@" >/dev/full', *arguments)
        assert done.returncode == 6
        assert done.stderr.startswith(b"fusefs: standard output cannot be written")


# SIGINT arrives while the command's modules are imported: at the first import of one that is not there yet when `main` begins.
EARLY = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from fusefs.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("fusefs.cli.app", ["--version"]),
        ("click", ["--version"]),
        ("fusefs.cli.status", ["status", "/"]),
        # Nothing is mounted or opened before all is imported.
        ("trio", ["ls", "/"]),
        ("lmdb", ["ls", "/"]),
        ("storage.checking", ["check", "/"]),
        ("storage.recovery", ["recover", "--list", "--host", "dir:/"]),
        ("fusefs.daemon", ["mount", "/", "/"]),
    ],
)
def test_ctrl_c_during_the_imports_is_130_in_one_line(module: str, arguments: list[str]) -> None:
    command = [sys.executable, "-c", EARLY, module, *arguments]
    done = subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"fusefs: interrupted\n")


def test_the_entry_imports_next_to_nothing() -> None:
    # Nothing guards these imports.
    script = "import sys, fusefs.cli; print(*sorted({name.split('.')[0] for name in sys.modules} & {'click', 'trio', 'rich', 'storage'}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment(), timeout=60, check=True)
    assert done.stdout == b"\n"


def test_host_directory_gone_says_which_sectors_need_which_host(tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    init(tmp_path / "volume", "--host", f"dir:{host}")
    fusefs("put", tmp_path / "volume", "-", "x", stdin=b"precious")
    host.rename(tmp_path / "elsewhere")
    line = fusefs("cat", tmp_path / "volume", "x", expect=10).error_line
    assert "sector" in line
    assert str(host) in line
    (tmp_path / "elsewhere").rename(host)
    assert fusefs("cat", tmp_path / "volume", "x").out == b"precious"


def test_a_world_readable_passphrase_file_is_warned_about_and_used(volume: Path, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text(f"{PASSPHRASE}\nmore lines do not matter\n")
    file.chmod(0o644)
    result = fusefs("ls", volume, "--passphrase-file", file, env={"FUSEFS_PASSPHRASE": "wrong"})
    assert "chmod 600" in result.error_line
    file.chmod(0o600)
    assert fusefs("ls", volume, "--passphrase-file", file, env={"FUSEFS_PASSPHRASE": "wrong"}).err == ""
