"""Servers for tests, started once per pytest process by the first test that asks. They end with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.moto import Moto
from tests.engines.seaweedfs import BUCKET, Cluster

_numbers = itertools.count()


@dataclass(frozen=True)
class Engine:
    """An S3 service: `bucket` is there. `credentials`: a file for `?credentials=`."""

    name: str
    endpoint: str
    bucket: str
    credentials: Path
    #: boto3's, with all rights.
    client: Any
    server: Any

    def url(self, prefix: str = "") -> str:
        """For a host of its own, each time another."""
        return f"s3://{self.bucket}/{prefix or f'host{next(_numbers)}'}?credentials={self.credentials}&endpoint={self.endpoint}"


def write_credentials(directory: Path, name: str, access_key: str, secret_key: str) -> Path:
    path = directory / f"{name}.credentials"
    path.touch(mode=0o600)
    path.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n")
    return path


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("seaweedfs")
    cluster = Cluster.up(directory / "cluster")
    try:
        file = write_credentials(directory, "seaweedfs", cluster.access_key, cluster.secret_key)
        yield Engine("seaweedfs", cluster.endpoint, BUCKET, file, cluster.client(), cluster)
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("moto")
    server = Moto(directory)
    try:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        yield Engine(
            "moto", server.endpoint, BUCKET, write_credentials(directory, "moto", server.access_key, server.secret_key), client, server
        )
    finally:
        server.down()
