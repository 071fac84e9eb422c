"""Named places at which a test may crash, fail or pause the program."""

from __future__ import annotations

from typing import Protocol


class Failpoints(Protocol):
    """What a test puts there."""

    def hit(self, name: str) -> None:
        """Called at the place called `name`, from the event loop or a thread. Usually does nothing."""
        ...


class NoFailpoints:
    """Production: nothing ever fails on purpose."""

    def hit(self, name: str) -> None:  # noqa: ARG002 (the Protocol's)
        return None
