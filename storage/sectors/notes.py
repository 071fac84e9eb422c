"""Notes: what went wrong lately and was survived, for `status`, for as long as it is so."""

from __future__ import annotations

from collections.abc import Iterator

#: So many at most; the oldest go.
KEPT = 50

#: What a note is about: a sector's copies (0), or its copy on a host.
About = tuple[int, int]


class Notes:
    """Each text once, in the order in which they came."""

    def __init__(self) -> None:
        self._notes: dict[str, About] = {}

    def add(self, text: str, sector_id: int, host: int = 0) -> None:
        """About a sector's copies, or its copy on a host."""
        if text not in self._notes and len(self._notes) >= KEPT:
            del self._notes[next(iter(self._notes))]
        self._notes.setdefault(text, (sector_id, host))

    def settle(self, sector_id: int, host: int = 0) -> None:
        """What was said of them is not so any more."""
        about = (sector_id, host)
        if about in self._notes.values():
            self._notes = {text: it for text, it in self._notes.items() if it != about}

    def __iter__(self) -> Iterator[str]:
        return iter(self._notes)
