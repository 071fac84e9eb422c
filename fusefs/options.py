"""Mount options: the text behind `-o`, parsed and checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.errors import BadArgument

#: Options of mount(8) that are handed on as they are, and the option each contradicts.
PASSED_ON = {
    "atime": "noatime",
    "noatime": "atime",
    "dev": "nodev",
    "nodev": "dev",
    "suid": "nosuid",
    "nosuid": "suid",
    "exec": "noexec",
    "noexec": "exec",
    "sync": "async",
    "async": "sync",
}
#: Accepted and without effect: what /etc/fstab and mount(8) add.
IGNORED = frozenset(
    {"defaults", "auto", "noauto", "user", "nouser", "users", "_netdev", "nofail", "relatime", "norelatime", "default_permissions"}
)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a volume is mounted. `MountOptions()` is the default."""

    read_only: bool = False
    #: False: link(2) is answered with EPERM (Borg 1.x then copies its config instead of overwriting a linked one).
    link_denied: bool = False
    #: Extended attributes; they cost a request with every write(2).
    xattr: bool = False
    #: The kernel's write-back cache for O_WRONLY|O_APPEND handles.
    writeback: bool = True
    #: None: for root.
    allow_other: bool | None = None
    #: Bytes for the block cache; None: the volume's default.
    cache_bytes: int | None = None
    #: Bytes of sealed sectors on the local disk at most, for hosts that are far or away; 0: none. None: the volume's default.
    staging: int | None = None
    #: Seconds between commits; between gatherings of small tails.
    commit_interval: float = 5.0
    flush_interval: float | None = None
    #: Bytes per second for making shards again; seconds a host may be away before that is begun. None: the volume's defaults.
    repair_rate: float | None = None
    #: Bytes per second that all sending to hosts together may take; None: no limit.
    upload_rate: float | None = None
    away_grace: float | None = None
    #: Seconds within which every copy is looked at in the background; 0: none is. None: the volume's default.
    scrub_interval: float | None = None
    #: fsync(2) returns when a majority of the hosts has it, too.
    fsync_hosts: bool = False
    #: Keep cores from halting while a program waits for one answer after the other: see fusefs/awake.py.
    awake: bool = True
    debug: bool = False
    passed_on: frozenset[str] = field(default_factory=frozenset)

    @property
    def others_allowed(self) -> bool:
        return os.geteuid() == 0 if self.allow_other is None else self.allow_other

    @classmethod
    def parse(cls, texts: Sequence[str]) -> MountOptions:
        """Each text is a comma-separated list, as after `-o`. BadArgument names the option and says what is wrong with it."""
        seen: dict[str, str] = {}
        values: dict[str, Any] = {}
        passed: set[str] = set()

        def choose(setting: str, option: str, value: object) -> None:
            if setting in seen and values[setting] != value:
                raise BadArgument(f"mount options {seen[setting]!r} and {option!r} contradict each other")
            seen[setting] = option
            values[setting] = value

        for option in (part.strip() for text in texts for part in text.split(",")):
            if not option:
                continue
            name, equals, value = option.partition("=")
            if option in IGNORED or option.startswith("x-"):
                continue
            if option in PASSED_ON:
                if PASSED_ON[option] in passed:
                    raise BadArgument(f"mount options {PASSED_ON[option]!r} and {option!r} contradict each other")
                passed.add(option)
            elif option in _FLAGS:
                setting, chosen = _FLAGS[option]
                choose(setting, option, chosen)
            elif name == "link":
                if value not in ("deny", "allow"):
                    raise BadArgument(f"mount option {option!r}: link=deny or link=allow")
                choose("link_denied", option, value == "deny")
            elif name == "cache" and equals:
                choose("cache_bytes", option, parse_size(option, value))
            elif name == "staging" and equals:
                choose("staging", option, parse_size(option, value))
            elif name in ("repair_rate", "upload_rate") and equals:
                choose(name, option, _rate(option, value))
            elif name == "away_grace" and equals:
                choose("away_grace", option, _seconds(option, value))
            elif name == "scrub_interval" and equals:
                choose("scrub_interval", option, _long(option, value))
            elif name in ("commit_interval", "flush_interval") and equals:
                choose(name, option, _seconds(option, value))
            elif name == "fsync":
                if value not in ("local", "hosts"):
                    raise BadArgument(f"mount option {option!r}: fsync=local or fsync=hosts")
                choose("fsync_hosts", option, value == "hosts")
            else:
                raise BadArgument(f"unknown mount option {option!r}; known: {', '.join(KNOWN)}")
        return cls(passed_on=frozenset(passed), **values)

    def text(self) -> str:
        """What is in force, for `status`."""
        words = ["ro" if self.read_only else "rw", "writeback" if self.writeback else "nowriteback", *sorted(self.passed_on)]
        words += ["allow_other"] * self.others_allowed + ["xattr"] * self.xattr + ["link=deny"] * self.link_denied
        words += ["fsync=hosts"] * self.fsync_hosts + ["noawake"] * (not self.awake)
        return ",".join([*words, f"commit_interval={self.commit_interval:g}"])

    def kernel_options(self, source: str) -> set[str]:
        """The set for `pyfuse3.init`; `source` is what df and mount show, free of commas."""
        options = {"default_permissions", f"fsname={source}", "subtype=fusefs"} | self.passed_on
        if self.read_only:
            options.add("ro")
        if self.others_allowed:
            options.add("allow_other")
        return options


_FLAGS: dict[str, tuple[str, bool]] = {
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "xattr": ("xattr", True),
    "noxattr": ("xattr", False),
    "writeback": ("writeback", True),
    "nowriteback": ("writeback", False),
    "allow_other": ("allow_other", True),
    "noallow_other": ("allow_other", False),
    "awake": ("awake", True),
    "noawake": ("awake", False),
    "debug": ("debug", True),
}
_WITH_VALUE = (
    "link=deny",
    "cache=SIZE",
    "commit_interval=SECONDS",
    "flush_interval=SECONDS",
    "fsync=local|hosts",
    "repair_rate=SIZE",
    "staging=SIZE",
    "upload_rate=SIZE",
    "away_grace=SECONDS",
    "scrub_interval=DAYS|off",
)
KNOWN = sorted([*_FLAGS, *PASSED_ON, *_WITH_VALUE])


def parse_size(option: str, text: str) -> int:
    """Bytes, with an optional K, M, G or T (powers of 1024)."""
    upper = text.strip().upper().removesuffix("B").removesuffix("I")
    digits = upper.rstrip("KMGT")
    unit = _UNITS.get(upper[len(digits) :])
    if unit is None or not digits.isascii() or not digits.isdigit() or len(digits) > 15:
        raise BadArgument(f"mount option {option!r}: {text!r} is not a size such as 256M")
    return int(digits) * unit


def _rate(option: str, text: str) -> float:
    """Bytes per second."""
    size = parse_size(option, text)
    if size < 4096:
        raise BadArgument(f"mount option {option!r}: at least 4K a second")
    return float(size)


def _long(option: str, text: str) -> float:
    """Seconds, of a number of days; 0 for off."""
    if text == "off":
        return 0.0
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0.0001 <= days <= 3660:
        raise BadArgument(f"mount option {option!r}: between 0.0001 and 3660 days, or off")
    return days * 86_400


def _seconds(option: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.01 <= seconds <= 86_400:
        raise BadArgument(f"mount option {option!r}: between 0.01 and 86400 seconds")
    return seconds
