"""What the mount needs of a volume. `storage.Volume` is one; tests have others."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from storage import Contractor, FlushProgress, FlushReport, Namespace, Refusal, Seams, VolumeStatus


class Accepting(Protocol):
    """The part of `storage.Values` that decides whether new handles may be cached."""

    def accepting(self) -> bool: ...


class Backing(Protocol):
    """An open volume, as the mount and the control socket use it."""

    @property
    def path(self) -> Path: ...
    @property
    def namespace(self) -> Namespace: ...
    @property
    def values(self) -> Accepting: ...
    @property
    def contractor(self) -> Contractor: ...
    @property
    def seams(self) -> Seams: ...

    async def commit(self) -> None: ...
    async def flush(self, progress: FlushProgress | None = None) -> FlushReport: ...
    async def status(self) -> VolumeStatus: ...
    def record_refusal(self, refusal: Refusal) -> None: ...
