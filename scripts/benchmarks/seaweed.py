"""A SeaweedFS cluster on this machine, a volume whose only host is a bucket there, and obstore alone beside it.

One cluster for a run: whoever needs it first starts it, the runner ends it. It is the one of `scripts/seaweedfs`, with its data on the disk
that is measured, and ends with this process at the latest.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fusefs.control_client import ControlClient
from scripts.benchmarks.systems import ON_SEAWEEDFS, ROOT, SECONDS, Failed, Fusefs, Unmounted, run
from storage.errors import FusefsError
from storage.sealing import sealed_length

if TYPE_CHECKING:
    from tests.engines.seaweedfs import Cluster

#: Of the volume; what a full one takes on a host is `sealed_length` of it.
SECTOR_SIZE = 4 << 20
#: Seconds between two looks at what is staged, at most, and when it is nearly gone: a look takes the mount a millisecond or two of a core.
SELDOM, OFTEN = 0.25, 0.02


class Seaweed:
    """The cluster of a run. `stop` whatever happens."""

    def __init__(self, base: Path) -> None:
        self._directory = base / "seaweedfs"
        self._cluster: Cluster | None = None

    def started(self) -> Cluster:
        """Running. Failed: SeaweedFS is not to be had, or does not start."""
        if self._cluster is None:
            try:
                from tests.engines.seaweedfs import Cluster

                self._cluster = Cluster.up(self._directory, tied=True)
            except (ImportError, OSError, RuntimeError) as error:
                raise Failed(f"SeaweedFS: {error}") from None
        return self._cluster

    def url(self, prefix: str) -> str:
        """A host there."""
        from tests.engines.seaweedfs import BUCKET

        return f"s3://{BUCKET}/{prefix}?endpoint={self.started().endpoint}"

    def keys(self) -> dict[str, str]:
        """For the environment of who uses it."""
        cluster = self.started()
        return {"AWS_ACCESS_KEY_ID": cluster.access_key, "AWS_SECRET_ACCESS_KEY": cluster.secret_key}

    def version(self) -> str:
        """Of SeaweedFS."""
        return run([Path(sys.executable).parent / "weed", "version"]).strip()

    def stop(self) -> None:
        """Ended, and its data gone."""
        if self._cluster is not None:
            self._cluster.down()
            self._cluster = None
        shutil.rmtree(self._directory, ignore_errors=True)


class FusefsSeaweed(Fusefs):
    """A volume whose only host is the bucket: what is written goes into staging, and from there to it."""

    groups = frozenset({ON_SEAWEEDFS})

    def __init__(self, base: Path, seaweed: Seaweed) -> None:
        super().__init__(base, "fusefs seaweedfs", "1", (), "staging=8G")
        self._seaweed = seaweed

    def make(self) -> None:
        self._hosts = [self._seaweed.url("volume")]
        self._settings = self._seaweed.keys()
        super().make()

    def upload_behind(self) -> float:
        """MiB per second, from now until nothing that is staged is still to be sent."""
        try:
            with ControlClient.connect(self.base / "volume") as client:
                started = time.perf_counter()
                first = now = client.status().volume.staging
                while now.sectors:
                    if now.trouble or time.perf_counter() - started > 4 * SECONDS:
                        raise Failed(f"{now.bytes} bytes stay in staging: {now.trouble or 'they take too long'}")
                    sent, passed = first.bytes - now.bytes, time.perf_counter() - started
                    left = now.bytes * passed / sent if sent > 0 else SELDOM
                    time.sleep(min(max(left / 2, OFTEN), SELDOM))
                    now = client.status().volume.staging
                seconds = time.perf_counter() - started
        except FusefsError as error:
            raise Failed(str(error)) from None
        if not first.bytes:
            raise Failed("everything was sent before writing had ended: write more")
        return first.bytes / 2**20 / seconds

    def settle(self) -> None:
        """What was unlinked is known to the host: nothing of it is sent in the next one's turn."""
        self._fusefs("flush", self.mountpoint)


class ObstoreAlone(Unmounted):
    """The same client, the same bucket, as many objects of the size of sealed sectors at a time; nothing else."""

    name = "obstore alone"
    groups = frozenset({ON_SEAWEEDFS})

    def __init__(self, base: Path, seaweed: Seaweed) -> None:
        super().__init__(base)
        self._seaweed = seaweed

    def make(self) -> None:
        self._seaweed.started()

    def version(self) -> str:
        return self._seaweed.version()

    def upload(self, size: int) -> float:
        """MiB per second of so many bytes."""
        words = [self._seaweed.url("obstore"), str(size // SECTOR_SIZE), str(sealed_length(SECTOR_SIZE))]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return float(run([sys.executable, "-m", "scripts.benchmarks.objects", *words], PYTHONPATH=path, **self._seaweed.keys()))
