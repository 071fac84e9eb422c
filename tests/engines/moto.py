"""moto's server: a strict S3 in memory, for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engines.processes import end, free_ports, is_running, listens, start, wait_for

#: moto looks at a condition and puts in two steps, with a thread for each request: of two who put at once, both may win. What it stands for
#: takes one after the other.
ONE_AT_A_TIME = """
import threading
from moto import server

turn, plain = threading.Lock(), server.run_simple

def run_simple(host, port, app, **settings):
    def conditions_in_turn(environ, start_response):
        if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
            with turn:
                return app(environ, start_response)
        return app(environ, start_response)

    plain(host, port, conditions_in_turn, **settings)

server.run_simple = run_simple
server.main()
"""


class Moto:
    """One server. `Moto(directory)` starts it; `down`."""

    access_key = "moto"
    secret_key = "moto-secret"

    def __init__(self, directory: Path) -> None:
        self.port = free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        log = directory / "moto.log"
        self._mark = f"-p{self.port}"
        command = [sys.executable, "-c", ONE_AT_A_TIME, "-H127.0.0.1", self._mark]
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
