"""Seeded mutations: of plain bytes, and of what the bytes stand for where that is MessagePack or JSON.

No coverage steers them, so they go for what parsers get wrong: lengths and numbers at the edges of their types, parts left out, doubled,
swapped, of another type, cut off, and halves of two inputs put together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

#: What the bytes of an input are.
Shape = Literal["bytes", "msgpack", "json"]

#: Bytes of an input at most: parsers that are slow on more of the same show it here already.
MAX_INPUT = 16_384

_NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    -(2**63),
    2**63,
    2**64 - 1,
)
_TOKENS = (
    b"\0", b"\xff" * 4, b"\n", b"\r\n", b"\x1b[2J", b"%00", b"%", b"..", b"/", b"\\", b'"', b"{}", b"[]", b"null", b"1e400", b"-0.0",
    b"\\ud800", b"\\u0000", b"\\n", b"\xc3\x28", b"\xed\xa0\x80", b"\xc0", b"\xd9\xff", b"\xc4\xff", b"\xdd\xff\xff\xff\xff",
    b"\xdf\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xd6\xff\0\0\0\0", "\u2028".encode(), "\u0130".encode(), "\ufdfa".encode(),
)  # fmt: skip
_LEAVES: tuple[Any, ...] = (
    None, True, False, 0.5, -0.0, 1e308, "", "x", "\0", "\n", "\x1b[2J", "\u202e", "\U0010ffff", "a" * 300, "0" * 32, "0" * 31 + "\n",
    b"", b"\0", b"\xff" * 16, b"\0" * 32, b"x" * 600, [], {}, [[]], [0] * 40,
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, shape: Shape = "bytes", others: Sequence[bytes] = ()) -> bytes:
    """One to four changes. `others`: inputs that parts may be taken from."""
    if shape != "bytes" and rng.random() < 0.7:
        changed = _mutate_structure(data, rng, shape)
        if changed is not None:
            return changed[:MAX_INPUT]
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(_CHANGES)(raw, rng, others)
    return bytes(raw[:MAX_INPUT])


# --------------------------------------------------------------------------------------------------------------------
# Bytes


def _flip(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    if raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def _set(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    if raw:
        raw[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF, rng.randrange(256)))


def _number(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    """A number of a field's width, at one of its edges."""
    width = rng.choice((1, 2, 4, 8))
    if len(raw) >= width:
        at = rng.randrange(len(raw) - width + 1)
        number = rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)
        raw[at : at + width] = number.to_bytes(width, rng.choice(("big", "big", "little")))


def _cut(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    if raw:
        del raw[rng.randrange(len(raw)) :]


def _remove(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    if raw:
        at = rng.randrange(len(raw))
        del raw[at : at + rng.choice((1, 1, 2, 4, 8, 64))]


def _double(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    if raw:
        at = rng.randrange(len(raw))
        piece = raw[at : at + rng.choice((1, 4, 16, 128))]
        raw[at:at] = piece * rng.choice((1, 1, 2, 50))


def _insert(raw: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(raw) + 1)
    raw[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(_TOKENS)


def _splice(raw: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others) if others else bytes(raw)
    at, start = rng.randrange(len(raw) + 1), rng.randrange(len(other) + 1)
    raw[at : at + rng.choice((0, 8, len(raw)))] = other[start : start + rng.choice((8, 64, len(other)))]


_CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip, _flip, _set, _number, _number, _cut, _remove, _double, _insert, _insert, _splice,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Structure


def _mutate_structure(data: bytes, rng: random.Random, shape: Shape) -> bytes | None:
    """The bytes of a changed tree; None where the bytes are none, or the changed one cannot be written."""
    codec: Any = msgspec.json if shape == "json" else msgspec.msgpack
    try:
        tree = codec.decode(data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            tree = _mutate_tree(tree, rng)
        return bytes(codec.encode(tree))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError, ValueError, OverflowError):
        return None


def _mutate_tree(node: Any, rng: random.Random) -> Any:
    """A changed copy; half the time deeper down if there is a deeper."""
    if isinstance(node, list | tuple):
        items = list(node)
        if items and rng.random() < 0.8:
            at = rng.randrange(len(items))
            items[at] = _mutate_tree(items[at], rng)
            return items
        return _mutate_list(items, rng)
    if isinstance(node, dict):
        fields = dict(node)
        name = rng.choice(list(fields)) if fields else None
        if name is not None and rng.random() < 0.8:
            fields[name] = _mutate_tree(fields[name], rng)
        elif name is not None and rng.random() < 0.5:
            del fields[name]
        else:
            fields[rng.choice(("version", "x", "\n\x1b[2J", "", "type", "format_version"))] = rng.choice((*_LEAVES, *_NUMBERS))
        return fields
    return _mutate_leaf(node, rng)


def _mutate_list(items: list[Any], rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0 or not items:
        items.insert(rng.randrange(len(items) + 1), rng.choice((*_LEAVES, *_NUMBERS)))
    elif kind == 1:
        del items[rng.randrange(len(items))]
    elif kind == 2:
        items.insert(rng.randrange(len(items)), rng.choice(items))
    elif kind == 3:
        rng.shuffle(items)
    elif kind == 4:
        items *= rng.choice((2, 20))
    else:
        return rng.choice(_LEAVES)
    return items


def _mutate_leaf(leaf: Any, rng: random.Random) -> Any:
    if rng.random() < 0.15:
        return rng.choice((*_LEAVES, *_NUMBERS))
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        return rng.choice((rng.choice(_NUMBERS), leaf + 1, leaf - 1, -leaf, leaf * 256, float(leaf) if abs(leaf) < 2**53 else 0.5))
    if isinstance(leaf, str):
        raw = bytearray(leaf.encode())
        rng.choice(_CHANGES)(raw, rng, ())
        return rng.choice((raw.decode("utf-8", "replace"), leaf + "\n", leaf.upper(), leaf[:-1], leaf * 2))
    if isinstance(leaf, bytes):
        raw = bytearray(leaf)
        rng.choice(_CHANGES)(raw, rng, ())
        return bytes(raw)
    if isinstance(leaf, float):
        return rng.choice((0.0, -1.0, 1e-300, 1e308, leaf * 1e6, int(leaf) if abs(leaf) < 2**53 else 0))
    return rng.choice((*_LEAVES, *_NUMBERS))
