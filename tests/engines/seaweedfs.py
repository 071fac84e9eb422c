"""A small real SeaweedFS cluster on this machine: a master, three volume servers, a filer, an S3 gateway.

    python -m tests.engines.seaweedfs up|down|status [DIRECTORY]        (scripts/seaweedfs)

    DIRECTORY/cluster.json      what was started: processes, ports, keys; readable by its owner alone
    DIRECTORY/log/<server>      what each says
    DIRECTORY/<server>/         its data, which outlives `down`

Everything listens on 127.0.0.1 and on free ports. Each object is kept on two of the volume servers, which stand in racks of their own: with
one of them gone, all is read and written.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.engines.processes import ENDING, end, free_ports, is_running, listens, program, start, wait_for

#: In the order in which they are started.
SERVERS = ("master", "volume0", "volume1", "volume2", "filer", "s3")
BUCKET = "fusefs"
#: Volumes are files of the volume servers; small ones, so that a laptop has room for all that are begun at once.
VOLUME_MB = 256
VOLUMES_EACH = 32


@dataclass
class Cluster:
    """One cluster. `Cluster.up`, then `down`."""

    directory: str
    access_key: str
    secret_key: str
    ports: dict[str, int]
    pids: dict[str, int] = field(default_factory=dict)
    #: It ends with the process that started it.
    tied: bool = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @classmethod
    def up(cls, directory: Path, *, tied: bool = False) -> Cluster:
        """Started and answering, with the bucket BUCKET. What an earlier cluster left in the directory is served again."""
        directory.mkdir(parents=True, exist_ok=True)
        known = cls.load(directory)
        if known is not None and any(known.running().values()):
            raise RuntimeError(f"a cluster runs already in {directory}; scripts/seaweedfs down {directory} ends it")
        if known is not None and not any(map(listens, known.ports.values())):
            # The same endpoint as before: volumes know it.
            ports = known.ports
        else:
            ports = dict(zip([*SERVERS, *(f"{name}.grpc" for name in SERVERS)], free_ports(2 * len(SERVERS)), strict=True))
        cluster = cls(str(directory), f"key{secrets.token_hex(8)}", secrets.token_hex(20), ports, tied=tied)
        if known is not None:
            cluster.access_key, cluster.secret_key = known.access_key, known.secret_key
        try:
            cluster._start()
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def load(cls, directory: Path) -> Cluster | None:
        """The one that was started there, None if none was."""
        try:
            return cls(**json.loads((directory / "cluster.json").read_text()))
        except FileNotFoundError:
            return None

    def running(self) -> dict[str, bool]:
        """Server -> does its process run?"""
        return {name: is_running(pid, self._mark(name)) for name, pid in self.pids.items()}

    def down(self) -> None:
        """End every server; the data stays."""
        # The filer, asked to end, waits for its own subscription to itself. What it has acknowledged the kernel has, and kill -9 leaves it.
        for names, patience in ((("s3",), ENDING), (("filer",), 0.5), (("volume0", "volume1", "volume2", "master"), ENDING)):
            end({self.pids[name]: self._mark(name) for name in names if name in self.pids}, patience)

    def kill(self, name: str) -> None:
        """kill -9 one server."""
        if is_running(self.pids[name], self._mark(name)):
            os.kill(self.pids[name], signal.SIGKILL)

    def start(self, name: str) -> None:
        """Start one server again, on the ports it had, and wait until it answers."""
        self._start_one(name)
        self._wait(name)

    def client(self, **settings: Any) -> Any:
        """A boto3 client with the cluster's keys."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            **settings,
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _mark(self, name: str) -> str:
        """Part of a server's command line and of no other."""
        return f"={self.directory}/{name}" if name != "s3" else f"={self.directory}/s3/s3.json"

    def _address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}.{self.ports[f'{name}.grpc']}"

    def _start(self) -> None:
        identity = {
            "name": "fusefs",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (self.path / "log").mkdir(exist_ok=True)
        (self.path / "s3").mkdir(exist_ok=True)
        self._write("s3/s3.json", {"identities": [identity]})
        for name in SERVERS:
            self._start_one(name)
            # The gateway reads its keys from the filer when it starts; the others wait for each other.
            if name in ("master", "filer"):
                self._wait(name)
        for name in SERVERS:
            self._wait(name)
        self._make_bucket()

    def _start_one(self, name: str) -> None:
        data = self.path / name
        data.mkdir(exist_ok=True)
        here = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-port={self.ports[name]}", f"-port.grpc={self.ports[f'{name}.grpc']}"]
        if name == "master":
            own = [
                "master",
                f"-mdir={data}",
                "-defaultReplication=010",
                f"-volumeSizeLimitMB={VOLUME_MB}",
                "-peers=none",
                "-telemetry=false",
            ]
        elif name == "filer":
            own = ["filer", f"-master={self._address('master')}", f"-defaultStoreDir={data}"]
        elif name == "s3":
            here = ["-ip.bind=127.0.0.1", *here[2:], "-port.iceberg=0", "-port.lance=0"]
            own = ["s3", f"-filer={self._address('filer')}", f"-config={data}/s3.json"]
        else:
            own = ["volume", f"-master={self._address('master')}", f"-dir={data}", f"-rack={name}", f"-max={VOLUMES_EACH}"]
            own += ["-minFreeSpace=1", "-preStopSeconds=0"]
        process = start([program("weed"), "-logtostderr=true", *own, *here], self.path / "log" / name, tied=self.tied)
        self.pids[name] = process.pid
        self._write("cluster.json", asdict(self))

    def _wait(self, name: str) -> None:
        wait_for(lambda: listens(self.ports[name]), f"SeaweedFS {name}", self.path / "log" / name, lambda: self.running()[name])

    def _make_bucket(self) -> None:
        import botocore.config
        import botocore.exceptions

        client = self.client(config=botocore.config.Config(retries={"max_attempts": 1}, connect_timeout=5, read_timeout=20))

        def works() -> bool:
            """The bucket is there, and can be written: the volume servers have said to the master that they are there."""
            try:
                if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="~up", Body=b"x" * 4096)
                client.delete_object(Bucket=BUCKET, Key="~up")
            except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
                return False
            return True

        wait_for(works, "the S3 gateway", self.path / "log/s3", lambda: self.running()["s3"])

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = self.path / name
        path.touch(mode=0o600)
        path.write_text(json.dumps(content, indent=1))


