"""A mounted volume: POSIX in terms of values, and nothing else.

    cp, cat, tail, borg, rsyslog ...
             | system calls
        Linux kernel: page cache, dirty pages, permissions, locks
             | FUSE requests                      control.sock
        Operations (attributes, directories, contents)   ControlServer <--- fusefs umount, flush, status ...
             |            |                            |
             |       KernelCalls: what we ask of the kernel, from threads
        storage.Volume: namespace, values, hosts

Words of this package

    handle          an open file description of the kernel, for us an integer `fh`.
    cached handle   opened O_WRONLY|O_APPEND: its writes stay dirty in the kernel's page cache and arrive later, gathered, perhaps out of
                    order, perhaps overlapping what is stored, perhaps under another handle's `fh`.
    direct handle   every other handle opened for writing: each write(2) arrives at once and is answered itself.
    open inode      what we know of an inode while handles are open on it (`handles.OpenInode`).
    tainted         a cached WRITE was refused: the kernel's size and pages are ahead of what is stored, until repaired.
    repair          from a thread: truncate the file to its stored size through the mount and drop its pages.
    refusal         something the append-only rules forbid: EPERM, a line in the log, an entry in `status`.

Rules

  R1  No handler lets any exception but pyfuse3.FUSEError and trio.Cancelled out (`guard`): another one would take the mount down.
  R2  Calls into the kernel that may wait for a request of ours (invalidate, truncate, utime, syncfs, path walks) happen in threads.
  R3  While an inode is tainted no WRITE may leave a hole in it: bytes that were refused must not turn into zeros.
  R4  A pin of the namespace per lookup count the kernel holds; handles need none, the kernel holds the inode while one is open.
  R5  The kernel owns size and mtime of regular files while it caches them with write-back on. What it does not learn by itself (mtime of
      direct writers) is told to it through the mount; what we stored differently is set to what it shows.
  R6  Everything that comes in through the control socket is checked before use and answered, never trusted and never fatal.
"""
