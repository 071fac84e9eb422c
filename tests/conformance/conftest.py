"""Real servers for the host conformance suite."""

from tests.engines.fixtures import azurite, moto, rclone, seaweedfs

__all__ = ["azurite", "moto", "rclone", "seaweedfs"]