def default_directory() -> Path:
    """Where a cluster stands if nobody says otherwise: one per user, found again by `down`."""
    return Path(tempfile.gettempdir()) / f"fusefs-seaweedfs-{os.getuid()}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/seaweedfs", description="A small SeaweedFS cluster on this machine.")
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("directory", nargs="?", type=Path, default=default_directory(), help="where its data is (default: %(default)s)")
    arguments = parser.parse_args()
    directory: Path = arguments.directory.absolute()
    try:
        cluster = Cluster.load(directory)
        if arguments.action == "up":
            # In a second shell, say, which wants the keys of what runs already.
            say(cluster if cluster is not None and all(cluster.running().values()) else Cluster.up(directory))
            return 0
        if cluster is None:
            print(f"fusefs: no cluster was started in {directory}", file=sys.stderr)
            return 1
        if arguments.action == "down":
            cluster.down()
            print(f"ended; its data is still in {directory}")
            return 0
        running = cluster.running()
        for name, alive in running.items():
            print(f"{name:8} {'runs' if alive else 'does not run'}, process {cluster.pids[name]}, port {cluster.ports[name]}")
        if all(running.values()):
            say(cluster)
        return 0 if all(running.values()) else 1
    except (RuntimeError, OSError) as error:
        print(f"fusefs: {error}", file=sys.stderr)
        return 1


def say(cluster: Cluster) -> None:
    print(f"export AWS_ACCESS_KEY_ID={cluster.access_key}")
    print(f"export AWS_SECRET_ACCESS_KEY={cluster.secret_key}")
    print(f"export FUSEFS_S3='s3://{BUCKET}/one?endpoint={cluster.endpoint}'")


if __name__ == "__main__":
    sys.exit(main())
