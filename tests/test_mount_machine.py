"""A Hypothesis state machine does the same to a mount and to a local directory; everything must be equal, overwrites aside."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounting import Mounted, mounting_in
from tests.posix_machine import run_machine


@pytest.mark.parametrize("options", ["commit_interval=1,flush_interval=1", "nowriteback,commit_interval=600"])
@pytest.mark.timeout(400)
def test_a_mount_does_what_a_local_directory_does(options: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small sectors and a short flush_interval: files are cut, packed and merged while they are used."""
    local = tmp_path_factory.mktemp("model")
    numbers = itertools.count()
    with mounting_in(tmp_path_factory.mktemp("machine")) as mounting:
        mounting.volume(sector_size=65536)
        current: list[Mounted] = [mounting.mount(options)]

        def remount() -> None:
            current[0].unmount()
            current[0] = mounting.mount(options)

        def fresh() -> tuple[Path, Path, Callable[[], None]]:
            name = f"run{next(numbers)}"
            pair = (current[0].path / name, local / name)
            for path in pair:
                path.mkdir()
            return *pair, remount

        run_machine(fresh, examples=3, steps=40)
        assert "Traceback" not in current[0].logged()
