"""`rclone serve s3`: an S3 face on a directory, as it could be on SFTP, WebDAV and some 70 other services."""

from __future__ import annotations

from pathlib import Path

from tests.engines.processes import end, free_ports, is_running, listens, program, start, wait_for


class Rclone:
    """One server over `directory`/data, in which each directory is a bucket. `down`."""

    access_key = "rclone-key"
    secret_key = "rclone-secret"

    def __init__(self, directory: Path, bucket: str) -> None:
        self.port = free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        log = directory / "rclone.log"
        (directory / "data" / bucket).mkdir(parents=True)
        self._mark = f"--addr=127.0.0.1:{self.port}"
        command = [program("rclone"), "serve", "s3", str(directory / "data"), self._mark, f"--auth-key={self.access_key},{self.secret_key}"]
        # No configuration of the person who runs the tests.
        self.pid = start([*command, f"--config={directory}/rclone.conf"], log).pid
        try:
            wait_for(lambda: listens(self.port), "rclone", log, lambda: is_running(self.pid, self._mark))
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        end({self.pid: self._mark})
