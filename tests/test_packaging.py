"""What a checkout promises whoever installs it: exact versions with hashes from wherever their pip looks, and no trace of our machines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
RUN: list[str] = PROJECT["project"]["dependencies"]
#: Each level of scripts/bootstrap, and what it must hold. A level contains the one before.
LEVELS = {"run": RUN}
for _level, _below in (("engines", "run"), ("test", "engines"), ("lint", "test"), ("measure", "lint"), ("fuzz", "measure")):
    LEVELS[_level] = LEVELS[_below] + EXTRAS[_level]
LOCKS = sorted(path.name for path in (ROOT / "requirements").glob("*.lock"))
#: From [build-system] of pyfuse3's source distribution: it has no wheel.
PYFUSE3_BUILDS_WITH = {"setuptools", "setuptools-scm", "cython"}

# Built from pieces, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(rb"/(?:wor" + rb"k|ho" + rb"me)/[a-z]|/ro" + rb"ot/\.|/op" + rb"t/(?:pypi|wheels)")
INDEX_HOSTS = re.compile(rb"(?:pypi|pythonhosted|deb\.debian|ftp\.debian|security\.debian|npmjs|anaconda)\.(?:or" + rb"g|co" + rb"m)")
ALLOWED_PATHS = re.compile(rb"/home/(?:user|you|me|person)\b")


def tracked_files() -> list[Path]:
    """What is, or with the next `git add -A` will be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip(f"cannot change: not a git checkout: {listed.stderr.decode(errors='replace').strip()}")
    names = [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


class Lock:
    """One parsed lock file: name to exact version, and the hashes of its files."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        self.options: list[str] = []
        self.versions: dict[str, str] = {}
        self.hashes: dict[str, list[str]] = {}
        joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n?", "", self.text))
        for line in filter(None, map(str.strip, joined.splitlines())):
            if line.startswith("-"):
                self.options.append(line)
                continue
            spec, *hashes = line.split("--hash=")
            requirement = Requirement(spec.strip())
            pins = [s.version for s in requirement.specifier if s.operator == "=="]
            assert len(pins) == 1, f"{name}: {spec} is not pinned to one version"
            key = canonicalize_name(requirement.name)
            self.versions[key] = pins[0]
            self.hashes[key] = [h.strip() for h in hashes]


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_requirement_has_hashes(name: str) -> None:
    lock = Lock(name)
    assert lock.versions
    for requirement, hashes in lock.hashes.items():
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_names_no_index(name: str) -> None:
    lock = Lock(name)
    assert lock.options == []
    assert "://" not in lock.text


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_locks_what_pyproject_asks_for(level: str) -> None:
    lock = Lock(f"{level}.lock")
    for wanted in map(Requirement, LEVELS[level]):
        version = lock.versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is not in requirements/{level}.lock: run scripts/lock"
        assert wanted.specifier.contains(version), f"{wanted} is locked at {version}: run scripts/lock"


def test_levels_agree_with_each_other() -> None:
    run, engines, test, lint, measure, fuzz = (Lock(f"{level}.lock").versions for level in LEVELS)
    assert run.items() <= engines.items() <= test.items() <= lint.items() <= measure.items() <= fuzz.items()


def test_what_builds_need_is_locked_too() -> None:
    build = Lock("build.lock").versions
    asked = map(Requirement, PROJECT["build-system"]["requires"])
    assert {"pip"} | PYFUSE3_BUILDS_WITH <= set(build)
    for wanted in asked:
        assert wanted.specifier.contains(build[canonicalize_name(wanted.name)])


def test_the_running_environment_is_the_locked_one() -> None:
    """A test run with other versions than the locked ones says nothing about an installation."""
    from importlib import metadata

    for name, version in Lock("run.lock").versions.items():
        try:
            assert metadata.version(name) == version, f"{name}: run scripts/bootstrap"
        except metadata.PackageNotFoundError:
            assert "marker" in name or name == "colorama", f"{name} is not installed: run scripts/bootstrap"


def test_every_dependency_is_accounted_for() -> None:
    text = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    listed = {canonicalize_name(name) for name in re.findall(r"(?m)^\| `([A-Za-z0-9._-]+)` \|", text)}
    inputs = (ROOT / "requirements").glob("*.in")
    extra = [line for path in inputs for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    asked = {canonicalize_name(Requirement(line).name) for line in [*LEVELS["fuzz"], *extra]}
    assert listed == asked


def test_no_file_names_a_path_of_our_machines_or_an_index() -> None:
    wrong = []
    for path in tracked_files():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            line = ALLOWED_PATHS.sub(b"", line)
            if MACHINE_PATHS.search(line) or INDEX_HOSTS.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line[:120].decode(errors='replace')}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "script",
    [
        "scripts/bootstrap",
        "scripts/quickstart",
        "scripts/test",
        "scripts/lock",
        "scripts/fuzz",
        "scripts/check-bare-debian",
        "scripts/seaweedfs",
        ".ci/run",
    ],
)
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_bootstrap_refuses_an_unknown_level_in_one_line() -> None:
    done = subprocess.run([str(ROOT / "scripts/bootstrap"), "everything"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["fusefs: usage: scripts/bootstrap [run|engines|test|lint|measure|fuzz]"]


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--volume"], ["--frob", "x"]])
def test_quickstart_refuses_wrong_arguments_in_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts/quickstart"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- what tests/conftest.py promises

SKIPS = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason={reason!r})
def test_marked():
    pass

def test_calls():
    pytest.skip({reason!r})

@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail():
    assert False
"""

LEAVES_A_PROCESS = """
import subprocess
import sys

def test_leaves_a_process():
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
"""

LEAVES_A_MOUNT = """
import os, subprocess, sys, time

SERVER = '''
import os, sys
import pyfuse3, trio
class Nothing(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode = inode, 0o40755
        return entry
pyfuse3.init(Nothing(), sys.argv[1], {"fsname=nothing", "subtype=fusefs"})
trio.run(pyfuse3.main)
'''

def test_leaves_a_mount(tmp_path):
    # Without the variable that would give its process away: the mount itself must be found.
    subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], start_new_session=True, env={"PATH": os.environ["PATH"]})
    while not tmp_path.is_mount():
        time.sleep(0.02)
"""


def run_pytest(directory: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another pytest, over one file under our conftest.py."""
    shutil.copy(ROOT / "tests/conftest.py", directory)
    (directory / "test_it.py").write_text(source)
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(directory),
        "--basetemp",
        str(directory / "t"),
    ]
    return subprocess.run(
        command, cwd=directory, env={**inherited, "FUSEFS_TEST_GRACE": "0.2", **environment}, capture_output=True, text=True, check=False
    )


def test_in_ci_a_skip_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SKIPS.format(reason="no time"), CI="true")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("1 failed, 1 passed, 1 xfailed, 1 error")  # the marked one ends in setup: an error
    assert "skipped in CI: 'no time'" in done.stdout


def test_in_ci_a_skip_for_what_ci_cannot_change_is_a_skip(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SKIPS.format(reason="cannot change: the kernel is older"), CI="true")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("1 passed, 2 skipped, 1 xfailed")


def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    assert run_pytest(tmp_path, SKIPS.format(reason="no time")).returncode == 0


def test_in_ci_a_skipped_module_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, 'import pytest\npytest.importorskip("no_such_module")\n', CI="true")
    assert done.returncode not in (0, 5)


def test_a_process_left_behind_fails_the_run_and_is_ended(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, LEAVES_A_PROCESS)
    assert done.returncode == 1
    left = re.search(r"process (\d+): sleep 1000", done.stdout)
    assert left is not None, done.stdout
    command = Path("/proc") / left[1] / "cmdline"
    assert not command.exists() or b"sleep" not in command.read_bytes()


def test_a_busy_machine_fails_no_example() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


def test_a_mount_left_behind_fails_the_run_and_is_taken_away(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, LEAVES_A_MOUNT)
    assert done.returncode == 1, done.stdout
    assert "mounted on " in done.stdout
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
