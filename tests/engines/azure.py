"""azurite: Azure Blob Storage's protocol in memory, for tests. scripts/bootstrap test installs it into `azurite/node_modules`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import urllib.request
from email.utils import formatdate
from pathlib import Path

from tests.engines.processes import end, free_ports, is_running, listens, start, wait_for

PROGRAM = Path(__file__).parent / "azurite/node_modules/azurite/dist/src/blob/main.js"
ACCOUNT = "devstoreaccount1"
#: Not a secret: documented, the same for every emulator of the protocol.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2023-11-03"


class Azurite:
    """One server. `Azurite(directory)` starts it; `down`."""

    def __init__(self, directory: Path) -> None:
        if not PROGRAM.exists():
            raise FileNotFoundError(f"there is no {PROGRAM}: scripts/bootstrap test brings it")
        self.port = free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        log = directory / "azurite.log"
        self._mark = f"--blobPort={self.port}"
        options = ["--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", self._mark]
        self.pid = start(["node", str(PROGRAM), *options], log).pid
        try:
            wait_for(lambda: listens(self.port), "azurite", log, lambda: is_running(self.pid, self._mark))
        except BaseException:
            self.down()
            raise

    @property
    def connection_string(self) -> str:
        return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"

    def make_container(self, name: str) -> None:
        """obstore makes none: one signed request."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": VERSION}
        resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        signed = "PUT\n" + "\n" * 11 + "".join(f"{key}:{value}\n" for key, value in sorted(headers.items())) + resource
        signature = base64.b64encode(hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()).decode()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
        request = urllib.request.Request(f"{self.endpoint}/{name}?restype=container", method="PUT", headers=headers)  # noqa: S310 - our own server
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            if answer.status != 201:
                raise RuntimeError(f"azurite made no container: {answer.status}")

    def down(self) -> None:
        end({self.pid: self._mark})
