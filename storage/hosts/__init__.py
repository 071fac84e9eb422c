"""Hosts: places that store sealed shards and need not be trusted.

Vocabulary: a host is named by a *URL* and known by the *id* in its `fusefs-host.json`; inside a volume it has a *number*, from 1, that
is never reused. An *object* is a named run of bytes on it, replaced whole or not at all. A *tag* changes whenever an object's bytes do.

    registry   the volume's hosts: numbers, ids, URLs; which of them can be used now
    hostdb     what they have been like: latency, throughput, failures
    urls       host URLs, and opening what they name
    layout     names of objects, and the JSON ones that other tools can read
    directory, memory     implementations of `interfaces.Host`
    faults     a wrapper with the same Protocol, that fails on order

The directory host, from what the event loop asks down to the disk; below `directory` all blocks, and is called
in threads, but for what begins a call in the coprocess:

    directory  a hop into a thread for each call, or the coprocess      (slots: how many there are, and changes that were given up)
    delegating has the coprocess put and read what is large
    tree       objects as files: read, listed, put, deleted
    held       files that stay open for a second      direct     large pieces of files, past the page cache
    root       the way to directories, and what is known of them to be durable      tree_lock     `~lock`
"""
