"""Opening a store and reading its first batch, at 10^4 rows and at 10^8: a real store, and a manifest that says more.

    python benchmarks/opening.py          # a minute

The large store is simulated: its manifest names as many units as stores of that size have, and one label file is there,
which stands for the first one that an epoch reads. So the cost of all that grows with a store is real (the manifest,
its rules, the order of the first window), and that of a unit is equal. Memory is the peak of a process of its own.
Results go to benchmarks/results/opening.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results import environment, write_results

from kddata.store import LabelStore
from kddata.store.manifest import MANIFEST, labels_name, twin
from kddata.store.sealing import seal
from kddata.testing import make_store

FIRST_BATCH = """
import json, sys, time
import kddata
from kddata.reader import order_of
begin = time.perf_counter()
store = kddata.LabelStore.open(sys.argv[1])
opened = time.perf_counter()
order = order_of(store, 0)
window = order.window_at(0, 0)
planned = time.perf_counter()
rows = store.read(0).take(slice(0, 256))
read = time.perf_counter()
print(json.dumps({
    "rows": order.num_rows,
    "open_ms": (opened - begin) * 1e3,
    "order_ms": (planned - opened) * 1e3,
    "first_unit_ms": (read - planned) * 1e3,
    "rss_mib": int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024,
}))
"""


def grow(store: LabelStore, root: Path, units: int) -> str:
    """A copy of a store of one unit whose manifest names so many units, each with the bytes of the first."""
    shutil.copytree(Path(store.url), root)
    content = copy.deepcopy(store.manifest)
    assert content is not None
    first = content["units"][0]
    content["units"] = [
        {**first, "number": i, "file": labels_name(i), "view_start": 0, "view_stop": first["view_stop"]}
        for i in range(units)
    ]
    for key in ("rows", "bytes", "correct", "labelled"):
        content["totals"][key] *= units
    content["totals"]["units"] = units
    data = seal(content)
    for name in (MANIFEST, twin(MANIFEST)):
        (root / name).write_bytes(data)
    return str(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**8])
    args = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = make_store(root / "small", num_images=256, views_per_image=32, unit_images=1024, k=10)
        for rows in args.rows:
            url = grow(store, root / f"rows-{rows}", -(-rows // store.manifest["units"][0]["rows"]))
            runs = []
            for _ in range(args.repeats):
                done = subprocess.run(
                    [sys.executable, "-c", FIRST_BATCH, url], capture_output=True, text=True, check=True
                )
                runs.append(json.loads(done.stdout))
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            results[f"{rows:.0e}"] = {**medians, "manifest_bytes": (Path(url) / MANIFEST).stat().st_size}
            print(rows, results[f"{rows:.0e}"], flush=True)
    print("written to", write_results("opening", {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
