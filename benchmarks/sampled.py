"""Sampled labels against the top k: how far the gradient of a student is from that of all classes, over V views.

    python benchmarks/sampled.py --data ../shared/data            # 42 photos x 100 views; 4 minutes

The teacher is MobileNetV2 and the student SqueezeNet 1.1, both trained. For each photo the gradient of `kd` at
temperature 1 with respect to the student's logits is summed over V of its views; the error is the norm of what a kind
of labels makes differ from all classes, over the norm of the gradient itself: root mean squares over photos. An
unbiased estimate gets better with V, as 1 / sqrt(V); what the top k loses stays. Bytes are those of the label files.
Results go to benchmarks/results/sampled.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
from results import environment, write_results
from store_size import copy_store
from torch import Tensor

import kddata
from kddata import LabelStore, SoftLabels
from kddata.cards import Keep, StoreSpec
from kddata.images import open_source
from kddata.losses import kd_loss
from kddata.losses.rows import Tail
from kddata.replay import loader
from kddata.store import LabelRows, Unit
from kddata.teacher import TeacherArgs, load_teacher
from kddata.testing import write_tar

KINDS: dict[str, tuple[Keep, int, Tail]] = {  # kept, k, tail
    "top10 bucket": ("top", 10, "bucket"),
    "top10 uniform": ("top", 10, "uniform"),
    "top10 renorm": ("top", 10, "renorm"),
    "top50 bucket": ("top", 50, "bucket"),
    "10 draws": ("sampled", 10, "sampled"),
    "50 draws": ("sampled", 50, "sampled"),
}
VIEWS = (1, 10, 100)


def gradient(logits_BC: Tensor, labels: SoftLabels, tail: Tail) -> Tensor:
    """Of the loss of each view, with respect to the student's logits."""
    logits = logits_BC.detach().requires_grad_()
    kd_loss(logits, labels, temperature=1, tail=tail, reduction="sum").backward()
    assert logits.grad is not None
    return logits.grad


def relative_errors(error_NVC: Tensor, whole_NVC: Tensor) -> dict[str, float]:
    """Of sums over the first V views, for each V; N images."""
    found = {}
    for views in VIEWS:
        error, whole = (x[:, :views].sum(1).norm(dim=1).square().mean().sqrt() for x in (error_NVC, whole_NVC))
        found[str(views)] = float(error / whole)
    return found


def relabelled(store: LabelStore, spec: StoreSpec, unit: Unit) -> Iterator[LabelRows]:
    """The rows of a unit of a store that keeps all classes, with what a store of another spec keeps of them."""
    rows = store.read(unit.number)
    labels = spec.labels_of(rows.labels.dense("renorm").log(), rows.image_id, rows.view.tolist())
    yield dataclasses.replace(rows, labels=labels)


def label_bytes(store: LabelStore) -> float:
    """Of the label files, a view."""
    return sum(store.storage.sizes("labels").values()) / store.num_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with imagenet_photos and weights")
    parser.add_argument("--every", type=int, default=12, help="how manyth of the 500 photos is taken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = {name: f"{args.data}/weights/{name}.tv.fp16.safetensors" for name in ("mobilenet_v2", "squeezenet1_1")}
    teacher, student = (
        TeacherArgs(arch=f"torchvision:{name}", weights=path, num_classes=1000, size_px=224)
        for name, path in weights.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        images = f"{folder}/photos.tar"
        _some_photos(f"{args.data}/imagenet_photos/shard-{{00000..00003}}.tar", images, args.every)
        job = kddata.LabellingJob(
            images=images,
            store=f"{folder}/all",
            teacher=teacher,
            plan=kddata.ViewPlan(),
            views_per_image=max(VIEWS),
            k=1000,
        )
        every = kddata.label_store(job, on_receipt=lambda receipt: print("labelled unit", receipt.unit)).store
        logits: dict[tuple[str, int], Tensor] = {}
        learner = load_teacher(student, batch_size=50)
        for batch in loader(every, batch_size=50, size_px=224):
            answers = zip(batch.image_ids, batch.view_indices, learner(batch.pixels_u8_B3SS), strict=True)
            logits |= {(image_id, view): row.clone() for image_id, view, row in answers}

        units = [every.read(unit.number) for unit in every.units()]
        keys = [key for rows in units for key in zip(rows.image_id, rows.view.tolist(), strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        said = torch.cat([rows.labels.dense("renorm") for rows in units])[order].double().log()
        keys = [keys[i] for i in order]
        asked = torch.stack([logits[key] for key in keys]).double()

        by_image = (-1, max(VIEWS), 1000)
        whole = asked.softmax(1) - said.exp()
        results: dict[str, object] = {"photos": len(keys) // max(VIEWS), "views": len(keys)}
        for name, (kept, k, tail) in KINDS.items():
            spec = dataclasses.replace(every.spec, k=k, keep=kept, codec="compact")
            made = spec.labels_of(said.float(), [image_id for image_id, _ in keys], [view for _, view in keys])
            error = gradient(asked.float(), made, tail).double() - whole
            store = copy_store(every, f"{folder}/{name}", spec, partial(relabelled, every, spec))
            results[name] = {
                "gradient_error_by_views": relative_errors(error.view(by_image), whole.view(by_image)),
                "label_bytes_per_view": label_bytes(store),
            }
            print(name, json.dumps(results[name]), flush=True)
    print("written to", write_results("sampled", {"environment": environment(), **results}))


def _some_photos(images: str, path: str, every: int) -> None:
    """A tar of every so manyth photo."""
    source = open_source(images)
    photos = (photo for name in source.shard_names() for photo in source.stream(name, source.scan(name)[1]))
    chosen = itertools.islice(photos, 0, None, every)
    write_tar(path, [(f"{ref.image_id.replace('/', '_')}.jpg", data) for ref, data in chosen])


if __name__ == "__main__":
    main()
