"""Sealed JSON: a file holds the SHA-256 of itself, so that one flipped bit in it is noticed without another file.

The seal and `format_version` keep their places in every future format, so that an old library can tell a newer file
from a damaged one. Trade-off: text that people and `jq` read, at the price of one key that is not content.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kddata.cards import canonical_json
from kddata.errors import StoreDamagedError, StoreVersionError

RECORD_VERSION = 2  # the newest of records; 2 is a manifest with parts, all others have the version of their spec
_SEAL = '"seal": "{}"'  # with a space, which canonical JSON inside of values never has


def seal(value: dict[str, Any]) -> bytes:
    """JSON with sorted keys, one a line, and lists with one element a line; `seal` is the SHA-256 of all else."""
    lines = [f"{json.dumps(key)}: {_layout(item)}" for key, item in sorted(value.items())]
    text = "{\n" + ",\n".join([*lines, _SEAL.format("")]) + "\n}\n"
    return text.replace(_SEAL.format(""), _SEAL.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def unseal(data: bytes, *, where: str) -> dict[str, Any]:
    """The value that was sealed.

    Raises StoreVersionError for a newer format version, and StoreDamagedError for bytes that are not the sealed ones.
    """
    try:
        value = json.loads(data)
        digest = str(value.pop("seal"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise StoreDamagedError("a record of a store is sealed JSON", actual=repr(error), where=where) from error
    unsealed = data.replace(_SEAL.format(digest).encode(), _SEAL.format("").encode())
    if hashlib.sha256(unsealed).hexdigest() != digest:
        raise StoreDamagedError("a record of a store has the bytes that were written", where=where)
    version = value.get("format_version", RECORD_VERSION)
    if isinstance(version, int) and version > RECORD_VERSION:
        raise StoreVersionError(
            f"this library reads store format versions up to {RECORD_VERSION}",
            actual=f"version {version}",
            where=where,
            fix="upgrade kddata",
        )
    return value


def _layout(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (dict, list, tuple)):
        return "[\n" + ",\n".join(canonical_json(item) for item in value) + "\n]"
    return canonical_json(value)
