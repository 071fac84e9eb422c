"""Real servers for the tests beside this file."""

from tests.engines.fixtures import moto, seaweedfs

__all__ = ["moto", "seaweedfs"]
