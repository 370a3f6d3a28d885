"""Ten minutes of labelling, verifying and training over and over: whether memory, files or processes add up.

    python benchmarks/soak.py                 # 10 minutes; --minutes for less

In each cycle one process labels a small store on Ray with two actors, verifies it, trains a student from it with a
loader process, and removes both. After each, its memory without mapped files (RssAnon), its open files and the
processes below it are counted. Memory's slope is that of a line through all cycles after the first minute. Results go
to benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from results import environment, write_results

from kddata import LabellingJob, ViewPlan
from kddata.cluster.labelling import label
from kddata.testing import fake_teacher_args, make_images
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob, train


def cycle(images: str, folder: Path) -> None:
    """Labels, verifies, trains and removes."""
    job = LabellingJob(
        images=images,
        store=str(folder / "store"),
        teacher=fake_teacher_args(),
        plan=ViewPlan(),
        views_per_image=4,
        k=10,
        temperatures=(1.0, 2.0),
        unit_images=16,
    )
    store = label(job, teachers=2).store
    assert store.verify() == []
    train(
        TrainingJob(
            store=store.url,
            run=str(folder / "run"),
            student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=10),
            method={"name": "kd", "temperature": 2},
            data=DataArgs(batch_size=32, size_px=16),
            optimizer=OptimizerArgs(lr=0.05, epochs=1),
        ),
        num_workers=1,
    )
    shutil.rmtree(folder / "store")
    shutil.rmtree(folder / "run")


def standing() -> dict[str, float]:
    """This process's own memory in MiB, its open files, and how many processes are below it."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    below, border = set(), {int(Path("/proc/self").resolve().name)}
    while border:
        border = {pid for pid, parent in parents.items() if parent in border}
        below |= border
    return {
        "own_mib": int(status.partition("RssAnon:")[2].split()[0]) / 1024,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "processes": len(below),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder) / "images", num_images=64)
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        begin = time.monotonic()
        while time.monotonic() - begin < 60 * args.minutes:
            cycle(images, Path(folder))
            seen.append({"minutes": (time.monotonic() - begin) / 60, **standing()})
            print(json.dumps(seen[-1]), flush=True)
        ray.shutdown()
    late = [one for one in seen if one["minutes"] > min(1.0, args.minutes / 2)]
    minutes, own = (np.array([one[key] for one in late]) for key in ("minutes", "own_mib"))
    least_most = {
        key: [min(x[key] for x in late), max(x[key] for x in late)] for key in ("own_mib", "files", "processes")
    }
    slope = float(np.polyfit(minutes, own, 1)[0])
    results = {"cycles": len(seen), "own_mib_per_minute": slope, "least_and_most": least_most}
    print(json.dumps(results, indent=2))
    print("written to", write_results("soak", {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
