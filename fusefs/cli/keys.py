"""`fusefs passwd`: another passphrase for the same volume."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fusefs.cli.arguments import passphrase_option, volume_argument
from fusefs.cli.output import say
from fusefs.cli.passphrase import new_passphrase, passphrase
from fusefs.cli.startup import importing


@click.command(short_help="Change the passphrase.")
@volume_argument
@passphrase_option
@click.option(
    "--new-passphrase-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the new passphrase from the first line of FILE (else FUSEFS_NEW_PASSPHRASE, else it is asked for).",
)
def passwd(volume: Path, passphrase_file: Path | None, new_passphrase_file: Path | None) -> None:
    """Change the passphrase of VOLUME, mounted or not.

    The volume's key stays what it is: only how it is locked away changes. Copies of the old key file, in backups or on hosts, still
    open with the old passphrase. The 24 words stay valid.

    \b
    Example:
      fusefs passwd ~/volume
    """
    with importing():
        from storage import KEY_FILE, Seams, change_passphrase, load_config
    config = load_config(volume)
    old, new = passphrase(passphrase_file), new_passphrase(new_passphrase_file)
    with _one_at_a_time(volume):
        change_passphrase(volume / KEY_FILE, config.volume_id, old, new, Seams())
    say(f"the passphrase of {volume} is changed")
    say("copies of the old key file that backups or hosts hold still open with the old passphrase: changing it cannot revoke them")


@contextmanager
def _one_at_a_time(volume: Path) -> Iterator[None]:
    """Two passwd at once would each replace the file that it read.

    Not the volume's lock: a mount holds that, and it has read the key file and will not again.
    """
    descriptor = os.open(volume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
