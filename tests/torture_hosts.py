"""Where the volumes of `torture_rig` have their hosts: directories, or S3 on a real SeaweedFS, one for all rounds.

An S3 host stands behind a `Line` of its own: a port of this machine that passes everything on to the server, as slowly as it is told to, or
not at all. So sectors are staged, and on their way, when the mount dies, and a host is away without any server being restarted.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tests.engines.fixtures import write_credentials
from tests.engines.seaweedfs import BUCKET, Cluster

_PIECE = 16 * 1024


class TortureHost(Protocol):
    """One host of a volume."""

    @property
    def url(self) -> str: ...

    def shards(self) -> set[str]:
        """Names of all shards it has."""
        ...

    def leave(self) -> None:
        """It cannot be reached until `come_back`."""
        ...

    def come_back(self) -> None:
        """With what it had."""
        ...


class DirectoryHost:
    """A directory. `path`: made if it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def url(self) -> str:
        return f"dir:{self.path}"

    def shards(self) -> set[str]:
        return {str(path) for path in self.path.glob("volumes/*/sectors/*/*")}

    def leave(self) -> None:
        self.path.rename(self.path.with_name("away"))

    def come_back(self) -> None:
        self.path.with_name("away").rename(self.path)


class S3Host:
    """A prefix of a bucket, behind a line."""

    def __init__(self, client: Any, prefix: str, credentials: Path, line: Line) -> None:
        self._client, self._prefix, self.line = client, prefix, line
        self.url = f"s3://{BUCKET}/{prefix}?credentials={credentials}&endpoint=http://127.0.0.1:{line.port}"

    def shards(self) -> set[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self._prefix}/volumes/")
        return {entry["Key"] for page in pages for entry in page.get("Contents", ()) if "/sectors/" in entry["Key"]}

    def leave(self) -> None:
        self.line.cut = True

    def come_back(self) -> None:
        self.line.cut = False


class Line:
    """Passes connections on to `port` of this machine. Both attributes may be set at any time."""

    def __init__(self, port: int) -> None:
        self._to = port
        #: Bytes per second towards the server, over all connections; None: as fast as it goes.
        self.rate: float | None = None
        self._cut = False
        self._sending = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def cut(self) -> bool:
        """Every connection breaks, and none can be made."""
        return self._cut

    @cut.setter
    def cut(self, cut: bool) -> None:
        self._cut = cut
        if cut:
            for end in list(self._open):
                _close(end)

    def close(self) -> None:
        self.cut = True
        _close(self._listening)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if self._cut:
                    _close(client)
                else:
                    threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._to), 10)
        except OSError:
            _close(client)
            return
        server.settimeout(None)
        ends = {client, server}
        self._open |= ends
        back = threading.Thread(target=self._pass, args=(server, client, False), daemon=True)
        back.start()
        self._pass(client, server, True)
        back.join()
        self._open -= ends
        for end in ends:
            end.close()

    def _pass(self, source: socket.socket, target: socket.socket, limited: bool) -> None:
        with suppress(OSError):
            while not self._cut and (data := source.recv(_PIECE)):
                rate = self.rate
                if limited and rate is not None:
                    with self._sending:
                        time.sleep(len(data) / rate)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


class Place(Protocol):
    """Makes hosts."""

    def make(self, number: int) -> TortureHost: ...

    def close(self) -> None:
        """Ends what it started."""
        ...


class Directories:
    """Hosts are directories below `base`."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def make(self, number: int) -> TortureHost:
        path = self._base / f"host{number}"
        path.mkdir()
        return DirectoryHost(path)

    def close(self) -> None:
        return


class SeaweedFS:
    """Hosts are prefixes on a SeaweedFS of its own, which lives as long as this does."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._lines: list[Line] = []
        self._cluster = Cluster.up(base / "s3", tied=True)
        self._credentials = write_credentials(base, "s3", self._cluster.access_key, self._cluster.secret_key)

    def make(self, number: int) -> TortureHost:
        self._lines.append(Line(self._cluster.ports["s3"]))
        return S3Host(self._cluster.client(), f"host{number}", self._credentials, self._lines[-1])

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._cluster.down()


#: What `--hosts` of scripts/torture may say.
PLACES: dict[str, type[Directories] | type[SeaweedFS]] = {"dir": Directories, "s3": SeaweedFS}
