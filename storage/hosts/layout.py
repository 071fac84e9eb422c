"""What lies where on a host, and the JSON objects that other tools may read.

| name | content |
|---|---|
| `fusefs-host.json` | who this host is |
| `volumes/<volume id>/superblock.<number>` | superblocks; 20 decimal digits, counted on each host by itself: the highest is the latest |
| `volumes/<volume id>/metadata/<epoch>-<salt>-<root>` | checkpoints and log (`storage/history/objects.py`) |
| `volumes/<volume id>/contracts/<contract id>.json` | a contract |
| `volumes/<volume id>/pruning.json` | there while the host's owner takes the volume away (`storage/pruning.py`) |
| `volumes/<volume id>/sectors/<xx>/<root>` | a sealed shard; xx are the root's first two digits |

The JSON objects are documents (see `storage.documents`): format, version and checksum stand around the fields here.

`fusefs-host.json`, format `fusefs host`, version 1:

| field | type | meaning |
|---|---|---|
| `id` | string | 32 lower-case hexadecimal digits, random, for good |
| `created` | string | UTC, `2025-01-31T12:00:00Z`; for people |

Contract, format `fusefs contract`, version 1:

| field | type | meaning |
|---|---|---|
| `contract` | string | contract id |
| `volume` | string | volume id |
| `host` | string | host id |
| `start_ns`, `end_ns` | int | in force from start to end, nanoseconds since the Unix epoch |
| `lineage` | string | id of the first contract of the chain of renewals this one belongs to |
| `renewed_from` | string or null | the contract this one renews |

Pruning, format `fusefs pruning`, version 1:

| field | type | meaning |
|---|---|---|
| `volume` | string | volume id |
| `host` | string | host id |
| `begun` | string | UTC, `2025-01-31T12:00:00Z`; for people |
"""

from __future__ import annotations

import re
import time
from typing import Annotated

import msgspec

from storage.documents import Document, decode_document, encode_document
from storage.errors import BadArgument, Corrupt

HOST_FILE = "fusefs-host.json"
VOLUMES = "volumes"
HOST_FORMAT = "fusefs host"
HOST_VERSION = 1
CONTRACT_FORMAT = "fusefs contract"
CONTRACT_VERSION = 1
PRUNING_FORMAT = "fusefs pruning"
PRUNING_VERSION = 1

MAX_NAME = 512
MAX_COMPONENT = 200

_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,200}\Z", re.ASCII)
_ID = re.compile(r"[0-9a-f]{32}\Z", re.ASCII)
_ROOT = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_WRITTEN_ONCE = re.compile(r"volumes/[0-9a-f]{32}/(superblock\.|contracts/|metadata/|sectors/)", re.ASCII)

Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


def is_component(text: str) -> bool:
    """True for one component of an object's name. "." and ".." are none."""
    return _COMPONENT.match(text) is not None and text not in (".", "..")


def check_name(name: str) -> list[str]:
    """The components of an object's name; BadArgument if it is not one."""
    parts = name.split("/")
    if len(name) > MAX_NAME or not all(is_component(part) for part in parts):
        raise BadArgument(f"{name[:100]!r} is no name of an object: components of A-Z a-z 0-9 . _ - joined by '/'")
    return parts


def check_prefix(prefix: str) -> list[str]:
    """The components of a prefix for listing: "" or a path that ends in "/". BadArgument for anything else."""
    if prefix == "":
        return []
    if not prefix.endswith("/"):
        raise BadArgument(f"{prefix[:100]!r} is no prefix: it must end in '/', or be empty")
    return check_name(prefix[:-1])


def is_id(text: str) -> bool:
    """True for 32 lower-case hexadecimal digits."""
    return _ID.match(text) is not None


def check_root(root: str) -> bytes:
    """The 32 bytes of a sector root; BadArgument unless it is 64 lower-case hexadecimal digits."""
    if _ROOT.match(root) is None:
        raise BadArgument(f"{root[:80]!r} is no sector root: 64 lower-case hexadecimal digits")
    return bytes.fromhex(root)


# --------------------------------------------------------------------------------------------------------------------
# Names


