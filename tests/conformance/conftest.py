"""Real servers for the host conformance suite, and which of its faults they meet."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.conformance.faulted import FAULTS
from tests.engines.fixtures import azurite, moto, rclone, seaweedfs

__all__ = ["azurite", "moto", "rclone", "seaweedfs"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the tests on a server with a fault, those whose turn it is; FUSEFS_TEST_FAULTS=all: all of them.

    The faults follow one another from test to test, on each server beginning with another one: each server meets each fault several times,
    and each test meets four faults on four servers.
    """
    if os.environ.get("FUSEFS_TEST_FAULTS") != "all":
        seen: Counter[str] = Counter()
        items[:] = [item for item in items if _has_its_turn(item, seen)]


def _has_its_turn(item: pytest.Item, seen: Counter[str]) -> bool:
    """`seen`: how many tests of a server with a fault there were before."""
    kind = str(item.callspec.params.get("reopen")) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""
    server, _, fault = kind.partition(", ")
    if fault not in FAULTS or server not in __all__:
        return True
    seen[kind] += 1
    faults = list(FAULTS)
    return faults[(seen[kind] + __all__.index(server)) % len(faults)] == fault
