"""What a change raises that nobody wants any more. See storage/hosts/slots.py."""

from __future__ import annotations

from collections.abc import Callable


class Abandoned(Exception):
    """The caller has given up meanwhile; nothing was changed. Nobody is there to hear it."""


#: Raises Abandoned if nobody wants the change any more.
Wanted = Callable[[], None]
#: What it is given is called when nobody wants the change any more, at once if that is so already; None: nothing is, from now on.
Tell = Callable[[Callable[[], None] | None], None]
