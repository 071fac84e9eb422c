"""Parts of the command line by themselves: sizes, days, names on a terminal, and what becomes of an exception."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path

import click
import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fusefs.cli import app, output, session, status
from fusefs.cli.arguments import Days, Size
from fusefs.cli.output import human_bytes, human_span, printable
from storage import RepairStatus, RewriteStatus, ScrubStatus, StagingStatus, VolumeStatus, errors


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4194304", 4194304),
        ("4MiB", 4 << 20),
        ("4M", 4 << 20),
        ("4 mib", 4 << 20),
        ("4MB", 4_000_000),
        ("64k", 65536),
        ("1.5MiB", 3 << 19),
        ("2GiB", 2 << 30),
    ],
)
def test_a_size_is_exact_in_every_spelling(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "MiB", "-4MiB", "4XiB", "four", "4MiB4", "0.3", "1e6", "0x10", "4,5M", "٤M", "nan", "4\nMiB\n"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_is_refused(text: str) -> None:
    try:
        assert Size().convert(text, None, None) >= 0
    except click.BadParameter:
        return


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e99", "soon", ""])
def test_what_is_no_length_of_a_contract_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Days().convert(text, None, None)


def test_days_may_be_fractions() -> None:
    assert Days().convert("0.5", None, None) == 0.5


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 80, "1048576.0 EiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "1 second"), (90, "90 seconds"), (7199, "119 minutes"), (86400, "24 hours"), (90 * 86400, "90 days")]
)
def test_spans_are_shown_in_one_unit(seconds: float, text: str) -> None:
    assert human_span(seconds) == text


@given(st.binary(max_size=50))
def test_no_file_name_reaches_the_terminal_as_anything_but_printable_text_on_one_line(name: bytes) -> None:
    shown = printable(os.fsdecode(name))
    assert shown.isprintable()
    shown.encode()


@given(st.text(max_size=50))
def test_no_text_reaches_the_terminal_as_anything_but_printable_text_on_one_line(text: str) -> None:
    assert printable(text).isprintable()


def test_escapes_tell_what_was_there() -> None:
    assert printable("a\x1b[31m\nb\udcffc") == "a\\x1b[31m\\nb\\xffc"


# ------------------------------------------------------------------------------------------------- exceptions to lines


def run_raising(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(app, "_run", fail)
    status = app.main([])
    return status, capsys.readouterr().err


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FusefsError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_is_one_line_and_its_exit_status(
    kind: type[errors.FusefsError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(monkeypatch, capsys, kind("no such thing: make it")) == (kind.exit_status, "fusefs: no such thing: make it\n")


def test_an_error_out_of_nested_nurseries_is_the_same_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    group = BaseExceptionGroup("outer", [ExceptionGroup("inner", [errors.Busy("it is busy")])])
    assert run_raising(monkeypatch, capsys, group) == (7, "fusefs: it is busy\n")


def test_a_bug_does_not_hide_behind_an_error_beside_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = run_raising(monkeypatch, capsys, ExceptionGroup("both", [errors.Busy("it is busy"), KeyError("x")]))
    assert status == app.BUG
    assert "bug" in err
    assert "KeyError" in err


def test_a_message_with_line_breaks_and_escapes_stays_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(monkeypatch, capsys, errors.NotFound("no \x1b[2J\nfile"))[1] == "fusefs: no \\x1b[2J\\nfile\n"


def test_ctrl_c_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(monkeypatch, capsys, KeyboardInterrupt()) == (130, "fusefs: interrupted\n")


def test_a_bug_is_said_to_be_one_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FUSEFS_DEBUG", raising=False)
    status, err = run_raising(monkeypatch, capsys, ZeroDivisionError("by zero"))
    assert status == app.BUG
    assert err.count("\n") == 1
    assert "this is a bug in fusefs" in err
    assert "FUSEFS_DEBUG=1" in err


def test_with_fusefs_debug_a_bug_shows_where_it_happened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FUSEFS_DEBUG", "1")
    _, err = run_raising(monkeypatch, capsys, ZeroDivisionError("by zero"))
    assert "Traceback" in err
    assert err.endswith("ZeroDivisionError: by zero\n")


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_behind_standard_output_is_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", FullDisk())
    with pytest.raises(errors.NoSpace, match="standard output"):
        output.write_line("something")


# ------------------------------------------------------------------------------------------------------------- session


def test_run_returns_what_the_work_returns() -> None:
    async def work() -> int:
        await trio.lowlevel.checkpoint()
        return 7

    assert session.run(work) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_work_and_lets_it_clean_up(number: signal.Signals) -> None:
    cleaned = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            cleaned.append(True)

    with pytest.raises(BaseException) as caught:
        session.run(work)
    assert cleaned
    assert app._verdict(caught.value) == (128 + number, "interrupted")


def test_an_error_of_the_work_comes_out() -> None:
    async def work() -> None:
        raise errors.Corrupt("damaged")

    with pytest.raises(BaseException) as caught:
        session.run(work)
    assert app._verdict(caught.value) == (9, "damaged")


@pytest.mark.parametrize(("count", "last"), [(10, "warning: trouble 9"), (11, "... and 1 more (see --json)")])
def test_a_flood_of_warnings_is_cut_for_people(count: int, last: str, capsys: pytest.CaptureFixture[str]) -> None:
    empty: dict[type, object] = {str: "", int: 0, float: 0.0, bool: False, ScrubStatus: ScrubStatus()}
    empty |= {RepairStatus: RepairStatus(), RewriteStatus: RewriteStatus(), StagingStatus: StagingStatus()}
    values = {field.name: empty.get(field.type, []) for field in msgspec.structs.fields(VolumeStatus)}
    # The same one twice counts once.
    now = VolumeStatus(**values | {"warnings": ["trouble 0", *(f"trouble {number}" for number in range(count))]})
    status._show(now, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[9] == "warning: trouble 9"
    assert [line for line in lines if "trouble" in line or line.startswith("...")][-1] == last


def test_a_table_that_is_piped_is_padded_and_without_tabs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output.write_table(("name", "bytes"), [("a", "1"), ("longer", "1000")], right=(1,))
    assert capsys.readouterr().out == "name    bytes\na           1\nlonger   1000\n"
