"""Training from cached labels against plain hard-label training and against a teacher in the loop; and its memory.

    python benchmarks/training.py --data ../shared/data          # about 9 minutes on 2 cores; --device cuda with a GPU
    python benchmarks/training.py --memory                       # about 5 minutes

Three students of one architecture and seed take the same steps over the same views in turn, one step each, the first
one rotating: by cross-entropy with the ground truth (`hard`), by `kd` from the store (`cached`), and by `kd` with the
store's own ResNet-50 in the loop (`live`). The loader runs in the training process and is the same in all three, so
that a ratio holds all that a step costs. Ratios are medians over steps of paired times. The teacher's weights are
random: they cost what trained ones do.

Memory is that of a process of its own, in the first quarter of an epoch and in all of it, over stores of 2^17, 2^18 and
2^20 views of small images: a half, one and four windows of the order, of units of one size. Every 16th step is taken.
Three figures, at their largest: what is resident, with the mapped pages of libraries and files; what of it is the
process's own; and what malloc has given out and not got back, which is what training holds: the rest of its own is
malloc's, which keeps more or less of what it got back by chance. Results go to benchmarks/results/training.json, and
training_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
import torchvision
from results import environment, write_results
from safetensors.torch import save_file

import kddata
from kddata import losses
from kddata.labelling import LabellingJob, label_store
from kddata.replay import Replay, replay_loader
from kddata.store import LabelStore
from kddata.testing import make_store
from kddata.testing.memory import given_out_bytes, resident_bytes
from kddata.training import DataArgs, OptimizerArgs, Step, StudentArgs, TrainingJob, normaliser, training_steps
from kddata.training.pupil import Pupil
from kddata.training.students import make_optimizer
from kddata.training.teaching import teacher_in_the_loop

METHODS = {
    "hard": {"name": "hard"},
    "cached": {"name": "kd", "temperature": 2, "alpha": 0.5},
    "live": {"name": "kd", "temperature": 2, "alpha": 0.5},
}
MEMORY_VIEWS = {"2^17": 128, "2^18": 256, "2^20": 1024}  # of 1,024 images each
EVERY = 16


def steps_of(job: TrainingJob, steps: range, *, device: str, live: bool = False) -> Iterator[Step]:
    """The training steps of a job, by number, without files of a run."""
    store, method = LabelStore.open(job.store), losses.make(**job.method)
    pixels_of = normaliser(store.spec.teacher.mean, store.spec.teacher.std, device)
    pupil = Pupil(job, store, method, pixels_of=pixels_of, device=device)
    replay = Replay(
        store,
        batch_size=job.data.batch_size,
        size_px=job.data.size_px,
        seed=job.data.seed,
        teacher_px=store.spec.teacher.size_px if live else None,
    )
    return training_steps(
        pupil.network,
        replay_loader(replay, steps, num_workers=0, pin_memory=False),
        make_optimizer(job.optimizer, pupil.network, pupil.student),
        method,
        first_step=0,
        learning_rate=lambda step: job.optimizer.lr,
        pixels_of=pixels_of,
        teach=teacher_in_the_loop(job.teacher, store, method, device) if live and job.teacher is not None else None,
    )


def speeds(args: argparse.Namespace, folder: str) -> dict[str, object]:
    """Seconds a step of the three arms, and their ratios."""
    weights = f"{folder}/resnet50.safetensors"
    torch.manual_seed(0)
    save_file(torchvision.models.resnet50().state_dict(), weights)
    teacher = kddata.TeacherArgs(arch="torchvision:resnet50", weights=weights, num_classes=1000, size_px=224)
    labelled = label_store(
        LabellingJob(
            images=os.path.abspath(f"{args.data}/imagenet_photos/shard-{{00000..{args.shards - 1:05}}}.tar"),  # noqa: PTH100
            store=f"{folder}/photos",
            teacher=teacher,
            plan=kddata.ViewPlan(),
            k=10,
            temperatures=(1.0, 2.0),
            codec="compact",
            batch_size=args.batch_size,
            threads=args.threads,
            device=args.device,
        )
    )
    arms = {
        name: steps_of(
            TrainingJob(
                store=labelled.store.url,
                run=f"{folder}/{name}",
                student=StudentArgs(arch=args.student, num_classes=1000),
                method=method,
                data=DataArgs(batch_size=args.batch_size, size_px=224),
                optimizer=OptimizerArgs(lr=0.01, epochs=1),
                teacher=teacher if name == "live" else None,
            ),
            range(args.steps + args.warmup),
            device=args.device,
            live=name == "live",
        )
        for name, method in METHODS.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(args.steps + args.warmup):
        for name in names[turn % 3 :] + names[: turn % 3]:
            begin = time.perf_counter()
            next(arms[name])
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begin)
        print(f"step {turn + 1}", {name: round(times[-1], 3) for name, times in taken.items()}, flush=True)
    taken = {name: times[args.warmup :] for name, times in taken.items()}

    def ratio(one: str, other: str) -> dict[str, float | list[float]]:
        paired = statistics.quantiles([a / b for a, b in zip(taken[one], taken[other], strict=True)], n=4)
        return {"median": paired[1], "quartiles": paired, "of_totals": sum(taken[one]) / sum(taken[other])}

    return {
        "student": args.student,
        "teacher": teacher.arch,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "step_s": {name: statistics.median(times) for name, times in taken.items()},
        "cached_over_hard": ratio("cached", "hard"),
        "live_over_cached": ratio("live", "cached"),
    }


def memory_of(store: str) -> None:
    """Trains over every 16th step of an epoch, and prints what memory it took. Run as a process of its own."""
    torch.set_num_threads(1)
    job = TrainingJob(
        store=store,
        run="none",
        student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=10),
        method=METHODS["cached"],
        data=DataArgs(batch_size=256, size_px=16),
        optimizer=OptimizerArgs(lr=0.01, epochs=1),
    )
    rows = LabelStore.open(store).num_rows
    chosen = range(0, rows // 256, EVERY)
    seen: dict[str, list[float]] = {"own": [], "resident": [], "given_out": []}
    for _ in steps_of(job, chosen, device="cpu"):
        resident, own = resident_bytes()
        for name, num_bytes in (("own", own), ("resident", resident), ("given_out", given_out_bytes() or 0)):
            seen[name].append(num_bytes / 2**20)
    parts = {"quarter": len(chosen) // 4, "epoch": len(chosen)}
    most = {f"{name}_{part}_mib": max(seen[name][:stop]) for name in seen for part, stop in parts.items()}
    print(json.dumps({"rows": rows, **most}))


def memory(folder: str) -> dict[str, object]:
    """What training takes over stores of three sizes, each in a process of its own."""
    found = {}
    for name, views in MEMORY_VIEWS.items():
        store = make_store(
            f"{folder}/{name}",
            num_images=1024,
            views_per_image=views,
            unit_images=256,
            unit_views=64,  # units of one size: a unit is read whole
            k=10,
            temperatures=(1.0, 2.0),
        )
        child = subprocess.run([sys.executable, __file__, "--memory-of", store.url], capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        found[name] = json.loads(child.stdout)
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with imagenet_photos")
    parser.add_argument("--shards", type=int, default=4, help="of photos, 125 each")
    parser.add_argument("--student", default="torchvision:mobilenet_v3_small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            name, results = "training_memory", memory(folder)
        else:
            name, results = "training", {"speed": speeds(args, folder)}
            print(json.dumps(results, indent=2), flush=True)
    print("written to", write_results(name, {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
