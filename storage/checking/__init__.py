"""Checking a volume nobody has open: its metadata against itself, and against what its hosts hold. Mends what can be derived.

Words:

| word | meaning |
|---|---|
| finding | what is not as it should be, where, what follows from it, what to do. Or a *note*: worth knowing, nothing is wrong |
| repair | one batch that is right by itself: a crash between two of them leaves a volume that another check goes on with |
| set aside | a record nobody can use is not deleted but kept under `L` "check." + its key |
| lost+found | the directory where inodes without a name, and stretches of files behind a loss, are kept: `/lost+found/<inode>` |

Picture:

    check.py         opens the volume (lock, store, hosts; no tasks, and no epoch unless something is repaired), runs the passes in order
    records.py       every record decodes; counters are above what they have handed out
    extents.py       values, extents, garbage; lost extents and sector records are found again on the hosts
    names.py  maps.py    inodes, names, places, links, directories;  file maps, extended attributes, orphans
    sectors.py       live bytes, indexes, marks, holders, the queue of freed sectors
    hosts.py         shards on hosts, contracts, copies;   copies.py, staged.py   made again, on hosts and in staging
    patient.py       what all of them share;   findings.py, scanning.py

Memory: passes scan in slices of some hundred records and look the other side up in the store, which takes microseconds. Where a number
must be summed up over another order of keys (links per inode, live bytes per sector), that is done for a *window* of a million keys at a
time, 24 bytes each, and the other side is scanned once per window (`scanning.Tally`). Findings are handed on as they are made.

Nothing else runs meanwhile: the volume's lock is held. So slices need no snapshot over all of them.
"""

from storage.checking.check import check_volume
from storage.checking.findings import CheckProgress, CheckReport, Finding

__all__ = ["CheckProgress", "CheckReport", "Finding", "check_volume"]
