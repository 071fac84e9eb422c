"""`-o`: every option does what it says, and what makes no sense is refused by name."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusefs.mount import volume_options
from fusefs.options import KNOWN, MountOptions, parse_size
from storage.errors import BadArgument


def test_no_option_is_the_default() -> None:
    assert MountOptions.parse([]) == MountOptions.parse(["", " , "]) == MountOptions()
    assert MountOptions().writeback
    assert not MountOptions().xattr


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("ro", "read_only", True),
        ("rw", "read_only", False),
        ("link=deny", "link_denied", True),
        ("link=allow", "link_denied", False),
        ("xattr", "xattr", True),
        ("nowriteback", "writeback", False),
        ("allow_other", "allow_other", True),
        ("noallow_other", "allow_other", False),
        ("cache=64M", "cache_bytes", 64 << 20),
        ("cache=0", "cache_bytes", 0),
        ("commit_interval=0.5", "commit_interval", 0.5),
        ("flush_interval=60", "flush_interval", 60.0),
        ("upload_rate=2M", "upload_rate", 2.0 * (1 << 20)),
        ("repair_rate=64K", "repair_rate", 65536.0),
        ("debug", "debug", True),
        ("noatime,nodev", "passed_on", frozenset({"noatime", "nodev"})),
        ("fsync=local", "writeback", True),
        ("defaults,_netdev,x-systemd.automount", "read_only", False),
    ],
)
def test_an_option_sets_its_setting(text: str, setting: str, value: object) -> None:
    assert getattr(MountOptions.parse([text]), setting) == value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense", "nonsense"),
        ("link", "link"),
        ("link=maybe", "link=maybe"),
        ("cache", "cache"),
        ("cache=", "cache="),
        ("cache=-1", "-1"),
        ("cache=12X", "12X"),
        ("commit_interval=0", "commit_interval"),
        ("commit_interval=nan", "commit_interval"),
        ("upload_rate=100", "4K"),
        ("upload_rate=fast", "fast"),
        ("flush_interval=soon", "flush_interval"),
        ("fsync=never", "fsync=local or fsync=hosts"),
        ("fsync=never", "fsync"),
        ("ro,rw", "contradict"),
        ("xattr,noxattr", "contradict"),
        ("link=deny,link=allow", "contradict"),
        ("cache=1M,cache=2M", "contradict"),
        ("dev,nodev", "contradict"),
        ("allow_other,noallow_other", "contradict"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(BadArgument, match=named) as caught:
        MountOptions.parse(text.split(";"))
    assert "\n" not in str(caught.value)


def test_contradictions_are_found_across_several_o() -> None:
    with pytest.raises(BadArgument, match="contradict"):
        MountOptions.parse(["ro", "rw"])
    assert MountOptions.parse(["ro", "ro"]).read_only


def test_others_may_enter_by_default_only_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not MountOptions().others_allowed
    assert MountOptions.parse(["allow_other"]).others_allowed
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert MountOptions().others_allowed
    assert not MountOptions.parse(["noallow_other"]).others_allowed


def test_the_kernel_checks_permissions_whatever_is_asked_for() -> None:
    for text in ("", "ro,noexec", "xattr"):
        assert {"default_permissions", "fsname=/v", "subtype=fusefs"} <= MountOptions.parse([text]).kernel_options("/v")
    assert "ro" in MountOptions.parse(["ro"]).kernel_options("/v")


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("4k", 4096), ("2M", 2 << 20), ("3GiB", 3 << 30), ("1T", 1 << 40), ("5MB", 5 << 20)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size("cache=", text) == size


@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from(KNOWN), st.sampled_from(["cache=1M", "link=deny"])), max_size=6))
def test_any_text_is_options_or_bad_argument(texts: list[str]) -> None:
    try:
        MountOptions.parse(texts)
    except BadArgument:
        pass


def test_what_is_the_volume_s_reaches_it() -> None:
    text = "cache=1M,staging=2G,flush_interval=3,repair_rate=4M,upload_rate=5M,away_grace=6,scrub_interval=off"
    opened_with = volume_options(MountOptions.parse([text]), "a test")
    assert (opened_with.cache, opened_with.staging, opened_with.flush_interval) == (1 << 20, 2 << 30, 3.0)
    assert (opened_with.repair_rate, opened_with.upload_rate) == (4.0 * (1 << 20), 5.0 * (1 << 20))
    assert (opened_with.away_grace, opened_with.scrub_interval) == (6.0, None)
    assert (opened_with.commit_interval, opened_with.purpose) == (None, "a test")
