"""Hosts: places that store sealed shards and need not be trusted.

Vocabulary: a host is named by a *URL* and known by the *id* in its `fusefs-host.json`; inside a volume it has a *number*, from 1, that
is never reused. An *object* is a named run of bytes on it, replaced whole or not at all. A *tag* changes whenever an object's bytes do.

    registry   the volume's hosts: numbers, ids, URLs; which of them can be used now
    hostdb     what they have been like: latency, throughput, failures
    urls       host URLs, and opening what they name
    layout     names of objects, and the JSON ones that other tools can read
    directory, memory     implementations of `interfaces.Host`
    faults     a wrapper with the same Protocol, that fails on order
"""
