"""Strikes a labelling run at every step by which it touches its store, in every way, and counts what does not mend.

    python benchmarks/chaos.py                 # every step x every mode on a disk, 400 double kills, S3: minutes
    python benchmarks/chaos.py --every 10      # every tenth plan

A cycle is: a run in a process of its own, struck as planned (killed with SIGKILL where it is to die), then the same run
undisturbed, then the comparison of every byte of every file. On S3 (moto's server on loopback) death is an exception
after which no step is done any more. Results go to benchmarks/results/chaos.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from results import environment, write_results

from kddata.store import s3
from kddata.testing import chaos, make_images

DOUBLE_KILLS = 400


def on_a_disk(root: Path, *, every: int, processes: int) -> dict[str, Any]:
    run = chaos.SmallRun(make_images(root / "images", num_images=3, shards=1), unit_images=1)
    steps = chaos.count_steps(run, str(root / "counted"))
    plans = [[fault] for fault in chaos.faults_at(len(steps), chaos.MODES)] + list(
        chaos.pairs(len(steps), DOUBLE_KILLS)
    )
    plans = plans[::every]
    begin = time.perf_counter()
    wrong = chaos.survey(run, str(root), plans, processes=processes)
    return report("disk", len(steps), len(plans), wrong, time.perf_counter() - begin)


def on_s3(root: Path, *, every: int) -> dict[str, Any]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import fsspec

    fsspec.filesystem("s3").mkdir("bucket")
    s3.PAUSE_S = 0.001
    run = chaos.SmallRun(make_images(root / "four", num_images=4, shards=1), unit_images=1)
    wanted = chaos.contents(chaos.undisturbed(run, "s3://bucket/wanted"))
    steps = chaos.count_steps(run, "s3://bucket/counted")
    modes: tuple[chaos.Mode, ...] = ("kill before", "kill after", "raise", "tear", "lose")
    faults = list(islice(chaos.faults_at(len(steps), modes), 0, None, every))
    begin = time.perf_counter()
    wrong = []
    for number, fault in enumerate(faults):
        complaint = chaos.survives(run, f"s3://bucket/{number}", [fault], wanted, fork=False)
        wrong += [] if complaint is None else [complaint]
    server.stop()
    return report("S3", len(steps), len(faults), wrong, time.perf_counter() - begin)


def report(where: str, steps: int, cycles: int, wrong: list[str], seconds: float) -> dict[str, Any]:
    print(f"{where}: {steps} steps, {cycles} cycles in {seconds:.0f} s, {len(wrong)} did not mend")
    for complaint in wrong[:10]:
        print("  ", complaint)
    return {"steps": steps, "cycles": cycles, "not_mended": len(wrong), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="of the plans, only every so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    memory = Path("/dev/shm")  # a disk without the time that syncing takes
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        results = {
            "environment": environment(),
            "every": args.every,
            "disk": on_a_disk(Path(folder), every=args.every, processes=args.processes),
            "s3": on_s3(Path(folder), every=args.every),
        }
    print(write_results("chaos", results))
    if results["disk"]["not_mended"] or results["s3"]["not_mended"]:  # type: ignore[index]
        raise SystemExit(1)


if __name__ == "__main__":
    main()
