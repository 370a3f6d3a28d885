"""Memory of this process, told apart: what grows with the data, and what only looks as if it did.

Of what is resident, pages of mapped files (libraries above all) are the kernel's to drop. Of the process's own, malloc
keeps some that it was given back, more or less of it by chance. What it has given out is what the program holds.
Trade-off: Linux with glibc alone, and small Python objects, which have arenas of their own, count among the process's
own memory and not among what malloc has given out.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def given_out_bytes() -> int | None:
    """What malloc has given out and not got back: NumPy's, torch's and Python's larger objects. None without glibc."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo
    gc.collect()
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def resident_bytes() -> tuple[int, int]:
    """All that is resident, and what of it is the process's own, without mapped files."""
    status = Path("/proc/self/status").read_text()
    total, own = (int(status.partition(f"{name}:")[2].split()[0]) << 10 for name in ("VmRSS", "RssAnon"))
    return total, own
