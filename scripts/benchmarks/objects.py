"""obstore alone, in a process of its own: objects to a bucket, as many at a time as our host for object stores has under way.

    python -m scripts.benchmarks.objects URL COUNT SIZE        prints MiB/s, and deletes what it put

The client is the one that host puts with. The clock runs from when the first WIDTH objects are there until all are, and counts the COUNT
others: what is under way when it starts counts as still to be sent, as it does where a volume's staging is looked at.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import obstore

from storage.hosts.clients import REQUEST_SECONDS, make_store
from storage.hosts.objectstore import SLOTS
from storage.hosts.urls import parse_url
from storage.sectors.drain import UPLOADS

#: At a time: what the drain sends at most, of which the host lets so many through.
WIDTH = min(SLOTS, UPLOADS)


def rate(url: str, count: int, size: int) -> float:
    """MiB per second."""
    store = make_store(parse_url(url), REQUEST_SECONDS)
    # Not compressible.
    data = os.urandom(size)
    names = [f"alone/{number}" for number in range(count + WIDTH)]
    ended: list[float] = []

    def put(name: str) -> None:
        obstore.put(store, name, data, mode="overwrite", use_multipart=False)
        ended.append(time.perf_counter())

    with ThreadPoolExecutor(WIDTH) as pool:
        try:
            list(pool.map(put, names))
        finally:
            list(pool.map(lambda name: obstore.delete(store, name), names))
    return count * size / 2**20 / (ended[-1] - ended[WIDTH - 1])


if __name__ == "__main__":
    print(rate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
