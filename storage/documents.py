"""Documents: the small JSON files of a volume that people may look at, with a version and a checksum.

| field | value |
|---|---|
| `format` | what the file is, e.g. `fusefs volume` |
| `format_version` | integer, from 1 |
| ... | the document's own fields |
| `checksum` | last: BLAKE3, 64 hexadecimal digits, of the document without this field, as JSON without white space |

A document is written in exactly one way (msgspec's JSON, two spaces of indent, fields in order, a newline at the end) and read only if
it is written so: any change to a byte is seen. The version is looked at before the checksum, so that a newer format is told from damage
even if it computes its checksum otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from blake3 import blake3

from storage.errors import BadArgument, Corrupt, FusefsError

#: Bytes of a document: far more than any has, few enough to parse whatever stands there.
MAX_DOCUMENT = 65536

D = TypeVar("D", bound="Document")


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the documents. Subclasses add their own fields, with defaults for what an older file of the same version may lack."""

    format: str
    format_version: int


def encode_document(document: Document) -> bytes:
    """The file's bytes."""
    body = msgspec.json.encode(document)
    checksum = blake3(body).hexdigest().encode()
    return msgspec.json.format(body[:-1] + b',"checksum":"' + checksum + b'"}', indent=2) + b"\n"


def decode_document(raw: bytes, kind: type[D], form: str, version: int, name: str, *, foreign: Callable[[str], FusefsError] = Corrupt) -> D:
    """The document in `raw`, of format `form`, with all of `kind`'s constraints checked.

    `name` is what errors call it ("key file /v/keys.json"). Corrupt if it is damaged; BadArgument if its version is above `version`;
    `foreign` (an error kind) if it is a JSON object of another format.
    """
    damaged = f"{name} is damaged"
    if len(raw) > MAX_DOCUMENT:
        raise Corrupt(f"{damaged}: {len(raw)} bytes are too many")
    try:
        fields = msgspec.json.decode(raw)
        if not isinstance(fields, dict):
            raise Corrupt(f"{damaged}: not a JSON object")
        if fields.get("format") != form:
            raise foreign(f"{name} is not in the format {form!r}")
        found = fields.get("format_version")
        checksum = fields.pop("checksum", None)
        body = msgspec.json.encode(fields)
        good = checksum == blake3(body).hexdigest() and raw == _written(fields, checksum)
        if isinstance(found, int) and not isinstance(found, bool) and found > version:
            doubt = "" if good else " (or it is damaged: its checksum does not match)"
            raise BadArgument(f"{name} has format version {found}, this fusefs knows up to {version}: a newer fusefs is needed{doubt}")
        if not good or found not in range(1, version + 1):
            raise Corrupt(f"{damaged}: its checksum does not match; restore it from a copy")
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        # RecursionError: hostile nesting. Nothing deeper than a document is on the stack for it to have hit.
        raise Corrupt(f"{damaged}: {str(error) or 'nested too deeply'}") from None


def _written(fields: dict[str, object], checksum: object) -> bytes:
    """The one way in which these fields are written."""
    return msgspec.json.format(msgspec.json.encode({**fields, "checksum": checksum}), indent=2) + b"\n"
