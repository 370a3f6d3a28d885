"""Bytes of a view in a finished store, and what the compact codec's rounding costs.

    python benchmarks/store_size.py --data ../shared/data            # 500 photos x 32 views, MobileNetV2: minutes

Bytes are those of every file of the store, manifest and image indexes included, divided by its views. KL(exact ||
compact) is over the kept classes plus the tail as one more, in nats, mean over views, at each declared temperature.
The case of 21,841 classes has made-up logits: no teacher of that width is at hand. Results go to
benchmarks/results/store_size.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from results import environment, write_results

import kddata
from kddata import LabelStore, SoftLabels, TeacherCard, ViewPlan
from kddata.cards import StoreSpec
from kddata.images import decode, open_source
from kddata.store import LabelRows, Unit

TEMPERATURES = (1.0, 2.0, 4.0)
VIEW_SD = 0.25  # of the made-up logits of an image from view to view, against 2 from class to class


def copy_store(
    source: LabelStore, url: str, spec: StoreSpec, rows_of: Callable[[Unit], Iterator[LabelRows]]
) -> LabelStore:
    """A store over the images of another one, with rows of one's own."""
    store = LabelStore.begin(
        url, spec=spec, location=source.location, kind=source.kind, views_per_image=source.views_per_image
    )
    for number, shard in enumerate(source.images):
        columns = [[], [], [], []]
        for unit in source.units():
            if unit.shard == number and unit.view_start == 0:
                for column, part in zip(columns, source.read_index(unit), strict=True):
                    column.extend(part)
        names = ("ids", "labels", "offsets", "lengths")
        store.write_index(
            number, name=shard.name, size_bytes=shard.size_bytes, **dict(zip(names, columns, strict=True))
        )
    store.finish_index()
    for unit in store.units():
        store.write_unit(unit, rows_of(unit))
    store.commit()
    return store


