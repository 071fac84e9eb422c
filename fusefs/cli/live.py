"""Talking to the process that has a volume mounted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from storage.status import VolumeStatus


@dataclass(frozen=True, slots=True)
class Target:
    """What a command was given: a volume, and where it is mounted if it is."""

    volume: Path
    mountpoint: Path | None


def resolve(path: Path) -> Target:
    return Target(path.absolute(), None)


def mountpoint_of(volume: Path) -> Path | None:
    return resolve(volume).mountpoint


def status(target: Target) -> VolumeStatus:
    raise NotImplementedError


def conclude(target: Target, host: str, seconds: float) -> str:
    raise NotImplementedError


def renew(target: Target, contract_id: str, seconds: float) -> str:
    raise NotImplementedError
