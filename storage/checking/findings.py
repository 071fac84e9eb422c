"""Findings: what a check tells. Kinds are for programs, sentences for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from storage.status import LEFT, REPAIRED

#: Findings of one kind that are told one by one; more are counted. A lost host with a million shards is not a million lines.
LISTED = 1000

_REPAIR = "run fusefs check --repair"
_RECOVER = "run check --repair; if that does not help, recover the volume from its hosts"

#: kind -> (what follows from it, what to do about it)
KINDS: Final[dict[str, tuple[str, str]]] = {
    "undecodable": ("what it says is not known", _RECOVER),
    "unknown-record": ("this version does not know what it is for", "use the newer fusefs that wrote it"),
    "counter": ("numbers would be used twice", _REPAIR),
    "epochs": ("sectors cannot be opened", "recover the volume from its hosts"),
    "root-directory": ("nothing can be reached", _REPAIR),
    "dangling-name": ("the name leads nowhere", _REPAIR),
    "lost-name": ("the file cannot be found by its name", _REPAIR),
    "lost-inode": ("its attributes are lost, its content is not", _REPAIR),
    "entry-type": ("directory listings show the wrong type", _REPAIR),
    "place": ("directory listings fail or leave it out", _REPAIR),
    "hint": ("messages and inherited settings go by a wrong path", _REPAIR),
    "links": ("it would be removed too early, or never", _REPAIR),
    "unreachable": ("it takes space and cannot be found", _REPAIR),
    "circle": ("the directories cannot be reached", _REPAIR),
    "directory-names": ("a directory has one parent only", _REPAIR),
    "orphan-mark": ("something in use would be removed at the next mount", _REPAIR),
    "stale-mark": ("the next mount looks for something that is gone", _REPAIR),
    "counts": ("status and df show wrong totals", _REPAIR),
    "xattr": ("the attribute belongs to nothing, or is not listed", _REPAIR),
    "map": ("some bytes of the file are at no place of it, or at two", "read the file, and keep a copy of what is good"),
    "map-bound": ("a crash could put bytes at a wrong place", _REPAIR),
    "unowned-map": ("it takes space and belongs to no file", _REPAIR),
    "shared": ("what is appended to one file shows in the other", "copy both files and remove the originals"),
    "missing-value": ("the file cannot be read", _REPAIR),
    "value-owner": ("sector tables name the wrong file", _REPAIR),
    "unowned-value": ("its bytes take space and belong to no file", _REPAIR),
    "garbage-in-use": ("the content of a file in use would be deleted", _REPAIR),
    "misplaced": ("they stay stored that way", _REPAIR),
    "sealed": ("the file seems shorter than it is", _REPAIR),
    "gap": ("the file is readable up to there only", _REPAIR),
    "bad-extent": ("bytes of the file cannot be read", _REPAIR),
    "unowned-extents": ("they take space and belong to no file", _REPAIR),
    "tail": ("bytes on no host yet cannot be read", "recover the volume from its hosts; what was on no host is lost"),
    "lost-sector": ("what is in it cannot be found", _REPAIR),
    "sector-range": ("its id could be used twice", _REPAIR),
    "live": ("the sector would be deleted too early, or never", _REPAIR),
    "leaked-sector": ("its bytes take space on hosts", _REPAIR),
    "partial-index": ("small sectors are merged wrongly, or never", _REPAIR),
    "copies-index": ("status and repair do not know how many copies there are", _REPAIR),
    "fresh-mark": ("a sector in use would be deleted at the next mount, or the mount fail", _REPAIR),
    "sector-count": ("status shows a wrong number", _REPAIR),
    "holders": ("the shard would be deleted too early", _REPAIR),
    "unknown-holder": ("nothing refers to the shard any more; reclaim takes it away", "nothing needs to be done"),
    "unknown-host": ("the copy cannot be read", "recover the volume from its hosts"),
    "hosts-record": ("hosts cannot be used", "recover the volume from its hosts"),
    "host-away": ("what is on it could not be checked", "bring the host back and check again"),
    "no-contract": ("its owner may reclaim what it holds", "fusefs contracts VOLUME renew ID DAYS, or conclude HOST DAYS"),
    "foreign-history": (
        "another machine has gone on with the volume, and nothing is repaired here",
        "to go on here, fusefs recover into a new directory; to read what only this one has, fusefs mount --read-only",
    ),
    "newer-history": ("a newer fusefs has gone on with the volume, and nothing is repaired here", "use the newer fusefs"),
    "superblock": ("one generation fewer to recover from", "mount the volume: new ones are written"),
    "no-superblock": ("without this directory the volume cannot be recovered", "mount and unmount it: they are written anew"),
    "metadata-object": ("the volume cannot be recovered from this host alone", _REPAIR),
    "lost-metadata": ("that generation cannot be recovered from", "run fusefs check --repair, then mount: they are written anew"),
    "behind": ("it was away", "nothing needs to be done: the next mount brings it up to date"),
    "missing-copy": ("the sector has one copy fewer", _REPAIR),
    "damaged-copy": ("the sector has one copy fewer", _REPAIR),
    "unanswered": ("whether the copy is good is not known", "check again"),
    "few-copies": ("losing one more host may lose it", "bring hosts back or add one, then run fusefs check --repair"),
    "staged-damage": ("hosts have what it is made of", _REPAIR),
    "staged-mark": ("it stays on this machine for ever", _REPAIR),
    "staged-copy": ("it may not get to its hosts", "put back what was removed from there"),
    "unreadable": ("no good copy of some of its bytes can be reached", "bring back a host that is away, or restore the file from a backup"),
    "orphan-shards": ("they take space; reclaim takes away those of this history", "nothing needs to be done"),
    "pending": ("work that the next mount goes on with", "nothing needs to be done"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence in four parts. `note`: nothing is wrong. `repaired`: it was found, and is no more."""

    kind: str
    where: str
    what: str
    consequence: str
    remedy: str
    repaired: bool = False
    note: bool = False

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        if self.repaired:
            return f"{text}; repaired"
        return f"{text}; {self.consequence}: {self.remedy}"


@dataclass(slots=True)
class CheckProgress:
    """How far it is; updated in place. `total` is None where nobody counted."""

    stage: str = ""
    done: int = 0
    total: int | None = None


@dataclass(slots=True)
class CheckReport:
    """What was found, by kind, and what was looked at."""

    found: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    looked_at: Counter[str] = field(default_factory=Counter)
    #: Repairs go here as they happen; the rest is for the caller's `on_finding`.
    on_finding: Callable[[Finding], None] = lambda _finding: None

    @property
    def left(self) -> int:
        """Findings that are still there."""
        return self.found.total() - self.repaired.total()

    @property
    def exit_status(self) -> int:
        """0: nothing found; else REPAIRED or LEFT."""
        return LEFT if self.left else REPAIRED if self.found else 0

    @property
    def unlisted(self) -> int:
        """Findings and notes that were counted and not handed on."""
        return sum(max(0, number - LISTED) for number in (self.found + self.notes).values())

    def add(self, kind: str, where: str, what: str, *, repaired: bool = False, note: bool = False) -> None:
        """Count it and hand it on."""
        consequence, remedy = KINDS[kind]
        (self.notes if note else self.found)[kind] += 1
        if repaired:
            self.repaired[kind] += 1
        if self.found[kind] + self.notes[kind] <= LISTED:
            self.on_finding(Finding(kind, where, what, consequence, remedy, repaired, note))
