"""Host URLs: what they name, and their one canonical form. `opening` opens it.

| URL | host |
|---|---|
| `dir:/mnt/disk1` | a directory; a relative path is resolved against the working directory when it is given |
| `s3://bucket/prefix` | a bucket of anything that speaks S3 |
| `gs://bucket/prefix` | a bucket of Google Cloud Storage |
| `az://container/prefix` | a container of Azure Blob Storage |
| `mem:name` | in the memory of this process, for tests |

| parameter | of | meaning |
|---|---|---|
| `endpoint=URL` | s3, gs, az | where the service answers, `http://` or `https://`; without it the provider's own |
| `region=NAME` | s3 | the bucket's region, which signatures need |
| `profile=NAME` | s3 | which of the credentials in `~/.aws` |
| `credentials=FILE` | s3, gs, az | a file with the credentials (`storage.hosts.credentials`) |
| `account=NAME` | az | the storage account |
| `lock=MODE` | s3 | Object Lock: `compliance` (usual where the bucket has it), `governance`, or `off` |

Parameters stand after a "?", with "&" between them. A URL is stored in the volume's files and shown: secrets have no place in it, and are
refused without being repeated. `#domain=rack1` at the end names the failure domain. Characters outside
`A-Z a-z 0-9 / . _ - ~ + , = @ :` are percent-encoded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urlsplit

from storage.errors import BadArgument
from storage.hosts.layout import is_component

SCHEMES = ("dir", "s3", "gs", "az", "mem")
#: Parameters by scheme; those of the schemes that have any are object stores.
PARAMETERS = {
    "s3": ("credentials", "endpoint", "lock", "profile", "region"),
    "gs": ("credentials", "endpoint"),
    "az": ("account", "credentials", "endpoint"),
}
#: Values of `lock`: nobody can lift a lock, those with a special right can, nothing is locked.
LOCK_MODES = ("compliance", "governance", "off")
MAX_URL = 4096
#: Characters of a prefix: below it, names of objects have up to 512, and services allow 1024.
MAX_PREFIX = 256

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)\Z", re.ASCII | re.DOTALL)
_DOMAIN = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_MEMORY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}\Z", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9._@+-]{1,128}\Z", re.ASCII)
_SECRET = re.compile(r"key|secret|passw|token|signature|sas|sig\Z", re.ASCII | re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})", re.ASCII)
_SAFE = "/._-~+,=@:"


@dataclass(frozen=True, slots=True)
class HostURL:
    """A parsed host URL. `str()` is its canonical form; parsing that gives an equal value."""

    scheme: str
    #: `dir`: absolute, normalized path, as the operating system's functions take it. `mem`: the name. Object stores: "bucket" or
    #: "bucket/prefix".
    path: str
    #: Failure domain, "" if none is named.
    domain: str = ""
    #: (name, value), by name.
    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def bucket(self) -> str:
        """Of an object store."""
        return self.path.partition("/")[0]

    @property
    def prefix(self) -> str:
        """Of an object store: without slashes around it; "" if none is named."""
        return self.path.partition("/")[2]

    def parameter(self, name: str) -> str | None:
        """Its value, None if it is not given."""
        return dict(self.parameters).get(name)

    @property
    def base(self) -> str:
        """Without the fragment: what the host registry records and messages show."""
        slashes = "//" if self.scheme in PARAMETERS else ""
        query = "&".join(f"{name}={quote(os.fsencode(value), safe=_SAFE)}" for name, value in self.parameters)
        return f"{self.scheme}:{slashes}{quote(os.fsencode(self.path), safe=_SAFE)}{'?' if query else ''}{query}"

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
    if scheme not in SCHEMES:
        raise BadArgument(f"host URL {text!r}: unknown scheme {scheme!r}; known are {_known()}")
    rest, _, fragment = rest.partition("#")
    if scheme in PARAMETERS:
        return _object_store(scheme, rest, fragment, directory)
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
    # A mem: host is gone with the process: nobody is to be led to it.
    return ", ".join(f"{scheme}:" for scheme in SCHEMES if scheme != "mem")


# --------------------------------------------------------------------------------------------------------------------
# Object stores. Messages never repeat what could be a secret: only the scheme, the bucket and names of parameters.


def _object_store(scheme: str, rest: str, fragment: str, directory: Path | None) -> HostURL:
    place, _, query = rest.partition("?")
    if "@" in place:
        raise _secret(scheme, "what stands before '@'")
    if not place.startswith("//"):
        raise BadArgument(f"host URL {scheme}:...: write {scheme}://bucket/prefix")
    shown = f"{scheme}:{place[:100]}"
    path = _unquote(shown, place[2:]).removesuffix("/")
    bucket, _, prefix = path.partition("/")
    if _BUCKET.match(bucket) is None:
        raise BadArgument(f"host URL {shown!r}: {bucket!r} is no name of a bucket: 2 to 63 letters, digits, '.', '_' or '-'")
    if len(prefix) > MAX_PREFIX or (prefix and not all(is_component(part) for part in prefix.split("/"))):
        raise BadArgument(
            f"host URL {shown!r}: a prefix has up to {MAX_PREFIX} characters: letters, digits, '.', '_' and '-', in parts joined by '/'"
        )
    return HostURL(scheme, path, _domain(shown, fragment), tuple(sorted(_parameters(scheme, shown, query, directory).items())))


def _parameters(scheme: str, shown: str, query: str, directory: Path | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, quoted = part.partition("=")
        if name not in PARAMETERS[scheme]:
            if _SECRET.search(name):
                raise _secret(scheme, f"the parameter {name[:40]!r}")
            known = ", ".join(PARAMETERS[scheme])
            raise BadArgument(f"host URL {shown!r}: unknown parameter {name[:40]!r}; known are {known}; a '&' in a value is written %26")
        if name in found:
            raise BadArgument(f"host URL {shown!r}: {name} is given twice")
        value = _unquote(f"{shown}?{name}=...", quoted)
        if not value:
            raise BadArgument(f"host URL {shown!r}: {name} is empty")
        found[name] = _PARSERS[name](scheme, shown, value, directory)
    return found


def _endpoint(scheme: str, shown: str, value: str, _directory: Path | None) -> str:
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadArgument(f"host URL {shown!r}: the endpoint is no URL: {error}") from None
    if "@" in parts.netloc:
        raise _secret(scheme, "what stands before '@' in the endpoint")
    if parts.scheme not in ("http", "https") or not host:
        raise BadArgument(f"host URL {shown!r}: the endpoint begins with http:// or https:// and a name, as in https://s3.example.org:8333")
    if parts.query or parts.fragment or not (value.isascii() and value.isprintable()) or re.search(r"[\s\\]", value):
        raise BadArgument(f"host URL {shown!r}: an endpoint is http(s)://name:port, perhaps with a path, and nothing more")
    netloc = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{netloc}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def _word(_scheme: str, shown: str, value: str, _directory: Path | None) -> str:
    if _WORD.match(value) is None:
        raise BadArgument(
            f"host URL {shown!r}: profile, region and account are names: up to 128 letters, digits, '.', '_', '-', '@' or '+'"
        )
    return value


def _file(_scheme: str, shown: str, value: str, directory: Path | None) -> str:
    return _absolute(shown, os.path.expanduser(value), directory)


def _lock(_scheme: str, shown: str, value: str, _directory: Path | None) -> str:
    if value not in LOCK_MODES:
        raise BadArgument(f"host URL {shown!r}: lock is one of {', '.join(LOCK_MODES)}")
    return value


_PARSERS = {"endpoint": _endpoint, "region": _word, "profile": _word, "account": _word, "credentials": _file, "lock": _lock}


def _secret(scheme: str, what: str) -> BadArgument:
    places = "?profile=NAME, ?credentials=FILE" if scheme == "s3" else "?credentials=FILE"
    return BadArgument(
        f"host URL {scheme}://...: {what} looks like a secret, and a URL is stored and shown; "
        f"name the place where credentials are instead ({places}), or set the usual environment variables"
    )


# --------------------------------------------------------------------------------------------------------------------
# Parts


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
    if path.startswith("~"):
        # What a person means is the home directory, which a shell puts there only at the beginning of a word.
        raise BadArgument(
            f"host URL {text!r}: no shell replaces a '~' behind dir: write dir:$HOME/..., or dir:./~... for a directory of that name"
        )
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
