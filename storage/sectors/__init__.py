"""Sectors: ids, redundancy, placement, cache.

Vocabulary: a *sector* is up to `sector_size` bytes that are written at most once. What a host holds of it is a *shard*; with
copies every shard is the same sealed bytes under the same root. A *fresh* sector is durable, and nothing points to it yet. A sector is
*partial* when few of its bytes are live. A *freed* sector is forgotten here and still to be deleted on its hosts.

    Values --write_sector--> seal once (thread) --> HostIO.write_sealed on `copies` distinct hosts at the same time
                               quorum reached: sector record + fresh mark applied; stragglers go on in the manager's nursery
                               hosts far, or too few: staging (local disk), record without hosts; the drain brings it to them
    Values --account-------> live bytes change: fresh mark goes, partial index follows
    Values --delete--------> record -> freed queue --(commit durable, I3)--> HostIO.delete on every host
    Reconciler (the list of what is not as it should be), Filling (new hosts), Damages (bad copies) --> Mender: one sector, by one of them

Invariants kept here: I1 (`allocate_sector` reserves durably; `write_sector` seals once per id), I2 (`write_sector` returns at write
quorum, or when staging has it), I3 (`Deleter` deletes after the commit that freed is durable; `Staging` drops only at full replication),
I7 (a limit on sealed shards in memory; the block cache has a budget, staging a limit).
"""
