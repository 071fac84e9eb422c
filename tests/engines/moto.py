"""moto's server: a strict S3 in memory, for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engines.processes import end, free_ports, is_running, listens, start, wait_for


class Moto:
    """One server. `Moto(directory)` starts it; `down`."""

    access_key = "moto"
    secret_key = "moto-secret"

    def __init__(self, directory: Path) -> None:
        self.port = free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        log = directory / "moto.log"
        self._mark = f"-p{self.port}"
        command = [str(Path(sys.executable).parent / "moto_server"), "-H127.0.0.1", self._mark]
        self.pid = start(command, log).pid
        try:
            wait_for(lambda: listens(self.port), "moto", log, lambda: is_running(self.pid, self._mark))
        except BaseException:
            self.down()
            raise

    def client(self, **settings: Any) -> Any:
        """A boto3 client."""
        import boto3

        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys, **settings)

    def down(self) -> None:
        end({self.pid: self._mark})
