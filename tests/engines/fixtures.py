"""Servers for tests, started once per pytest process by the first test that asks. They end with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.azure import Azurite
from tests.engines.moto import Moto
from tests.engines.rclone import Rclone
from tests.engines.seaweedfs import BUCKET, Cluster

_numbers = itertools.count()


@dataclass(frozen=True)
class Engine:
    """A service: `bucket` is there. `credentials`: a file for `?credentials=`."""

    name: str
    endpoint: str
    bucket: str
    credentials: Path
    server: Any
    #: boto3's, with all rights, where it speaks S3 well.
    client: Any = None
    scheme: str = "s3"

    def url(self, prefix: str = "") -> str:
        """For a host of its own, each time another."""
        return f"{self.scheme}://{self.bucket}/{prefix or f'host{next(_numbers)}'}?credentials={self.credentials}&endpoint={self.endpoint}"


def write_credentials(directory: Path, name: str, access_key: str, secret_key: str) -> Path:
    path = directory / f"{name}.credentials"
    path.touch(mode=0o600)
    path.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n")
    return path


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("seaweedfs")
    cluster = Cluster.up(directory / "cluster", tied=True)
    try:
        file = write_credentials(directory, "seaweedfs", cluster.access_key, cluster.secret_key)
        yield Engine("seaweedfs", cluster.endpoint, BUCKET, file, cluster, cluster.client())
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("moto")
    server = Moto(directory)
    try:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        file = write_credentials(directory, "moto", server.access_key, server.secret_key)
        yield Engine("moto", server.endpoint, BUCKET, file, server, client)
    finally:
        server.down()


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("rclone")
    server = Rclone(directory, BUCKET)
    try:
        file = write_credentials(directory, "rclone", server.access_key, server.secret_key)
        yield Engine("rclone", server.endpoint, BUCKET, file, server)
    finally:
        server.down()


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("azurite")
    server = Azurite(directory)
    try:
        server.make_container(BUCKET)
        file = directory / "azurite.credentials"
        file.write_text(server.connection_string)
        yield Engine("azurite", server.endpoint, BUCKET, file, server, scheme="az")
    finally:
        server.down()
