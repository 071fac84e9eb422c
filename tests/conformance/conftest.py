"""Real servers for the host conformance suite."""

from tests.engines.fixtures import moto, seaweedfs

__all__ = ["moto", "seaweedfs"]
