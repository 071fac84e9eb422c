"""`volume.json`: what makes a directory a volume, fixed when it is made. What can change stands in the metadata instead.

A document (storage/documents.py) with these fields:

| field | value |
|---|---|
| `format`, `format_version` | `fusefs volume`, 3: of all there is in the directory and on hosts; 1 and 2, before any release, are refused |
| `volume_id` | 32 hexadecimal digits, random |
| `sector_size` | plaintext bytes of a full sector: 64 KiB to 32 MiB, a multiple of 4096 |
| `replication` | for what is not told otherwise: "2", "4+2" |
| `contract_days` | length of the contracts that are concluded, in days |
| `created_ns` | wall clock when it was made |
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from storage.documents import MAX_DOCUMENT, Document, decode_document, encode_document
from storage.durable import read_small_file, write_file_atomic
from storage.errors import BadArgument, Corrupt, NotADirectory, NotFound
from storage.replication import parse_replication
from storage.seams import Failpoints

CONFIG_FILE = "volume.json"
FORMAT = "fusefs volume"
FORMAT_VERSION = 3

DEFAULT_SECTOR_SIZE = 4 * 1024 * 1024
MIN_SECTOR_SIZE = 64 * 1024
MAX_SECTOR_SIZE = 32 * 1024 * 1024
SECTOR_STEP = 4096

DEFAULT_CONTRACT_DAYS = 90.0
#: A hundred years.
MAX_CONTRACT_DAYS = 36525.0


class VolumeConfig(Document, frozen=True, kw_only=True):
    """What was fixed at init. Make one with `new_config`, which checks it."""

    volume_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    sector_size: int
    replication: Annotated[str, msgspec.Meta(max_length=16)]
    contract_days: float
    created_ns: Annotated[int, msgspec.Meta(ge=0)]

    @property
    def volume_id_bytes(self) -> bytes:
        """The 16 bytes that go into headers."""
        return bytes.fromhex(self.volume_id)


def new_config(
    volume_id: bytes,
    created_ns: int,
    *,
    replication: str = "1",
    sector_size: int = DEFAULT_SECTOR_SIZE,
    contract_days: float = DEFAULT_CONTRACT_DAYS,
) -> VolumeConfig:
    """The configuration of a new volume. BadArgument says which value makes no sense."""
    if len(volume_id) != 16:
        raise BadArgument(f"a volume id has 16 bytes, not {len(volume_id)}")
    if not 0 <= created_ns < 2**63:
        raise BadArgument(f"the clock says {created_ns} ns since 1970: set it")
    config = VolumeConfig(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        volume_id=volume_id.hex(),
        sector_size=sector_size,
        # Written the way it is compared: "02" is "2".
        replication=str(parse_replication(replication)),
        contract_days=float(contract_days),
        created_ns=created_ns,
    )
    _check(config)
    return config


def _check(config: VolumeConfig) -> None:
    """BadArgument if a value is out of bounds."""
    parse_replication(config.replication)
    size = config.sector_size
    if not MIN_SECTOR_SIZE <= size <= MAX_SECTOR_SIZE or size % SECTOR_STEP:
        raise BadArgument(f"sector size {size}: between {MIN_SECTOR_SIZE} and {MAX_SECTOR_SIZE} bytes, a multiple of {SECTOR_STEP}")
    # Written so that it is also false for not-a-number.
    if not 0 < config.contract_days <= MAX_CONTRACT_DAYS:
        raise BadArgument(f"contracts of {config.contract_days} days: more than 0 and at most {MAX_CONTRACT_DAYS:g}")


def encode_config(config: VolumeConfig) -> bytes:
    """The file's bytes."""
    return encode_document(config)


def parse_config(raw: bytes, name: str = "volume.json") -> VolumeConfig:
    """Corrupt if damaged; BadArgument if of a newer or older format, or of something else's."""
    config = decode_document(raw, VolumeConfig, FORMAT, FORMAT_VERSION, name, foreign=BadArgument)
    if config.format_version < FORMAT_VERSION:
        raise BadArgument(
            f"{name} has format version {config.format_version}: an earlier fusefs made the volume, before the first release, and this one "
            f"(version {FORMAT_VERSION}) cannot read it; copy the files out with that one"
        )
    try:
        _check(config)
    except BadArgument as error:
        raise Corrupt(f"{name} is damaged: {error}") from None
    return config


def load_config(directory: Path) -> VolumeConfig:
    """The configuration of the volume in `directory`.

    Blocking, briefly. BadArgument if that is not a fusefs volume, or of a newer format; Corrupt if its file is damaged; NotPermitted,
    IOFailure.
    """
    path = directory / CONFIG_FILE
    try:
        raw = read_small_file(path, MAX_DOCUMENT)
    except NotADirectory:
        raise BadArgument(f"{directory} is not a fusefs volume: it is not a directory") from None
    except NotFound:
        what = f"it has no {CONFIG_FILE}" if directory.is_dir() else "there is no such directory"
        raise BadArgument(f"{directory} is not a fusefs volume: {what}; `fusefs init` makes one") from None
    return parse_config(raw, str(path))


def save_config(directory: Path, config: VolumeConfig, failpoints: Failpoints | None = None) -> None:
    """Write it into `directory`, atomically and durably; last of all at init, since with it the directory becomes a volume."""
    write_file_atomic(directory / CONFIG_FILE, encode_config(config), 0o600, failpoints)
