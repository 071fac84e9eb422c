"""`python -m fusefs`: the same as the `fusefs` command."""

from __future__ import annotations

import sys

from fusefs.cli import main

if __name__ == "__main__":
    sys.exit(main())
