"""Benchmarks: fusefs, its peers and the bare disk at the same work, turn by turn in one run. `scripts/bench --help`.

    systems     what is measured: the disk, a null pyfuse3 filesystem, fusefs in several settings, peers with encryption on
    nullfs      what pyfuse3 costs; `pipeline` and `sealedlog`: the least that a sealed write, and an append with fsync, can be on it
    processes   who serves a system, and how much memory they have
    works       what is done, in groups: one file, appends, small files, a tree, ...; each gives rates (or times)
    seaweed     a volume on a SeaweedFS cluster, and obstore alone (`objects`) beside it; the group `staging` is theirs
    runner      rounds: every system does a group, then the next group; so a slow minute of the machine hits all alike
    syncing     does a system's fsync reach the disk, and does what was fsync'd survive a kill -9
    ladder      where the time goes: the parts alone, and storage without FUSE
    growth      what must not grow with what is stored: mounting, listing, appending, memory
    report      medians, spread, ratios; a table, JSON and plots

Rates are per second, higher is better; ratios are of medians of one run on one machine, which is all that can be compared.
"""
