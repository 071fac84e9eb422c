"""Values: bytes that are only ever appended to, under ids that are never reused.

Vocabulary: a value's *tail* is what is not in a committed sector yet. A *flight* is a piece of a tail that has been cut off and is on its
way into a sector; the flights that share a sector are its *cargo*. A flight has *landed* when its sector is durable and its extent is
applied. A *parked* flight is one whose cargo hosts refused; its bytes are still here, and it is tried again.

    append_now --> tail --cut at a full sector--------------> cargo of one flight --+
                     |                                                              +--> SectorManager --> landed: extents
                     +-----gathered every flush_interval----> cargo of many --------+
    commit ------> uncommitted part of the tail --> journal

    landed sectors --merge (eight of a size class)--> fuller sectors     freed values --walk--> dead sectors --> deleted

Order of a value's bytes, always: extents | flights | buffer. `sealed` is where the extents end, `journaled` up to where the journal (or an
extent) has the bytes.

Invariants kept here: I2 (an extent is applied after `write_sector` returned, and a value's extents in order), I3 (memory of a flight is
dropped once its extent is applied; the journal's copy only once the store's durable state has the extent, see `tail_needed`), I6, I7 (one
budget for all tails; what is accepted has room in the journal: `admission`).
"""
