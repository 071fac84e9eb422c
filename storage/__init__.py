"""storage: an encrypted, append-only store on hosts nobody needs to trust. Does not know that FUSE exists.

    async with storage.open_volume(path, passphrase=...) as volume:
        fd = await volume.files.open("logs/today", write=True)
        await volume.files.append(fd, b"a line\\n")

Vocabulary (the rest is in docs/design.md): a *volume* is one filesystem with one writer at a time; a *value* is bytes that are only ever
appended to; its *tail* is what is in no sector yet; a *sector* is the unit of storage, sealed here into *shards*, each named by its *root*
and kept on a *host* under a *contract*; a *commit* is one atomic, numbered batch of metadata and tail bytes in the local *journal*; an
*epoch* is one writer's tenure.

                   Namespace: names, inodes, attributes, file map      Files: the same by path
                      |
                   Values: tails, extents, packing, merging, reclaim
                      |
                   SectorManager: ids, redundancy, placement, cache
                      |
                   HostIO: seals, opens, verifies     Contractor: contracts     HostDB: what hosts are like
                      |
                   Host: a directory; memory, for tests
    Coprocess: a second process that seals and opens, and puts on disks, what is large
    MetadataStore (memtable, journal, LMDB) under all of them; sealing, keys, epochs; seams to the world outside at the very bottom

Invariants I1 to I7 are those of docs/design.md; code and tests name them where they are kept. `storage.interfaces` has the Protocols:
whoever reads that one file knows the architecture.

The public names are those below; they are imported when first used, so that asking for an error class does not load the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage import errors as errors
    from storage.checking import CheckProgress as CheckProgress
    from storage.checking import CheckReport as CheckReport
    from storage.checking import Finding as Finding
    from storage.checking import check_volume as check_volume
    from storage.config import VolumeConfig as VolumeConfig
    from storage.config import load_config as load_config
    from storage.creation import create_volume as create_volume
    from storage.history.finding import VolumeOnHosts as VolumeOnHosts
    from storage.history.finding import list_volumes as list_volumes
    from storage.hosts.urls import parse_url as parse_url
    from storage.interfaces import Attributes as Attributes
    from storage.interfaces import Contract as Contract
    from storage.interfaces import Contractor as Contractor
    from storage.interfaces import Entry as Entry
    from storage.interfaces import Files as Files
    from storage.interfaces import FlushProgress as FlushProgress
    from storage.interfaces import FlushReport as FlushReport
    from storage.interfaces import HostIO as HostIO
    from storage.interfaces import Listed as Listed
    from storage.interfaces import Namespace as Namespace
    from storage.interfaces import Refusal as Refusal
    from storage.interfaces import SectorManager as SectorManager
    from storage.keyfile import KEY_FILE as KEY_FILE
    from storage.keyfile import change_passphrase as change_passphrase
    from storage.keys import master_of_phrase as master_of_phrase
    from storage.pruning import DEFAULT_GRACE_DAYS as DEFAULT_GRACE_DAYS
    from storage.pruning import HeldVolume as HeldVolume
    from storage.pruning import Pruner as Pruner
    from storage.pruning import open_pruner as open_pruner
    from storage.read_only import ReadOnlySource as ReadOnlySource
    from storage.read_only import ReadOnlyVolume as ReadOnlyVolume
    from storage.read_only import open_read_only as open_read_only
    from storage.recovery import RecoveryReport as RecoveryReport
    from storage.recovery import recover_volume as recover_volume
    from storage.replication import Replication as Replication
    from storage.replication import parse_replication as parse_replication
    from storage.salvage import salvage_volume as salvage_volume
    from storage.salvage_index import SalvageReport as SalvageReport
    from storage.seams import Seams as Seams
    from storage.status import ContractStatus as ContractStatus
    from storage.status import HostStatus as HostStatus
    from storage.status import RefusalStatus as RefusalStatus
    from storage.status import RenewalStatus as RenewalStatus
    from storage.status import RepairStatus as RepairStatus
    from storage.status import ReplicationStatus as ReplicationStatus
    from storage.status import RewriteStatus as RewriteStatus
    from storage.status import ScrubReport as ScrubReport
    from storage.status import ScrubStatus as ScrubStatus
    from storage.status import StagingStatus as StagingStatus
    from storage.status import StoredAs as StoredAs
    from storage.status import VolumeRoom as VolumeRoom
    from storage.status import VolumeStatus as VolumeStatus
    from storage.turn import Turn as Turn
    from storage.volume import Volume as Volume
    from storage.volume import VolumeOptions as VolumeOptions
    from storage.wiring import open_volume as open_volume
    from storage.wording import counted as counted
    from storage.wording import named as named

_HOMES = {
    "storage.checking": ("CheckProgress", "CheckReport", "Finding", "check_volume"),
    "storage.config": ("VolumeConfig", "load_config"),
    "storage.creation": ("create_volume",),
    "storage.history.finding": ("VolumeOnHosts", "list_volumes"),
    "storage.interfaces": (
        "Attributes",
        "Contract",
        "Contractor",
        "Entry",
        "Files",
        "FlushProgress",
        "FlushReport",
        "HostIO",
        "Listed",
        "Namespace",
        "Refusal",
        "SectorManager",
    ),
    "storage.hosts.urls": ("parse_url",),
    "storage.keyfile": ("KEY_FILE", "change_passphrase"),
    "storage.keys": ("master_of_phrase",),
    "storage.pruning": ("DEFAULT_GRACE_DAYS", "HeldVolume", "Pruner", "open_pruner"),
    "storage.read_only": ("ReadOnlySource", "ReadOnlyVolume", "open_read_only"),
    "storage.recovery": ("RecoveryReport", "recover_volume"),
    "storage.replication": ("Replication", "parse_replication"),
    "storage.salvage": ("salvage_volume",),
    "storage.salvage_index": ("SalvageReport",),
    "storage.seams": ("Seams",),
    "storage.status": (
        "ContractStatus",
        "HostStatus",
        "RefusalStatus",
        "RenewalStatus",
        "RepairStatus",
        "ReplicationStatus",
        "RewriteStatus",
        "ScrubReport",
        "ScrubStatus",
        "StagingStatus",
        "StoredAs",
        "VolumeRoom",
        "VolumeStatus",
    ),
    "storage.turn": ("Turn",),
    "storage.volume": ("Volume", "VolumeOptions"),
    "storage.wiring": ("open_volume",),
    "storage.wording": ("counted", "named"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "errors"])


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("storage.errors")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
