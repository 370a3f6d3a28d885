"""The driver's lock: of several drivers on one store one works, and the others are told who.

A lock is a file lock-N.json, created once; whoever finds its owner dead takes over by creating lock-(N+1).json. An
owner on this machine is dead when its process is gone; one elsewhere, when its lock has not been renewed for a lease.
No clocks are compared. Trade-off: the lock is a courtesy that saves work. What keeps a store whole is that files are
created once and equal units have equal bytes, so that an owner who wakes after a takeover harms nothing.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from kddata.errors import StoreBusyError, StoreError
from kddata.store.sealing import seal, unseal
from kddata.store.storage import Storage, open_storage

LOCK = re.compile(r"^lock-\d{6}\.json$")
LEASE_S = 30.0
RENEW_S = 5.0
_SWEEPS = 3  # of the lock of one driver, before it is told: not even a folder may be there
_held: set[str] = set()  # tokens of the drivers of this process
_log = logging.getLogger(__name__)


@contextmanager
def driving(url: str, *, lease_s: float = LEASE_S, renew_s: float = RENEW_S) -> Iterator[Driver]:
    """A block in which this process is the one driver of the store at a URL; the store need not exist yet.

    Args:
        lease_s: how long an owner on another machine is watched before it counts as dead.
        renew_s: between two signs of life of this driver.

    Raises StoreBusyError, naming the owner, where another driver lives: at once on this machine, as soon as it gives a
    sign of life elsewhere.
    """
    driver = Driver(open_storage(url), lease_s=lease_s)
    stop = threading.Event()
    thread = threading.Thread(target=driver.keep, args=(stop, renew_s), name="kddata lock", daemon=True)
    thread.start()
    try:
        yield driver
    except BaseException:
        with suppress(OSError, StoreError):  # what ended the block is what counts
            driver.release(stop, thread)
        raise
    driver.release(stop, thread)


def require_free(url: str) -> None:
    """Raises StoreBusyError where a store's driver is seen to live, on this machine; `driving` is sure of it."""
    storage = open_storage(url)
    number, data = _newest(storage)
    if data is not None and not _is_dead(storage, number, data, lease_s=0):
        raise _busy(storage, data)


class Driver:
    """The holder of a store's lock. Made by `driving`."""

    def __init__(self, storage: Storage, *, lease_s: float) -> None:
        self._storage = storage
        self._token = secrets.token_hex(8)
        self._value = {**_here(), "beat": 0, "token": self._token}
        self._lost = False
        _held.add(self._token)
        try:
            self._number = self._acquire(lease_s)
        except BaseException:
            _held.discard(self._token)
            raise

    def check(self) -> None:
        """Raises StoreBusyError where another driver has taken over, as this one gave no sign of life for a lease."""
        if self._lost:
            raise StoreBusyError(
                "a store has one driver",
                actual=f"{_name(_newest(self._storage)[1])}, which took over from this one",
                where=self._storage.url,
                fix="let it finish; the same command then says so, and nothing is lost",
            )

    def keep(self, stop: threading.Event, renew_s: float) -> None:
        """Gives signs of life until told to stop, or until another driver has taken over."""
        while not stop.wait(renew_s):
            try:
                self._renew()
            except (OSError, StoreError) as error:
                _log.warning("the lock of %s was not renewed: %s", self._storage.url, error)
            if self._lost:
                return

    def release(self, stop: threading.Event, thread: threading.Thread) -> None:
        """Ends the signs of life and removes the lock, and those of the dead before it."""
        _held.discard(self._token)
        stop.set()
        thread.join()
        if not self._lost and self._mine():
            for number in range(self._number, 0, -1):  # falling, so that no gap hides a later one
                self._storage.remove(_file(number))
            if not self._storage.sizes():  # a refused job leaves no folder behind that was made for its lock alone
                with suppress(OSError):  # another driver has come meanwhile
                    self._storage.remove_folder("")

    def _acquire(self, lease_s: float) -> int:
        swept = 0
        while True:
            number, data = _newest(self._storage)
            if data is not None and not _is_dead(self._storage, number, data, lease_s):
                raise _busy(self._storage, data)
            if data is not None:
                _log.warning("%s: taking over from %s, which is gone", self._storage.url, _name(data))
            self._number = number + 1
            try:
                created = self._storage.create(_file(self._number), seal(self._value))
            except FileNotFoundError:  # it slept while another finished the store, and swept what was half-written
                swept += 1
                if swept == _SWEEPS:
                    raise
                continue
            if created:
                if self._mine():
                    return self._number
                if _newest(self._storage)[0] < self._number:  # a gap below: the owner has released its locks meanwhile
                    self._storage.remove(_file(self._number))  # else another took over, and this one leads to its lock

    def _mine(self) -> bool:
        """Whether the newest lock is this driver's."""
        number, data = _newest(self._storage)
        return number == self._number and data is not None and _parse(data).get("token") == self._token

    def _renew(self) -> None:
        if not self._mine():
            self._lost = True
            return
        self._value["beat"] += 1
        with self._storage.replacing(_file(self._number)) as out:
            out.write(seal(self._value))


def _busy(storage: Storage, data: bytes) -> StoreBusyError:
    return StoreBusyError(
        "a store has one driver",
        actual=_name(data),
        where=storage.url,
        fix="let it finish, or stop it and run the same command again",
    )


def _file(number: int) -> str:
    return f"lock-{number:06d}.json"


def _newest(storage: Storage) -> tuple[int, bytes | None]:
    """The last lock of an unbroken row: its number and content; (0, None) where there is none."""
    last: tuple[int, bytes | None] = (0, None)
    for number in count(1):
        try:
            last = number, storage.read(_file(number))
        except (FileNotFoundError, NotADirectoryError):
            break
    return last


def _is_dead(storage: Storage, number: int, data: bytes, lease_s: float) -> bool:
    """Whether the owner of a lock is gone; one that cannot be seen from here is watched for at most a lease."""
    owner, here = _parse(data), _here()
    if owner.get("machine") == here["machine"]:
        if owner["pid"] == here["pid"]:
            return owner["token"] not in _held
        return _started(owner["pid"]) != owner["started"]
    _log.warning("%s is locked by %s; watching it for up to %g s", storage.url, _name(data), lease_s)
    end = time.monotonic() + lease_s
    while time.monotonic() < end:
        time.sleep(min(1.0, lease_s / 10))
        try:
            if storage.read(_file(number)) != data:
                return False
        except FileNotFoundError:
            return True
    return True


def _parse(data: bytes) -> dict[str, Any]:
    try:
        return unseal(data, where="lock")
    except StoreError:  # torn by a writer that died: nobody's, until a lease has passed
        return {}


def _name(data: bytes | None) -> str:
    owner = _parse(data or b"")
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"


def _here() -> dict[str, Any]:
    """This process. `machine` is the place where its id means something: one boot, one namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        machine = f"{uuid.getnode()}"
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine, "pid": pid, "started": _started(pid)}


def _started(pid: int) -> str | None:
    """When a process started, as far as this system tells; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie of the kernel's kind writes no more
    except OSError:
        pass
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
