"""What a MetadataStore that writes no journal answers where the others answer for theirs: there is room, and nothing waits for any."""

from __future__ import annotations

from storage.errors import FusefsError


class NoJournal:
    """The base of such stores: the one for reading only, and those in memory. See MetadataStore."""

    def has_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> bool:  # noqa: ARG002 - the Protocol's
        return True

    def can_spare(self, ops_bytes: int) -> bool:  # noqa: ARG002 - the Protocol's
        return True

    @property
    def room_to_spare(self) -> bool:
        return False

    def keep_room(self, ops_bytes: int, tail_bytes: int, tails: int, kept: float) -> None:
        """It takes none."""

    async def catch_up(self, urgent: bool = False) -> None:
        """There is nothing to catch up with."""

    def empties(self) -> None:
        """There is nothing to be emptied."""

    @property
    def overdue(self) -> bool:
        return False

    @property
    def overfull(self) -> bool:
        return False

    def pinned_tails(self) -> list[tuple[int, int]]:
        return []

    @property
    def journal_fill(self) -> float:
        return 0.0

    @property
    def trouble(self) -> FusefsError | None:
        return None