def volume_prefix(volume_id: bytes) -> str:
    """Everything of one volume stands below it."""
    return f"{VOLUMES}/{volume_id.hex()}/"


def contract_name(volume_id: bytes, contract_id: str) -> str:
    """Object that holds a contract."""
    return f"{contracts_prefix(volume_id)}{contract_id}.json"


def contracts_prefix(volume_id: bytes) -> str:
    """All contracts of a volume stand below it."""
    return f"{VOLUMES}/{volume_id.hex()}/contracts/"


def pruning_name(volume_id: bytes) -> str:
    """Object that stands there while a volume is being taken away."""
    return f"{VOLUMES}/{volume_id.hex()}/pruning.json"


def sectors_prefix(volume_id: bytes) -> str:
    """All shards of a volume stand below it."""
    return f"{VOLUMES}/{volume_id.hex()}/sectors/"


def shard_name(volume_id: bytes, root: str) -> str:
    """Object that holds a sealed shard."""
    return f"{VOLUMES}/{volume_id.hex()}/sectors/{root[:2]}/{root}"


def superblock_name(volume_id: bytes, number: int) -> str:
    """Object that holds a superblock: the one with the highest number on a host is its latest."""
    return f"{VOLUMES}/{volume_id.hex()}/superblock.{number:020d}"


def root_in(name: str) -> str | None:
    """The root a name ends in (shards, metadata objects), hexadecimal: what stands under it has that BLAKE3. None if it ends in none."""
    last = name.rsplit("/", 1)[-1].rsplit("-", 1)[-1]
    return last if _ROOT.match(last) else None


def write_once(name: str) -> bool:
    """Is the name one that is given bytes once, and never others? True of everything fusefs stores, its probes and the mark of a pruning
    aside."""
    return name == HOST_FILE or _WRITTEN_ONCE.match(name) is not None


# --------------------------------------------------------------------------------------------------------------------
# JSON objects


class HostFile(Document, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`fusefs-host.json`."""

    id: Id
    created: Annotated[str, msgspec.Meta(max_length=64)]


class ContractFile(Document, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A contract as the host keeps it."""

    contract: Id
    volume: Id
    host: Id
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    lineage: Id
    renewed_from: Id | None


class PruningFile(Document, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pruning.json`."""

    volume: Id
    host: Id
    begun: Annotated[str, msgspec.Meta(max_length=64)]


def new_host_file(host_id: str, now_ns: int) -> HostFile:
    """For a host that is used for the first time."""
    return HostFile(format=HOST_FORMAT, format_version=HOST_VERSION, id=host_id, created=_utc(now_ns))


def new_pruning_file(volume_id: bytes, host_id: str, now_ns: int) -> PruningFile:
    """For a volume that is being taken away from a host."""
    return PruningFile(format=PRUNING_FORMAT, format_version=PRUNING_VERSION, volume=volume_id.hex(), host=host_id, begun=_utc(now_ns))


def _utc(now_ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_ns // 10**9))


def encode_json(document: HostFile | ContractFile | PruningFile) -> bytes:
    """The bytes for the host."""
    return encode_document(document)


def decode_host_file(raw: bytes, where: str) -> HostFile:
    """Corrupt naming `where` if it is damaged or something else, BadArgument if a newer fusefs wrote it."""
    return decode_document(raw, HostFile, HOST_FORMAT, HOST_VERSION, where)


def decode_contract_file(raw: bytes, where: str) -> ContractFile:
    """Corrupt naming `where` if it is damaged or something else, BadArgument if a newer fusefs wrote it."""
    contract = decode_document(raw, ContractFile, CONTRACT_FORMAT, CONTRACT_VERSION, where)
    if contract.start_ns >= contract.end_ns:
        raise Corrupt(f"{where}: the contract ends before it starts")
    return contract


def decode_pruning_file(raw: bytes, where: str) -> PruningFile:
    """Corrupt naming `where` if it is damaged or something else, BadArgument if a newer fusefs wrote it."""
    return decode_document(raw, PruningFile, PRUNING_FORMAT, PRUNING_VERSION, where)
