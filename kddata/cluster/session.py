"""Starting or joining Ray, and getting out of it the errors that kddata put in.

A job alone starts a Ray of its own, on this machine and for its own lifetime. Under `ray job submit`, or with
RAY_ADDRESS set, it joins that cluster. Trade-off: there is no address setting in job files, so that one file runs
everywhere; the place is chosen by whoever starts it, as with every Ray program.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

import ray

from kddata.errors import KddataError


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A block within which Ray is up. A Ray that is already up is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # a replaced actor is no news for the terminal
        with _silent_stderr():  # and neither is that this level was set
            # "local": a plain init would follow the stale address file of some older cluster.
            ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own aborts the process after 3 s, in the middle of tidying up
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """A block in which what native code writes to stderr is dropped; exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def original(error: BaseException) -> BaseException:
    """The KddataError inside an error of Ray, where there is one; else the error itself."""
    queue, seen = [error], set()
    while queue:
        found = queue.pop(0)
        if isinstance(found, KddataError) and type(found).__module__ == KddataError.__module__:
            return found
        seen.add(id(found))
        inner = [
            getattr(found, "cause", None),
            getattr(found, "controller_failure", None),
            *getattr(found, "worker_failures", {}).values(),
            found.__cause__,
        ]
        queue += [x for x in inner if isinstance(x, BaseException) and id(x) not in seen]
    return error
