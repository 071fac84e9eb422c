"""What is thought of a host by its copies: whether so many are bad that it counts as failing, or turn bad again as they are put right.

A host whose copies turn bad again is *stubborn*: it is left alone, but for one copy at a time and with a pause. Neither is for ever: what
was seen is forgotten where nothing more is.
"""

from __future__ import annotations

from collections import Counter

from storage.seams import Seams

#: So many copies in a row that were put right and are bad again make a host stubborn; seconds, at least, between two of its copies then.
STUBBORN = 3
STUBBORN_PAUSE = 10.0
#: Seconds without another one after which they are forgotten: where all copies have gone to other hosts, none can show that it is well.
FORGIVEN = 3600.0
#: A host is failing if, of at least so many copies looked at lately, more than half were bad; counts are halved at `WINDOW`, and forgotten
#: where no copy was looked at for so many intervals of the scrub: then there is none, unless hosts were away.
FEW = 8
WINDOW = 64
PASSES = 2


class Trust:
    """In hosts, by number. Nothing is awaited, and nothing is kept on any disk."""

    def __init__(self, seams: Seams, interval: float) -> None:
        """`interval`: seconds in which the scrub looks at every copy, or would."""
        self._clock = seams.clock
        self._forgets = max(PASSES * interval, FORGIVEN)
        #: Host -> copies in a row that were bad again after they had been put right.
        self._relapses: Counter[int] = Counter()
        #: Host -> monotonic time of the last of them; and, of a stubborn one, until when it is left alone.
        self._relapsed_at: dict[int, float] = {}
        self._pausing: dict[int, float] = {}
        #: Host -> [copies looked at, bad ones] lately; and monotonic time of the last of them.
        self._seen: dict[int, list[int]] = {}
        self._seen_at: dict[int, float] = {}

    def looked(self, host: int, *, bad: bool) -> None:
        """A copy there was looked at."""
        seen = self._seen.setdefault(host, [0, 0])
        seen[0] += 1
        seen[1] += bad
        self._seen_at[host] = self._clock.monotonic()
        if seen[0] >= WINDOW:
            seen[:] = [seen[0] // 2, seen[1] // 2]

    def relapsed(self, host: int) -> None:
        """A copy was put right there, and is bad again."""
        self._relapses[host] += 1
        self._relapsed_at[host] = self._clock.monotonic()

    def kept(self, host: int) -> None:
        """A copy was put right there, and stays so."""
        self._relapses.pop(host, None)

    def failing(self, host: int) -> str:
        """Why the host counts as failing; "" if it does not."""
        if self._clock.monotonic() - self._seen_at.get(host, 0.0) >= self._forgets:
            self._seen.pop(host, None)
        looked, bad = self._seen.get(host, (0, 0))
        if self.stubborn(host):
            return f"what is put right there is bad again ({self._relapses[host]} times in a row)"
        return f"{bad} of the last {looked} copies looked at there were bad" if looked >= FEW and 2 * bad > looked else ""

    def stubborn(self, host: int) -> bool:
        """See the module."""
        if self._clock.monotonic() - self._relapsed_at.get(host, 0.0) >= FORGIVEN:
            self._relapses.pop(host, None)
        return self._relapses[host] >= STUBBORN

    def takes_turn(self, host: int) -> bool:
        """May a copy there be put right now? If so, the host's next pause begins, should it be stubborn."""
        if not self.stubborn(host):
            return True
        now = self._clock.monotonic()
        if self._pausing.get(host, 0.0) > now:
            return False
        self._pausing[host] = now + STUBBORN_PAUSE
        return True
