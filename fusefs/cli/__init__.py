"""The command line: `fusefs` and `python -m fusefs`.

One module per group of commands; each command is thin: it reads its arguments, calls `storage` (for a volume nobody has mounted)
or the process that serves the volume (`live`), and shows what came back.

    startup      the imports, which Ctrl-C may meet, and descriptors 0 to 2, which may be closed
    app          the command group, help texts, and where every exception becomes one line and an exit status
    arguments    types and options several commands share: sizes, days, paths, the passphrase
    passphrase   where a passphrase comes from
    output       what a person sees: tables, sizes, progress bars, escaped names
    session      trio.run with signals; opening a volume that is not mounted
    notices      what the layers below warn of
    live         talking to the process that has a volume mounted
    create, keys, mounting, status, check, scrub, hosts, files, worm, shell      the commands

What other programs may rely on: exit statuses (docs/commands.md), that results go to standard output and everything else to
standard error, that output which is not a terminal has no colours, no bars and no tabs, and `status --json`.
"""

from __future__ import annotations

from fusefs.cli.startup import main

__all__ = ["main"]
