"""Targets of what people type, and of names in listings."""

from __future__ import annotations

from pathlib import Path

from storage.errors import BadArgument
from storage.hosts.layout import (
    check_name,
    check_prefix,
    check_root,
)
from storage.hosts.urls import parse_url
from storage.keys import master_of_phrase, phrase_of
from storage.replication import parse_replication
from tests.fuzz.frames import MASTER
from tests.fuzz.target import Target, same

_ID = "0123456789abcdef" * 2


def _text(data: bytes) -> str:
    """As an argument of a program comes: any bytes. NUL cannot be in one, but can be in a record."""
    return data.decode("utf-8", "surrogateescape")


def _host_url(data: bytes) -> None:
    url = parse_url(_text(data), Path("/where/it/was"))
    same(parse_url(str(url)), url)
    url.base.encode("ascii")


def _phrase(data: bytes) -> None:
    master = master_of_phrase(_text(data))
    same(master_of_phrase(phrase_of(master)), master)


def _names(data: bytes) -> None:
    text, refused = _text(data), None
    for parse in (check_name, check_prefix, check_root, parse_replication):
        try:
            parse(text)
        except BadArgument as error:
            refused = error
    if refused is not None:
        raise refused


TARGETS = (
    Target(
        "host_url",
        _host_url,
        lambda: [b"dir:/mnt/disk%201#domain=rack1", b"mem:name", b"dir:a/../b", b"s3://bucket/x?y=z", b"dir:%ff\xfe"],
        (BadArgument,),
    ),
    Target("phrase", _phrase, lambda: [phrase_of(MASTER).encode(), phrase_of(bytes(32)).upper().encode()], (BadArgument,), rounds=600),
    Target(
        "names", _names, lambda: [b"volumes/a/superblock.00000000000000000001", b"a/b/", _ID.encode() * 2, b"4+2", b"255"], (BadArgument,)
    ),
)
