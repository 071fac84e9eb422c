"""Host URLs, and opening what they name.

| URL | host |
|---|---|
| `dir:/mnt/disk1` | a directory; a relative path is resolved against the working directory when it is given |
| `mem:name` | in the memory of this process, for tests |

`#domain=rack1` at the end names the failure domain. Characters outside `A-Z a-z 0-9 / . _ - ~ + , = @ :` are percent-encoded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from storage.errors import BadArgument
from storage.hosts.directory import DirectoryHost
from storage.hosts.memory import MemoryHost, memory_content
from storage.interfaces import Host
from storage.seams import Seams

SCHEMES = ("dir", "mem")
#: Known by name so that the answer says what is the matter.
LATER_SCHEMES = ("s3", "gs", "az")
MAX_URL = 4096

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)\Z", re.ASCII | re.DOTALL)
_DOMAIN = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_MEMORY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})", re.ASCII)
_SAFE = "/._-~+,=@:"


@dataclass(frozen=True, slots=True)
class HostURL:
    """A parsed host URL. `str()` is its canonical form; parsing that gives an equal value."""

    scheme: str
    #: `dir`: absolute, normalized path, as the operating system's functions take it. `mem`: the name.
    path: str
    #: Failure domain, "" if none is named.
    domain: str = ""

    @property
    def base(self) -> str:
        """Without the fragment: what the host registry records and messages show."""
        return f"{self.scheme}:{quote(os.fsencode(self.path), safe=_SAFE)}"

    def __str__(self) -> str:
        return f"{self.base}#domain={self.domain}" if self.domain else self.base


def parse_url(text: str, directory: Path | None = None) -> HostURL:
    """Parse a host URL; relative paths are relative to `directory` (default: the working directory). BadArgument says what is wrong."""
    if len(text) > MAX_URL:
        raise BadArgument(f"host URL {text[:60]!r}... has {len(text)} characters, more than {MAX_URL}")
    match = _SCHEME.match(text)
    if match is None:
        raise BadArgument(f"host {text!r} is no URL; for a directory write dir:{text or '/path'}")
    scheme, rest = match[1].lower(), match[2]
    if scheme in LATER_SCHEMES:
        raise BadArgument(f"host URL {text!r}: {scheme}: hosts are not supported by this version; known are {_known()}")
    if scheme not in SCHEMES:
        raise BadArgument(f"host URL {text!r}: unknown scheme {scheme!r}; known are {_known()}")
    rest, _, fragment = rest.partition("#")
    if "?" in rest:
        raise BadArgument(f"host URL {text!r}: {scheme}: hosts take no parameters; a '?' in a path is written %3F")
    domain = _domain(text, fragment)
    name = _unquote(text, rest)
    if scheme == "mem":
        if _MEMORY_NAME.match(name) is None:
            raise BadArgument(f"host URL {text!r}: a mem: host has a name of 1 to 64 letters, digits, '.', '_' or '-'")
        return HostURL(scheme, name, domain)
    return HostURL(scheme, _absolute(text, name, directory), domain)


def _known() -> str:
    return ", ".join(f"{scheme}:" for scheme in SCHEMES)


def _unquote(text: str, quoted: str) -> str:
    if _BAD_ESCAPE.search(quoted):
        raise BadArgument(f"host URL {text!r}: a '%' is followed by two hexadecimal digits, or written %25")
    try:
        # To bytes first: a path need not be UTF-8. Characters that came unquoted are taken as the file system's encoding has them.
        name = os.fsdecode(unquote_to_bytes(os.fsencode(quoted)))
    except UnicodeError:
        raise BadArgument(f"host URL {text!r}: it cannot be encoded for this file system") from None
    if "\0" in name:
        raise BadArgument(f"host URL {text!r}: a path cannot hold a NUL byte")
    return name


def _absolute(text: str, path: str, directory: Path | None) -> str:
    if not path:
        raise BadArgument(f"host URL {text!r} names no directory; write dir:/path")
    if not path.startswith("/"):
        try:
            path = os.path.join(os.getcwd() if directory is None else os.path.abspath(directory), path)
        except OSError as error:
            raise BadArgument(f"host URL {text!r}: the working directory is gone ({error.strerror}); write an absolute path") from None
    # POSIX leaves a meaning to exactly two leading slashes, normpath keeps them, Linux has none.
    return "/" + os.path.normpath(path).lstrip("/")


def _domain(text: str, fragment: str) -> str:
    if not fragment:
        return ""
    key, _, value = fragment.partition("=")
    if key != "domain":
        raise BadArgument(f"host URL {text!r}: unknown fragment {fragment!r}; known is #domain=NAME")
    if _DOMAIN.match(value) is None:
        raise BadArgument(f"host URL {text!r}: a failure domain is 1 to 64 letters, digits, '.', '_' or '-'")
    return value


async def open_host(url: HostURL, seams: Seams, *, create: bool = False) -> Host:
    """The host behind a URL. `create`: a missing directory is made, with its parents. Unavailable if it is not there or cannot be used."""
    if url.scheme == "mem":
        return MemoryHost(url.base, memory_content(url.path))
    return await DirectoryHost.open(url.path, seams, url=url.base, create=create)
