"""Named random streams: the only source of randomness in kddata.

A stream is a pure function of a seed and a key. Keys are hashed, never added, so that neighbouring seeds and
neighbouring keys are independent. Trade-off: a few microseconds per stream for never having to think about order.

Callers that must stay reproducible across numpy versions use `Generator.random` and `Generator.bytes` alone: numpy
keeps the Philox bit stream stable, but may change how other distributions consume it.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key_bytes(seed: int, *key: int | str) -> bytes:
    """16 bytes that depend on every part of (seed, key) and on the borders between them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *key):
        if isinstance(part, (bool, float)) or not isinstance(part, (int, str)):
            raise TypeError(f"a stream key holds ints and strings; got {part!r}")
        data = str(int(part)).encode() if isinstance(part, int) else part.encode()
        tag = b"i" if isinstance(part, int) else b"s"
        digest.update(tag + len(data).to_bytes(8, "little") + data)
    return digest.digest()


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """A generator for (seed, key): Philox 4x64 keyed by a 128-bit BLAKE2b hash of its arguments.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key_bytes(seed, *key), "little")))


def unit_interval(seed: int, *key: int | str) -> float:
    """A number in [0, 1) that is a pure function of (seed, key); cheaper than a whole stream."""
    return (int.from_bytes(key_bytes(seed, *key)[:8], "little") >> 11) * 2.0**-53
