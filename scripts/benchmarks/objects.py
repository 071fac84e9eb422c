"""obstore alone, in a process of its own: objects to a bucket, as many at a time as our host for object stores has under way.

    python -m scripts.benchmarks.objects URL COUNT SIZE        prints MiB/s, and deletes what it put

The client is the one that host puts with. The clock runs from when the first is asked for until all are there, as it does where a volume's
staging is looked at, of which nothing is on its way when writing ends. WIDTH others were put before, so that nothing is done for the first
time.
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

    def put(name: str) -> None:
        obstore.put(store, name, data, mode="overwrite", use_multipart=False)

    with ThreadPoolExecutor(WIDTH) as pool:
        try:
            list(pool.map(put, names[:WIDTH]))
            before = time.perf_counter()
            list(pool.map(put, names[WIDTH:]))
            seconds = time.perf_counter() - before
        finally:
            list(pool.map(lambda name: obstore.delete(store, name), names))
    return count * size / 2**20 / seconds


if __name__ == "__main__":
    print(rate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
