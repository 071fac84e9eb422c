"""Real servers for the tests beside this file."""

from tests.engines.fixtures import azurite, moto, rclone, seaweedfs

__all__ = ["azurite", "moto", "rclone", "seaweedfs"]
