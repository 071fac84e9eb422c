"""Making a volume: its directory, keys, configuration, hosts and first contracts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from storage.config import DEFAULT_CONTRACT_DAYS, DEFAULT_SECTOR_SIZE, new_config, save_config
from storage.durable import fsync_dir
from storage.errors import BadArgument, Exists
from storage.hosts.registry import Opener
from storage.hosts.urls import parse_url
from storage.interfaces import HostCapabilities
from storage.keyfile import KEY_FILE, Argon2Parameters, make_keyfile, make_slot, save_keyfile
from storage.keys import Keys, phrase_of
from storage.lock import VolumeLock
from storage.replication import parse_replication
from storage.seams import Seams
from storage.volume import VolumeOptions
from storage.wiring import absolute, with_layers
from storage.wording import counted


async def create_volume(
    path: Path | str,
    passphrase: str,
    *,
    hosts: Sequence[str] = (),
    replication: str = "1",
    sector_size: int = DEFAULT_SECTOR_SIZE,
    contract_days: float = DEFAULT_CONTRACT_DAYS,
    seams: Seams | None = None,
    argon2: Argon2Parameters | None = None,
    opener: Opener | None = None,
    on_host: Callable[[str, HostCapabilities], None] | None = None,
) -> str:
    """Make a volume in the new (or empty) directory `path`; returns the recovery phrase, which is kept nowhere.

    Without `hosts`, one directory host inside it. `on_host`: told of each what it can do, as probed.
    BadArgument names what is wrong or missing, and then nothing of the volume is left here.
    """
    path = absolute(path)
    seams = seams or Seams()
    config = new_config(
        seams.random.token_bytes(16),
        seams.clock.time_ns(),
        replication=replication,
        sector_size=sector_size,
        contract_days=contract_days,
    )
    spec = parse_replication(config.replication)
    urls = list(hosts) or [f"dir:{path / 'host'}"]
    if len(urls) < spec.hosts_needed:
        raise BadArgument(
            f"replication {config.replication} needs {counted(spec.hosts_needed, 'host')}, {len(urls)} given; "
            f"add --host for {spec.hosts_needed - len(urls)} more"
        )
    _check_urls(urls)
    made = _make_directory(path)
    # Of two that make a volume in one empty directory, one is told so, and takes nothing of the other's away.
    lock = VolumeLock(path)
    await lock.acquire(seams, 0.0, "init")
    try:
        if not hosts:
            (path / "host").mkdir(mode=0o700)
        master = seams.random.token_bytes(32)
        slot = await seams.threads.run(make_slot, master, passphrase, config.volume_id, seams.random, argon2)
        await seams.threads.run(save_keyfile, path / KEY_FILE, make_keyfile(config.volume_id, (slot,)), seams.failpoints)
        async with with_layers(path, config, Keys(master), VolumeOptions(purpose="init"), seams, opener, create=True) as volume:
            for url in urls:
                try:
                    record = volume.hosts.record(await volume.add_host(url))
                except Exists as error:
                    raise BadArgument(
                        f"replication {config.replication} needs {counted(spec.hosts_needed, 'different host')}: {error}"
                    ) from error
                if on_host is not None:
                    on_host(record.url, record.capabilities)
            await volume.commit()
            if volume.publisher is not None:
                await volume.publisher.publish()
        if made:
            # Files in a directory whose own name is lost are lost.
            await seams.threads.run(fsync_dir, path.parent)
        # Last: with this file the directory becomes a volume.
        await seams.threads.run(save_config, path, config, seams.failpoints)
    except BaseException:
        await trio.to_thread.run_sync(_remove_volume, path, made)
        raise
    finally:
        lock.release()
    return phrase_of(master)


def _check_urls(urls: Sequence[str]) -> None:
    """BadArgument for what is no host URL, and for two that are one directory: before anything is written, here or on a host."""
    places: dict[str, str] = {}
    for url in urls:
        parsed = parse_url(url)
        # What else stands in a URL may differ, and the bucket be the same: the hosts' own ids will tell, once they are asked.
        place = f"{parsed.scheme}:{os.path.realpath(parsed.path)}" if parsed.scheme == "dir" else parsed.base
        if place in places:
            raise BadArgument(f"{places[place]} and {url} are the same host; each copy needs a host of its own")
        places[place] = url


def _make_directory(path: Path) -> bool:
    """True if it was made, False if it was there and empty."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            raise BadArgument(f"{path} exists and is not an empty directory; a volume needs a new one") from None
        return False
    except OSError as error:
        raise BadArgument(f"cannot make {path}: {error.strerror}") from error
    return True


def _remove_volume(path: Path, made: bool) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if made:
        path.rmdir()
