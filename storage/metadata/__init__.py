"""The metadata store: every layer's records, read in microseconds, durable with one flush.

Words

| word | meaning |
|---|---|
| batch | changes that become visible together and durable together |
| pending | applied, visible, not in a commit yet |
| commit | all that was pending when it was taken, under one sequence number; atomic |
| group commit | whoever asks for a commit while one is being written shares the next one |
| record | what the journal holds of a commit: one, or several where its tails are many bytes |
| segment | one preallocated file of the journal; belongs to one epoch; written once, front to back, then reused as a new one |
| spare, prepared | a segment file nobody needs; one that is ready to be written |
| memtable | the changes LMDB does not have yet: an active layer and, while LMDB takes it over, a frozen one |
| takeover | writing the frozen layer into LMDB in one transaction, from a thread of its own |
| chain | BLAKE3 over each record and all before it; goes on across segments |

Picture

    apply --> active layer --freeze--> frozen layer --takeover thread--> LMDB        get, scan: the three, newest first
         \\                                                              | sequence number it holds
          pending --commit--> journal thread: seal tails, hash, pwritev, fdatasync --> segments, recycled oldest first

Modules: `keys` (who owns which prefix), `records` (the journal's format), `segments` (its files), `journal` (writing it), `blocks` (small
commits past the page cache), `flushing` (who waits for the disk), `replay` (reading it after a crash), `memtable`, `lmdb_base`, `pending`
(what is in no commit yet), `rounds` (who waits for which commit), `committer` (the task that makes them), `room` (in the journal: is there
enough, and waiting for it), `takeover` (the task that moves what is durable on and makes room), `ballast` (room to give when the disk is
full), `store` (all of it behind MetadataStore), `opening` (of it), `read_only` (a store in which nothing changes), `no_journal` (what
stores without a journal answer), `counters` (ids never used twice).

Invariants kept here

- A commit is acknowledged only after fdatasync of all its records; one at a time is being written, so a crash tears at most the last.
- LMDB holds a prefix of the durable commits: a layer is taken over only once its last commit is durable.
- A segment is recycled only once LMDB holds its commits and no tail in it is needed (I3), oldest first, and never the newest.
- What follows the end of the log in a segment never counts again: the chain goes through the header of each segment, which has the
  epoch's salt, so no record of an earlier life of the file fits. A gap or damage before a later valid record is Corrupt, never skipped.
- (key, nonce) of a sealed tail is used once (I1): the key is the epoch's, the counter only goes up, also after a failed write.
- After a failed write or flush of the journal nothing is acknowledged any more (Fenced) until the volume is opened again.
- Bounded (I7): the journal by its limit, the memtable by takeovers and by the journal; what does not fit waits, then is refused. Only what
  lets go of what a full journal holds may stand beyond the limit, by one and a half of it at most (`Store._may_exceed`).
- What callers accept only after `has_room` always finds room: the segments for it are on the disk already, whoever fills it later.
"""
