"""Flips bits, cuts, removes, swaps and replaces files of a real small store on disk, and counts what `verify` misses.

    python benchmarks/damage.py                 # 20,000 flips: minutes
    python benchmarks/damage.py --flips 2000

Each fault is alone in the store when it is verified, and undone after. Flips are even over the files of the store, then
over the bits of a file, so that its small records are hit as often as its label shards. After every flip in a label
shard, the shard is also read, which must raise. Results go to benchmarks/results/damage.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from results import environment, write_results

from kddata import rng
from kddata.errors import StoreDamagedError
from kddata.labelling import LabellingJob, label_store
from kddata.store import LabelStore, verify_store
from kddata.testing import fake_teacher_args, make_images
from kddata.views import ViewPlan


def make(root: Path) -> LabelStore:
    """A store of two generations: the second added views and an image shard."""
    make_images(root / "images", num_images=24, shards=3)
    for extend, shards, views in ((False, "{00000..00001}", 4), (True, "{00000..00002}", 6)):
        job = LabellingJob(
            images=f"{root}/images/{shards}.tar",
            store=str(root / "store"),
            teacher=fake_teacher_args(),
            plan=ViewPlan(),
            views_per_image=views,
            k=4,
            temperatures=(1.0, 4.0),
            unit_images=4,
        )
        store = label_store(job, extend=extend).store
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = make(root)
        begin, (tried, missed, silent) = time.monotonic(), measure(store, root / "store", args.flips, args.seed)
        seconds = time.monotonic() - begin
    for kind, count in tried.items():
        print(f"{kind:<10} {count:>7,} tried, {missed[kind]} missed")
    print(f"damaged label shards that were read without an error: {silent}; {seconds:.0f} s")
    write_results(
        "damage",
        {
            "environment": environment(),
            "seed": args.seed,
            "tried": dict(tried),
            "missed": {kind: missed[kind] for kind in tried},
            "damaged_shards_read": silent,
            "seconds": round(seconds, 1),
        },
    )


def measure(store: LabelStore, root: Path, flips: int, seed: int) -> tuple[Counter[str], Counter[str], int]:
    """(faults tried, faults missed, damaged label shards that were read), by kind of fault."""
    names = list(store.storage.sizes())
    whole = {name: (root / name).read_bytes() for name in names}
    units = {unit["file"]: unit["number"] for unit in (store.manifest or {})["units"]}
    tried, missed, silent = Counter[str](), Counter[str](), 0

    def check(kind: str, *damaged: str) -> None:
        tried[kind] += 1
        missed[kind] += not set(damaged) <= {problem.file for problem in verify_store(store.url)}
        for name in damaged:
            (root / name).write_bytes(whole[name])

    random = rng.stream(seed, "damage").random
    for _ in range(flips):
        name = names[int(random() * len(names))]
        data = bytearray(whole[name])
        data[int(random() * len(data))] ^= 1 << int(random() * 8)
        (root / name).write_bytes(data)
        if name in units:
            try:
                store.read(units[name])
                silent += 1
            except StoreDamagedError:
                pass
        check("flip", name)
    for name, data in whole.items():
        for share in range(10):
            (root / name).write_bytes(data[: len(data) * share // 10])
            check("truncated", name)
        (root / name).unlink()
        check("missing", name)
        (root / f"{name}.stray").write_bytes(b"x")
        check_extra = {problem.file for problem in verify_store(store.url)}
        tried["extra"] += 1
        missed["extra"] += f"{name}.stray" not in check_extra
        (root / f"{name}.stray").unlink()
        for other in names:
            if other < name and whole[other] != data:
                (root / name).write_bytes(whole[other])
                (root / other).write_bytes(data)
                check("swapped", name, other)
                (root / name).write_bytes(whole[other])
                check("stale", name)
    assert verify_store(store.url) == [], "every fault was undone"
    return tried, missed, silent


if __name__ == "__main__":
    main()
