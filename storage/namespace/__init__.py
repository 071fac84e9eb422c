"""Names, inodes, attributes and the file map: POSIX without a kernel, on append-only values.

Words:

| word | meaning |
|---|---|
| inode | a file, directory, symlink, fifo, socket or device; a number that is never reused; the root is 1 |
| entry | (parent inode, name) -> (inode, type, cookie). The cookie names the entry's place in readdir. |
| hint | the (parent, name) an inode record remembers. For a directory it is *the* parent; for a file with several names one of them. |
| orphan | an inode with no name that something still pins; or the rest of a file map that is deleted in slices |
| straight | a file whose bytes stand in its value at the same offsets: no map; its size is the value's |
| mapped | a file with holes, or whose bytes came out of order: map entries (file offset -> length, offset in value) |
| dirty | an inode whose times or counted bytes differ from the store's record; written there right before each commit |

Picture (each imports only what stands below it):

    namespace.py      the facade: one method per thing a program can do to a name
    rename.py   content.py      rename in all its cases;  write, append, read, truncate, commit
    lifetime.py       pins, orphans, freeing
    inheritance.py  xattrs.py   worm and replication, inherited from directories;  extended attributes
    directories.py  filemap.py  entries and paths;  file offset -> value offset
    inodes.py         the cache of inode records, dirty ones, and `Change`: one batch, applied whole
    records.py        codecs, with the tables of their fields

Invariants:

- **N1** Everything but `rename`, `write`, `append`, `read`, `commit` and `reap_orphans` is synchronous: atomic towards other tasks.
  In those, the last step (check again, apply, append) has no await in it; each such place is marked "NO AWAIT".
- **N2** A structural change (create, link, unlink, rename, truncate to 0 ...) is one batch: names, link counts, freed and new values.
- **N3** Every byte of a value that belongs to a mapped file is in exactly one map entry, and its entry reaches the store before
  the byte can: after a crash a map may point beyond its value, a value never holds a byte without a place (part of I6).
- **N4** What a map says beyond its value after a crash is cut off *durably before* anything more is appended to the value; so bytes
  appended later never appear at the place of lost ones. `InodeRecord.map_bound` says without a scan whether that can be needed.
- **N5** A record never says less than `map_bound` >= the end of every map entry in value offsets, at every prefix of the batches.
"""

from storage.namespace.namespace import Namespace

__all__ = ["Namespace"]