def made_up_labels(rows: LabelRows, num_classes: int) -> SoftLabels:
    """As many rows for another number of classes: a few likely classes an image, a long tail of the rest.

    The tail is mostly the image's own and moves a little from view to view, by so much that no fewer distinct classes
    come up over the views of an image as with the real teacher (`classes_an_image` of both is in the results).
    """
    random = torch.Generator().manual_seed(0)
    labels, parts = rows.labels, []
    borders = [0, *(i for i in range(1, len(rows)) if rows.image_id[i] != rows.image_id[i - 1]), len(rows)]
    for start, stop in itertools.pairwise(borders):
        part, of_image = slice(start, stop), torch.randn(num_classes, generator=random)
        logits = 2 * of_image + VIEW_SD * torch.randn(stop - start, num_classes, generator=random)
        places = labels.ids_BK[part].long() * (num_classes // labels.num_classes)
        logits.scatter_(1, places, labels.log_p_BK[part] + 14)
        parts.append(SoftLabels.from_logits(logits, k=labels.k, temperatures=TEMPERATURES))
    return SoftLabels.cat(parts)


def classes_an_image(store: LabelStore) -> float:
    """How many distinct classes the views of an image name, mean over images."""
    found = []
    for unit in store.units():
        rows = store.read(unit.number)
        named: dict[str, set[int]] = {}
        for image_id, ids in zip(rows.image_id, rows.labels.ids_BK.tolist(), strict=True):
            named.setdefault(image_id, set()).update(ids)
        found += [len(ids) for ids in named.values()]
    return sum(found) / len(found)


def bytes_per_view(store: LabelStore) -> dict[str, float]:
    """Of all files, and of all but the label shards."""
    sizes = store.storage.sizes()
    other = sum(size for name, size in sizes.items() if not name.startswith("labels/"))
    return {"all": sum(sizes.values()) / store.num_rows, "beside_labels": other / store.num_rows}


def rounding(exact: LabelStore, compact: LabelStore) -> dict[str, object]:
    """What differs between two stores of the same rows."""
    sums, same_top1, same_ids, rows = dict.fromkeys(TEMPERATURES, 0.0), 0, 0, 0
    for unit in exact.units():
        one, other = exact.read(unit.number).labels, compact.read(unit.number).labels
        for t in TEMPERATURES:
            (log_p, tail), (log_q, q_tail) = ([x.double() for x in labels.at(t)] for labels in (one, other))
            kl = (log_p.exp() * (log_p - log_q)).sum(1) + tail.exp() * (tail - q_tail)
            sums[t] += float(kl.sum())
        same_top1 += int((one.ids_BK[:, 0] == other.ids_BK[:, 0]).sum())
        same_ids += int((one.ids_BK == other.ids_BK).all(1).sum())
        rows += len(one)
    kl_means = {f"T={t:g}": value / rows for t, value in sums.items()}
    return {"mean_kl_nats": kl_means, "same_top1": same_top1 / rows, "same_order": same_ids / rows}


def decode_cost(compact: LabelStore, images: str) -> dict[str, float]:
    """Seconds to decode all label rows once, and all images once per view, in one thread."""
    blobs = [compact.storage.read(f"labels/{unit.number:06d}.arrow") for unit in compact.units()]
    from kddata.store import formats

    start = time.perf_counter()
    for unit, blob in zip(compact.units(), blobs, strict=True):
        formats.read_labels(blob, compact.spec, unit.number, where="memory")
    labels_s = (time.perf_counter() - start) / compact.num_rows
    source = open_source(images)
    name = source.shard_names()[0]
    _, refs = source.scan(name)
    files = [data for _, data in source.stream(name, refs)]
    start = time.perf_counter()
    for data in files:
        decode(data, max_pixels=10**9)
    image_s = (time.perf_counter() - start) / len(files)
    return {"labels_us_per_view": labels_s * 1e6, "image_us": image_s * 1e6, "share": labels_s / image_s}


def compare(exact: LabelStore, url: str) -> tuple[LabelStore, dict[str, object]]:
    """A compact copy of an exact store, and the figures of both."""
    spec = dataclasses.replace(exact.spec, codec="compact")
    compact = copy_store(exact, url, spec, lambda unit: iter([exact.read(unit.number)]))
    sizes = {"exact": bytes_per_view(exact), "compact": bytes_per_view(compact)}
    about = {"views": exact.num_rows, "classes_an_image": classes_an_image(exact)}
    return compact, {**about, "bytes_per_view": sizes, **rounding(exact, compact)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with imagenet_photos and weights")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--classes", type=int, default=21_841, help="of the made-up teacher")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = f"{args.data}/imagenet_photos/shard-{{00000..00003}}.tar"
    with tempfile.TemporaryDirectory() as folder:
        teacher = kddata.TeacherArgs(
            arch="torchvision:mobilenet_v2",
            weights=f"{args.data}/weights/mobilenet_v2.tv.fp16.safetensors",
            num_classes=1000,
            size_px=224,
        )
        job = kddata.LabellingJob(
            images=images,
            store=f"{folder}/exact",
            teacher=teacher,
            plan=ViewPlan(),
            views_per_image=args.views,
            k=10,
            temperatures=TEMPERATURES,
        )
        exact = kddata.label_store(job, on_receipt=lambda receipt: print("labelled unit", receipt.unit)).store
        compact, photos = compare(exact, f"{folder}/compact")
        photos["decoding"] = decode_cost(compact, images)
        card = TeacherCard(
            arch="made up",
            weights_sha256="0",
            num_classes=args.classes,
            size_px=224,
            mean=teacher.mean,
            std=teacher.std,
        )
        wide_spec = dataclasses.replace(exact.spec, teacher=card)

        def wide_rows(unit: Unit) -> Iterator[LabelRows]:
            rows = exact.read(unit.number)
            yield dataclasses.replace(rows, labels=made_up_labels(rows, args.classes))

        _, wide = compare(copy_store(exact, f"{folder}/wide", wide_spec, wide_rows), f"{folder}/wide-compact")
    results = {"photos": photos, f"made_up_{args.classes}_classes": wide}
    for name, result in results.items():
        print(name, json.dumps(result, indent=2))
    kls = [kl for result in results.values() for kl in result["mean_kl_nats"].values()]  # type: ignore[union-attr]
    print(f"compact: {photos['bytes_per_view']['compact']['all']:.1f} B a view (goal 24), worst mean KL {max(kls):.1e}")
    assert not math.isnan(sum(kls))
    print("written to", write_results("store_size", {"environment": environment(), **results}))


if __name__ == "__main__":
    main()
