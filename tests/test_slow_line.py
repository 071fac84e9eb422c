"""A slow line to a remote host: what takes its time is waited for; a local disk as slow is one that does not answer."""

from __future__ import annotations

import pytest
import trio.testing

from storage.errors import Unavailable
from storage.hosts.urls import HostURL
from tests.host_rig import FaultyOpener, Rig


class Far(FaultyOpener):
    def remote(self, url: HostURL) -> bool:
        return True


@pytest.mark.parametrize("far", [True, False])
async def test_what_a_slow_line_takes_is_waited_for_on_remote_hosts_alone(far: bool, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(opener=Far() if far else FaultyOpener())
    contract = await rig.add("mem:slow-line")
    # A shard of 4 MiB takes more than a minute.
    rig.faults(contract).throughput = 60_000.0
    data, sector = bytes(4 * 2**20), rig.sector_id()
    if not far:
        with pytest.raises(Unavailable, match="did not answer"):
            await rig.io.write(contract, data, sector)
        return
    root = await rig.io.write(contract, data, sector)
    assert await rig.io.read(contract, root, sector) == data
