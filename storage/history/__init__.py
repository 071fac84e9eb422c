"""The volume's history on its hosts: what brings it back when this machine is gone, and says whose it is.

Words

| word | meaning |
|---|---|
| object | a metadata sector: sealed once, never changed, named by epoch, salt and root |
| cut | a moment between two batches of the metadata store |
| entry, delta | what changed between two cuts: newest values of keys, and tail bytes that are in no sector |
| log | the entries since the checkpoint's scan began |
| checkpoint | all records, scanned in slices of different moments; with the log on top, the exact state as of the last cut |
| draft | what is to be published: checkpoint, log, and what of them is *ready* to be named, or *held* |
| superblock | names checkpoint and log, keys, hosts and epochs; a generation of its own each time |
| claim | a superblock that only says that a new epoch has begun |
| lineage, point | a history, and a moment in one; another lineage's superblock is foreign |

Picture

    store.apply --> changes --cut--> log entry --seal--> objects on every host --> superblock there, conditionally --> majority: published
                                         ^                    ^
                 tails not in sectors ---+                    checkpoint, in the background, when the log has outgrown half of the last

Modules: `objects`, `superblock` (formats), `ancestry` (which history goes on from which), `reading` (what a host says), `host_side` (one
host), `log`, `checkpoint`, `draft` (cuts), `publisher` (rounds, fencing, the gate for deletions), `restore` (back into a directory).

Invariants kept here: I1 (objects and superblocks have random nonces), I3 (`Publisher.released_sequence`, `confirm`), I4 (objects before the
superblock that names them, on each host; two generations; tails of an entry are those of its cut), I5 (majority, conditional puts re-read,
fencing; only objects of this lineage are deleted), I7 (changes, unplaced objects and entries are bounded; beyond, a checkpoint does).
"""
