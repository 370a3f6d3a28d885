"""Opening a store and reading its first batch, at 10^4 rows and at 10^8: a real store, and a manifest that says more.

    python benchmarks/opening.py          # a minute

The large store is simulated: its manifest names as many units, and image shards of 1,024 images, as a store of that
size has, and one label file is there, which stands for the first one that an epoch reads. So the cost of all that grows
with a store is real (the manifest and its parts, their rules, the order of the first window), and that of a unit is
equal. What grows by design is the first window, to 2^18 rows, which a store of 10^4 does not fill: 10^6 rows show it.
Memory is the peak of a process of its own.
Results go to benchmarks/results/opening.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from results import environment, write_results

from kddata.store import LabelStore, Receipt, open_storage, plan_units
from kddata.store.folding import fold
from kddata.store.manifest import HEADER_KEYS, publish
from kddata.store.naming import MANIFEST, twin
from kddata.store.sealing import unseal
from kddata.testing import make_store

FIRST_BATCH = """
import json, sys, time
import kddata
from kddata.reader import order_of
begin = time.perf_counter()
store = kddata.LabelStore.open(sys.argv[1])
opened = time.perf_counter()
names = set(store.shard_names)
named = time.perf_counter()
order = order_of(store, 0)
window = order.window_at(0, 0)
planned = time.perf_counter()
rows = store.read(0).take(slice(0, 256))
read = time.perf_counter()
print(json.dumps({
    "rows": order.num_rows,
    "open_ms": (opened - begin) * 1e3,
    "image_shards_ms": (named - opened) * 1e3,
    "order_ms": (planned - named) * 1e3,
    "first_unit_ms": (read - planned) * 1e3,
    "rss_mib": int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024,
}))
"""


def grow(store: LabelStore, root: Path, num_units: int) -> str:
    """A copy of a store of one unit whose manifest names so many, each with the bytes of the first, four to a shard."""
    shutil.copytree(Path(store.url), root)
    content = unseal((root / MANIFEST).read_bytes(), where=str(root))
    shard, first = store.images[0], store.units()[0]
    names = (f"train-{i:05d}.tar" for i in range(-(-num_units // 4)))
    shards = [dataclasses.replace(shard, name=name, num_images=4 * shard.num_images) for name in names]
    views = (0, first.view_stop)
    planned = plan_units(
        [one.num_images for one in shards], views=views, unit_images=shard.num_images, unit_views=views[1]
    )
    units = planned[:num_units]
    totals = {name: content["totals"][name] for name in ("correct", "entropy_sum", "labelled", "tail_sum")}
    entry = {name: content["units"][0][name] for name in ("rows", "bytes", "sha256", "images")}
    receipts = (
        Receipt(unit=unit.number, fingerprint=store.spec.fingerprint, bad=(), **entry, **totals) for unit in units
    )
    head = {key: content[key] for key in HEADER_KEYS}
    for name in (MANIFEST, twin(MANIFEST)):
        (root / name).unlink()
    storage = open_storage(str(root))
    publish(storage, fold(storage, head, shards, units, receipts, files=content["files"]))
    return str(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**6, 10**8])
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
            num_bytes = sum(path.stat().st_size for path in Path(url).glob("*-000001.*") if ".copy." not in path.name)
            results[f"{rows:.0e}"] = {**medians, "manifest_bytes": num_bytes}
            print(rows, results[f"{rows:.0e}"], flush=True)
    print("written to", write_results("opening", {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
