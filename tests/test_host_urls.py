"""Host URLs: every text is a URL with one canonical form, or refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadArgument, Unavailable
from storage.hosts.directory import DirectoryHost
from storage.hosts.memory import MemoryHost
from storage.hosts.opening import open_host
from storage.hosts.urls import HostURL, parse_url
from tests.fakes import make_seams


@pytest.mark.parametrize(
    ("text", "path", "domain", "canonical"),
    [
        ("dir:/mnt/disk1", "/mnt/disk1", "", "dir:/mnt/disk1"),
        ("dir:/mnt/disk1#domain=rack1", "/mnt/disk1", "rack1", "dir:/mnt/disk1#domain=rack1"),
        ("DIR:/mnt//disk1/", "/mnt/disk1", "", "dir:/mnt/disk1"),
        ("dir:///mnt/disk1", "/mnt/disk1", "", "dir:/mnt/disk1"),
        ("dir://mnt", "/mnt", "", "dir:/mnt"),
        ("dir:/a/./b/../c", "/a/c", "", "dir:/a/c"),
        ("dir:/with%20blank/%23/%25", "/with blank/#/%", "", "dir:/with%20blank/%23/%25"),
        ("dir:/with blank/ä", "/with blank/ä", "", "dir:/with%20blank/%C3%A4"),
        ("dir:/%ff", "/\udcff", "", "dir:/%FF"),
        ("dir:sub/dir", "/base/sub/dir", "", "dir:/base/sub/dir"),
        ("dir:.", "/base", "", "dir:/base"),
        ("dir:/a#", "/a", "", "dir:/a"),
        ("mem:one", "one", "", "mem:one"),
        ("mem:one#domain=a-b", "one", "a-b", "mem:one#domain=a-b"),
        ("s3://bucket", "bucket", "", "s3://bucket"),
        ("S3://bucket/", "bucket", "", "s3://bucket"),
        ("s3://bucket/a/b/#domain=x", "bucket/a/b", "x", "s3://bucket/a/b#domain=x"),
        (
            "s3://bucket?region=eu-1&endpoint=HTTP://Host.example:80/#domain=x",
            "bucket",
            "x",
            "s3://bucket?endpoint=http://host.example:80&region=eu-1#domain=x",
        ),
        ("s3://b1/p?endpoint=https%3A%2F%2Fhost", "b1/p", "", "s3://b1/p?endpoint=https://host"),
        ("s3://b1?endpoint=http://[::1]:9000", "b1", "", "s3://b1?endpoint=http://%5B::1%5D:9000"),
        ("s3://b1?profile=a.b@c&credentials=keys%26more", "b1", "", "s3://b1?credentials=/base/keys%26more&profile=a.b@c"),
        ("gs://b1/p?credentials=/etc/key.json", "b1/p", "", "gs://b1/p?credentials=/etc/key.json"),
        ("az://c1/p?account=me", "c1/p", "", "az://c1/p?account=me"),
    ],
)
def test_what_urls_mean(text: str, path: str, domain: str, canonical: str) -> None:
    url = parse_url(text, Path("/base"))
    assert (url.path, url.domain, str(url)) == (path, domain, canonical)
    assert parse_url(canonical) == url


def test_a_relative_path_in_a_directory_that_is_gone_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(BadArgument, match="working directory is gone"):
        parse_url("dir:disk1")
    assert parse_url("dir:/disk1").path == "/disk1"


def test_relative_paths_are_resolved_where_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_url("dir:disk").path == str(tmp_path / "disk")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no URL"),
        ("/mnt/disk1", "dir:/mnt/disk1"),
        ("disk1", "dir:disk1"),
        ("ftp://host/x", "known are dir:, s3:, gs:, az:"),
        ("s3:bucket", "s3://bucket/prefix"),
        ("s3://", "no name of a bucket"),
        ("s3://b", "2 to 63"),
        ("s3://b_ucket//x", "prefix"),
        ("s3://bucket/a b", "prefix"),
        ("s3://bucket/../x", "prefix"),
        ("s3://bucket/" + "x/" * 200, "prefix"),
        ("s3://bucket?endpoint=x", "http://"),
        ("s3://bucket?endpoint=ftp://x", "http://"),
        ("s3://bucket?endpoint=http://", "http://"),
        ("s3://bucket?endpoint=http://x:99999", "endpoint"),
        ("s3://bucket?endpoint=http://x?a=b", "nothing more"),
        ("s3://bucket?endpoint=http://x%20y", "nothing more"),
        ("s3://bucket?region=", "region is empty"),
        ("s3://bucket?region=a%20b", "128 letters"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?color=red", "known are credentials, endpoint, lock, profile, region"),
        ("s3://bucket?account=x", "unknown parameter 'account'"),
        ("gs://bucket?profile=x", "known are credentials, endpoint"),
        ("az://bucket?region=x", "known are account, credentials, endpoint"),
        ("s3://bucket#rack1", "domain=NAME"),
        ("dir:", "no directory"),
        ("dir:~/disk1", "dir:$HOME/"),
        ("dir:~somebody", "dir:./~"),
        ("dir:/a?b=c", "%3F"),
        ("dir:/a%", "%25"),
        ("dir:/a%zz", "%25"),
        ("dir:/a%00b", "NUL"),
        ("dir:/a\0b", "NUL"),
        ("dir:/a#rack1", "domain=NAME"),
        ("dir:/a#domain=", "failure domain"),
        ("dir:/a#domain=a/b", "failure domain"),
        ("mem:", "name"),
        ("mem:a/b", "name"),
        ("dir:/" + "x" * 5000, "characters"),
    ],
)
def test_what_is_no_host_url_is_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(BadArgument) as caught:
        parse_url(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIA:HIDE@bucket/x",
        "s3://AKIA:HIDE@bucket/x?region=a",
        "s3://bucket?access_key_id=HIDE",
        "s3://bucket?secret=HIDE",
        "s3://bucket?region=a&session-token=HIDE",
        "s3://bucket?PASSWORD=HIDE",
        "gs://bucket?api_key=HIDE",
        "az://container?sas=HIDE",
        "az://container?account=a&sig=HIDE",
        "s3://bucket?endpoint=http://me:HIDE@host",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadArgument, match="looks like a secret") as caught:
        parse_url(text)
    assert "HIDE" not in str(caught.value)
    assert "credentials=FILE" in str(caught.value)


@given(
    st.text(st.characters(), max_size=60)
    | st.builds("dir:{}".format, st.text(max_size=60))
    | st.builds("mem:{}".format, st.text())
    | st.builds("{}://b1{}".format, st.sampled_from(["s3", "az", "gs"]), st.text(max_size=40))
)
def test_any_text_parses_to_a_canonical_url_or_is_refused(text: str) -> None:
    try:
        url = parse_url(text)
    except BadArgument:
        return
    assert parse_url(str(url)) == url
    assert parse_url(url.base).base == url.base
    assert str(url).isascii()


@given(st.binary(min_size=1, max_size=60).filter(lambda raw: 0 not in raw))
def test_every_path_can_be_written_as_a_url(raw: bytes) -> None:
    path = "/" + os.path.normpath("/" + os.fsdecode(raw)).lstrip("/")
    url = HostURL("dir", path)
    assert parse_url(str(url)) == url


async def test_urls_are_opened(tmp_path: Path) -> None:
    url = parse_url(f"dir:{tmp_path}/with%20blank#domain=x")
    with pytest.raises(Unavailable, match="with%20blank"):
        await open_host(url, make_seams())
    host = await open_host(url, make_seams(), create=True)
    assert isinstance(host, DirectoryHost)
    assert host.url == f"dir:{tmp_path}/with%20blank"
    assert (tmp_path / "with blank").is_dir()
    one = await open_host(parse_url("mem:same"), make_seams())
    two = await open_host(parse_url("mem:same"), make_seams())
    assert isinstance(one, MemoryHost)
    await one.put("a", b"1")
    assert await two.get("a", 1) == b"1"
