"""Loading photos for a student: this library against webdataset with the same crops, and against ImageFolder.

    python benchmarks/loader.py --data ../shared/data            # 500 photos, a minute or two

Every contender brings uint8 batches [50, 3, 224, 224] of random crops, in this process and on one core, and nothing
more: no normalisation, which belongs on the device. They take batches in turn, so that what else the machine does hits
all alike, and what is compared is CPU time: images a second of one core. A round is as many batches as an epoch of the
store with 4 views has, so that what is cut ahead in it is used in it. Ratios are medians over rounds.

    kddata                    rows of a store in shuffled order, joined with photos in tars by byte range; every photo
                              checked against the hash of what was labelled
    kddata, 4 views a visit   the same with data.views_per_visit=4, over a store of 4 views a photo
    webdataset, torchvision   the same photos and boxes: tars read in order, torchvision's decode_jpeg and resized_crop
    webdataset, pil           the same boxes, decoded by its own PIL path, cropped by torchvision on PIL images
    imagefolder               the photos as files, ImageFolder and RandomResizedCrop on PIL images

Results go to benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from results import environment, write_results
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

import kddata
from kddata.images import open_source
from kddata.labelling import LabellingJob, label_store
from kddata.replay import Replay
from kddata.store import LabelStore
from kddata.testing import fake_teacher_args
from kddata.views import View

SIZE_PX, BATCH = 224, 50
SQUARE = (SIZE_PX, SIZE_PX)


def labelled(images: str, folder: str, views: int) -> LabelStore:
    """A store of the photos with so many views of each, by a teacher that takes no time."""
    job = LabellingJob(
        images=images,
        store=folder,
        teacher=fake_teacher_args(num_classes=1000, size_px=32),
        plan=kddata.ViewPlan(),
        views_per_image=views,
        k=10,
        codec="compact",
    )
    return label_store(job).store


def of_kddata(store: LabelStore, views_per_visit: int) -> Iterator[int]:
    """Batch sizes, epoch after epoch."""
    replay = Replay(store, batch_size=BATCH, size_px=SIZE_PX, seed=0, views_per_visit=views_per_visit)
    step = 0
    while True:
        yield len(replay[step])
        step += 1


def of_webdataset(shards: list[str], view_of: dict[str, View], pil: bool) -> Iterator[int]:
    """Batch sizes, epoch after epoch."""

    def crop(sample: tuple[str, Any]) -> torch.Tensor:
        key, image = sample
        view = view_of[key]
        if not pil:
            image = torch.ops.image.decode_jpeg(
                torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB.value, False
            )
        top, left, height, width = view.box
        found = functional.resized_crop(
            image, top, left, height, width, SQUARE, InterpolationMode.BILINEAR, antialias=True
        )
        if view.flip:
            found = functional.horizontal_flip(found)
        return functional.pil_to_tensor(found) if pil else found

    while True:
        dataset = webdataset.WebDataset(shards, shardshuffle=False)
        if pil:
            dataset = dataset.decode("pil", handler=webdataset.reraise_exception)
        for batch in dataset.to_tuple("__key__", "jpg").map(crop).batched(BATCH, collation_fn=torch.stack):
            yield len(batch)


def of_imagefolder(folder: str) -> Iterator[int]:
    """Batch sizes, epoch after epoch."""
    crops = v2.Compose([v2.RandomResizedCrop(SIZE_PX, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    loader = DataLoader(ImageFolder(folder, transform=crops), batch_size=BATCH, shuffle=True)
    while True:
        for pixels, _ in loader:
            yield len(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with imagenet_photos")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = str(Path(args.data).resolve() / "imagenet_photos" / "shard-{00000..00003}.tar")
    source = open_source(images)
    view_of = {}
    with tempfile.TemporaryDirectory() as folder:
        one, four = (labelled(images, f"{folder}/{views}", views) for views in (1, 4))
        for unit in one.units():
            rows = one.read(unit.number)
            view_of |= {image_id: rows.view_at(i) for i, image_id in enumerate(rows.image_id)}
        for name in source.shard_names():
            for ref, data in source.stream(name, source.scan(name)[1]):
                path = Path(folder, "files", f"{ref.label}", ref.image_id.replace("/", "_") + ".jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        batches = -(-four.num_rows // BATCH)
        shards = [str(Path(images).parent / name) for name in source.shard_names()]
        contenders: dict[str, Callable[[], Iterator[int]]] = {
            "kddata": lambda: of_kddata(one, 1),
            "kddata, 4 views a visit": lambda: of_kddata(four, 4),
            "webdataset, torchvision": lambda: of_webdataset(shards, view_of, pil=False),
            "webdataset, pil": lambda: of_webdataset(shards, view_of, pil=True),
            "imagefolder": lambda: of_imagefolder(f"{folder}/files"),
        }
        running = {name: start() for name, start in contenders.items()}
        speeds: dict[str, list[float]] = {name: [] for name in running}
        for turn in range(args.rounds + 1):
            images_of, seconds = dict.fromkeys(running, 0), dict.fromkeys(running, 0.0)
            for _ in range(batches):
                for name, batch_sizes in running.items():
                    begin = time.process_time()
                    images_of[name] += next(batch_sizes)
                    seconds[name] += time.process_time() - begin
            if turn:
                for name, found in speeds.items():
                    found.append(images_of[name] / seconds[name])
            print(f"round {turn}", {name: round(images_of[name] / seconds[name]) for name in running}, flush=True)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    results = {
        "images": len(view_of),
        "rounds": args.rounds,
        "images_per_cpu_s": {name: statistics.median(found) for name, found in speeds.items()},
        "ratios": {
            f"{ours} / {theirs}": ratio(ours, theirs)
            for ours in ("kddata", "kddata, 4 views a visit")
            for theirs in ("webdataset, torchvision", "webdataset, pil", "imagefolder")
        },
    }
    print(json.dumps(results, indent=2))
    print("written to", write_results("loader", {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
