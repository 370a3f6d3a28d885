"""Labelling against a bare loop over the same pixels and teacher, and on Ray with 1, 2 and 4 actors.

    python benchmarks/labelling.py --data ../shared/data         # 500 photos, MobileNetV2; about 6 minutes on 2 cores

The bare loop is what one would write by hand: read, decode, cut, ask, keep the logits' top k in memory; with the next
batch cut in a thread while the teacher works, as labelling does. It writes no store, hashes nothing, keeps no recipe.
Both take the same units in turn, in one process, and the ratio is the median over units of paired times. On Ray, speed
is counted after start-up, over many small units; more actors than cores cannot help, and
the number of cores stands in the results. Results go to benchmarks/results/labelling.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import ray
import torch
from results import environment, write_results

import kddata
from kddata import LabelStore, SoftLabels
from kddata.cluster import labelling as on_ray
from kddata.images import ImageRef, ImageSource, decode, open_source
from kddata.labelling import LabellingJob, label_unit, load_job_teacher, prepare
from kddata.store import Unit
from kddata.teacher import Teacher
from kddata.views import render


def bare_loop(store: LabelStore, unit: Unit, source: ImageSource, teacher: Teacher) -> int:
    """Asks the teacher about all views of a unit, and returns how many those are."""
    plan, spec = store.spec.plan, store.spec
    refs = [
        ImageRef(image_id=image_id, label=label, offset=offset, length=length)
        for image_id, label, offset, length in zip(*store.read_index(unit), strict=True)
    ]

    def pixels():
        for ref, data in source.stream(store.images[unit.shard].name, refs):
            image = decode(data, max_pixels=10**9)
            for k in range(unit.view_start, unit.view_stop):
                view = plan.draw(ref.image_id, k, *image.shape[1:])
                yield render(image, view, size_px=spec.teacher.size_px, interpolation=plan.interpolation)

    cut, kept, views = pixels(), [], 0
    with ThreadPoolExecutor(1) as pool:

        def ahead():
            return pool.submit(lambda: list(itertools.islice(cut, spec.batch_size)))

        future = ahead()
        while batch := future.result():
            future = ahead()
            kept.append(SoftLabels.from_logits(teacher(torch.stack(batch)), k=spec.k, temperatures=spec.temperatures))
            views += len(batch)
    return views


def in_turn(job: LabellingJob, rounds: int) -> dict[str, object]:
    """The bare loop and label_unit over the same units, one after the other, the first one alternating."""
    teacher, source = load_job_teacher(job), open_source(job.images)
    ratios, seconds, views = [], {"bare_loop": 0.0, "label_unit": 0.0}, 0
    for turn in range(rounds):
        store = prepare(dataclasses.replace(job, store=f"{job.store}-{turn}"), teacher=teacher)
        units = store.units()
        bare_loop(store, units[0], source, teacher)  # warms up
        for unit in units:
            runs = {
                "bare_loop": lambda store=store, unit=unit: bare_loop(store, unit, source, teacher),
                "label_unit": lambda store=store, unit=unit: label_unit(store, unit, source, teacher),
            }
            took = {}
            for name in sorted(runs, reverse=(turn + unit.number) % 2 == 0):
                start = time.perf_counter()
                runs[name]()
                took[name] = time.perf_counter() - start
                seconds[name] += took[name]
            ratios.append(took["bare_loop"] / took["label_unit"])
            views += (unit.stop - unit.start) * unit.num_views
    speeds = {f"{name}_views_per_s": views / s for name, s in seconds.items()}
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "units": len(ratios),
        "views": views,
        **speeds,
        "speed_ratio": quartiles[1],
        "speed_ratio_quartiles": quartiles,
    }


def with_actors(job: LabellingJob, teachers: int) -> dict[str, float]:
    """Views a second on Ray, and seconds until the first receipt.

    Counted from when each actor can have brought two units, the number that it has in hand, to the last receipt.
    """
    seen: list[tuple[float, int]] = []
    begin = time.perf_counter()
    on_ray.label(job, teachers=teachers, on_standing=lambda now: seen.append((time.perf_counter(), now.views)))
    receipts = seen[1:]  # the first call tells what was there
    (first, before), (last, after) = receipts[2 * teachers - 1], receipts[-1]
    return {"views_per_s": (after - before) / (last - first), "first_receipt_s": receipts[0][0] - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with imagenet_photos and weights")
    parser.add_argument("--shards", type=int, default=4, help="of photos, 125 each")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = kddata.TeacherArgs(
        arch="torchvision:mobilenet_v2",
        weights=os.path.abspath(f"{args.data}/weights/mobilenet_v2.tv.fp16.safetensors"),  # noqa: PTH100
        num_classes=1000,
        size_px=224,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = LabellingJob(
            images=os.path.abspath(f"{args.data}/imagenet_photos/shard-{{00000..{args.shards - 1:05}}}.tar"),  # noqa: PTH100
            store=f"{folder}/in-turn",
            teacher=teacher,
            plan=kddata.ViewPlan(),
            views_per_image=args.views,
            k=10,
            temperatures=(1.0, 2.0, 4.0),
            codec="compact",
            unit_images=32,
        )
        results: dict[str, object] = {"in_turn": in_turn(job, args.rounds)}
        print(json.dumps(results, indent=2), flush=True)
        actors = {}
        if args.actors:  # told that it has a CPU for each, so that more actors than cores can be shown too
            ray.init("local", num_cpus=max(args.actors), include_dashboard=False, log_to_driver=False)
        for teachers in args.actors:
            ray_job = dataclasses.replace(job, store=f"{folder}/ray-{teachers}", unit_images=8)
            actors[str(teachers)] = with_actors(dataclasses.replace(ray_job, views_per_image=2 * args.views), teachers)
            print(teachers, "actors", actors[str(teachers)], flush=True)
        if actors:
            results["actors"] = actors
    print("written to", write_results("labelling", {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
