"""simulation: how likely data is lost, from the real placement and reconcile code on thousands of virtual hosts.

    python -m simulation --help            (or scripts/simulate)

    rates, sizes, replication specs                 what a person gives
        |
    experiment     points: a spec at one host lifetime; estimates, intervals, the closed form beside them
        |
    driver         time: hosts die, go away, come back, are replaced; when reconcile looks
        |
    world          virtual hosts that keep no bytes; which shards are alive, which sectors are lost
        |
    storage        placement, plan, reconcile, standing, HostDB's ranking, the deleter: as they are

Time is trio's, on a clock that jumps to the next thing to happen. Everything follows from the seed. What it shows, and what it does not, is
in docs/simulation.md. `watching` shows how far it is, on standard error.
"""
