"""Checkpoints: all that training needs to go on after N steps, in files that prove to be whole.

    checkpoints/N.pt      what torch.save writes, then a seal: 8 bytes of a mark, 32 of the SHA-256 of all before them

A file is published whole by its storage; the seal finds what befalls it later. The two newest are kept: where the
newest is damaged, training goes on from the one before it, and says so. Trade-off: twice the room of one checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from typing import IO, Any, cast

import torch

from kddata.store.storage import Storage

FOLDER = "checkpoints"
KEPT = 2
_MARK = b"kddata\x00\x01"
_SEAL_BYTES = len(_MARK) + hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Nothing is read or made before the first call."""

    def __init__(self, files: Storage) -> None:
        self._files = files

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Publishes the state after so many steps, then removes all older ones but the newest of them."""
        name = f"{FOLDER}/{step:09d}.pt"
        with self._files.replacing(name) as file:
            torch.save(state, cast(IO[bytes], file))
            file.write(_MARK + bytes.fromhex(file.sha256))
        for old in [other for other in self._names() if other < name][: 1 - KEPT]:
            self._files.remove(old)

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, on the CPU, or None where there is none. No code is loaded (weights_only)."""
        for name in reversed(self._names()):
            data = memoryview(self._files.read(name))
            content, seal = data[:-_SEAL_BYTES], bytes(data[-_SEAL_BYTES:])
            if seal == _MARK + hashlib.sha256(content).digest():
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            _log.warning("%s of %s is damaged and passed over; training goes on from before it", name, self._files.url)
        return None

    def remove(self) -> None:
        """Removes all of them."""
        self._files.remove_folder(FOLDER)

    def _names(self) -> list[str]:
        return [name for name in self._files.sizes(FOLDER) if name.endswith(".pt")]
