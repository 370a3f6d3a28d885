"""Helpers for tests of kddata and of code built on it: small real images, an exact teacher, Hypothesis strategies.

Shipped, so that other projects can test their own sources and teachers. Nothing in the library imports it. The
strategies need `hypothesis`, which is imported when they are asked for.

Shapes: B views, C classes, S side in pixels.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kddata import rng
from kddata.cards import Codec, Format, Keep, Output, StoreSpec, TeacherCard
from kddata.labelling import LabellingJob, label_store
from kddata.labels import SoftLabels
from kddata.store import LabelRows, LabelStore, Unit
from kddata.store.rows import objects
from kddata.teacher import Teacher, TeacherArgs, load_teacher
from kddata.views import ViewPlan

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_BUCKETS = 48


class FakeNetwork(nn.Module):
    """A network of integer sums: its answers are exact, so equal pixels get equal bits in any batch on any machine.

    It takes views normalised with mean 0 and std 1. Pixel i of a view counts towards bucket i % 48; a fixed integer
    matrix turns the bucket sums into logits. No two classes have equal weights, and a flip changes the answer.
    """

    weights: Tensor

    def __init__(self, num_classes: int, *, seed: int = 0) -> None:
        super().__init__()
        weights = np.frombuffer(rng.stream(seed, "fake teacher").bytes(_BUCKETS * num_classes), dtype=np.int8)
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.int64)).view(_BUCKETS, num_classes))

    def forward(self, x_B3SS: Tensor) -> Tensor:
        pixels = (x_B3SS.contiguous().flatten(1) * 255).round().long() - 128
        pixels = nn.functional.pad(pixels, (0, -pixels.shape[1] % _BUCKETS))
        sums = pixels.view(len(pixels), -1, _BUCKETS).sum(1)
        return (sums[:, :, None] * self.weights).sum(1) / (64.0 * pixels.shape[1])


def fake_network(num_classes: int) -> nn.Module:
    """Builder of `FakeNetwork`, for `arch: python:kddata.testing:fake_network`."""
    return FakeNetwork(num_classes)


def fake_teacher_args(*, num_classes: int = 10, size_px: int = 16) -> TeacherArgs:
    """The description of a teacher that is exact, needs no weights and answers in microseconds."""
    return TeacherArgs(
        arch="python:kddata.testing:fake_network",
        num_classes=num_classes,
        size_px=size_px,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def fake_teacher(*, num_classes: int = 10, size_px: int = 16, batch_size: int = 16) -> Teacher:
    """The teacher of `fake_teacher_args`, loaded: a deterministic pure function of pixels, with a card."""
    return load_teacher(fake_teacher_args(num_classes=num_classes, size_px=size_px), batch_size=batch_size)


def small_image(label: int, *, height_px: int, width_px: int, seed: int = 0, index: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth noise, tinted and striped by its label, so that a small network can learn the label."""
    random = rng.stream(seed, "small image", label, index).random
    y, x = np.mgrid[0:height_px, 0:width_px] / 32
    tint = np.array([rng.unit_interval(0, "tint", label, channel) for channel in range(3)])
    angle = np.pi * rng.unit_interval(0, "angle", label)
    stripes = np.sin(6 * (x * np.cos(angle) + y * np.sin(angle)) + 6 * random())
    clouds = sum(np.sin(a * x + b * y + 6 * c) for a, b, c in 4 * np.reshape(random(9), (3, 3)))
    picture = 128 + 70 * (tint - 0.5) + 35 * stripes[..., None] + 12 * clouds[..., None] + 20 * random((1, 1, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def encode(pixels_HW3: np.ndarray, encoding: Literal["jpg", "png"] = "jpg") -> bytes:
    """The bytes of an image file: JPEG of quality 90, or PNG. uint8 [H, W, 3], or [H, W] for greyscale."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, format={"jpg": "JPEG", "png": "PNG"}[encoding], quality=90)
    return file.getvalue()


def make_images(
    directory: str | Path,
    *,
    num_images: int = 12,
    form: Literal["tar", "folder", "parquet"] = "tar",
    shards: int = 2,
    num_classes: int = 4,
    labelled: bool = True,
    min_px: int = 20,
    max_px: int = 40,
    encoding: Literal["jpg", "png"] = "jpg",
    seed: int = 0,
) -> str:
    """Writes small real images of several sizes and returns their location, as `images:` takes it.

    Image i is of class i % num_classes. tar: `shards` files of KEY.jpg and KEY.cls in turn; folder: one folder a class
    (none where unlabelled); parquet: `shards` files with the columns image (bytes) and label. Equal arguments write
    equal bytes.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    samples: list[tuple[str, int | None, bytes]] = []
    for i in range(num_images):
        height, width = (min_px + int(u * (max_px - min_px + 1)) for u in rng.stream(seed, "size", i).random(2))
        pixels = small_image(i % num_classes, height_px=height, width_px=width, seed=seed, index=i)
        samples.append((f"image-{i:05d}", i % num_classes if labelled else None, encode(pixels, encoding)))
    if form == "folder":
        for key, label, data in samples:
            folder = root if label is None else root / f"class-{label:03d}"
            folder.mkdir(exist_ok=True)
            (folder / f"{key}.{encoding}").write_bytes(data)
        return str(root)
    cuts = [num_images * i // shards for i in range(shards + 1)]
    for number in range(shards):
        part = samples[cuts[number] : cuts[number + 1]]
        if form == "parquet":
            _write_parquet(root / f"{number:05d}.parquet", part)
        else:
            write_tar(root / f"{number:05d}.tar", _members(part, encoding))
    return str(root / f"{{00000..{shards - 1:05d}}}.{form}")


def write_tar(path: str | Path, members: list[tuple[str, bytes]]) -> None:
    """A tar of these (name, bytes), in this order: also of broken images and names that no packer would write."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def small_spec(*, num_classes: int = 10, k: int = 3, unit_images: int = 4, unit_views: int | None = 2) -> StoreSpec:
    """The spec of a store with several small units."""
    teacher = TeacherCard(
        arch="made up",
        weights_sha256="0",
        num_classes=num_classes,
        size_px=16,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return StoreSpec(
        plan=ViewPlan(), teacher=teacher, k=k, temperatures=(1.0, 4.0), unit_images=unit_images, unit_views=unit_views
    )


def begin_small_store(
    url: str, *, spec: StoreSpec | None = None, images: tuple[int, ...] = (6, 0, 3), views_per_image: int = 3
) -> LabelStore:
    """A store that is begun and indexed, over image shards of so many made-up images; equal arguments join it."""
    store = LabelStore.begin(
        url, spec=spec or small_spec(), location="made up", kind="tar", views_per_image=views_per_image
    )
    for shard, count in enumerate(images):
        if shard not in store.indexed_shards():
            store.write_index(
                shard,
                name=f"{shard:05d}.tar",
                size_bytes=100 * count,
                ids=[f"{shard}/bild-\u00e9-{i}" for i in range(count)],
                labels=[None if i % 3 == 2 else i % store.spec.teacher.num_classes for i in range(count)],
                offsets=[100 * i for i in range(count)],
                lengths=[90 + i % 7 for i in range(count)],
            )
    store.finish_index([f"{shard:05d}.tar" for shard in range(len(images))])
    return store


def made_up_rows(store: LabelStore, unit: Unit, *, leave_out: tuple[str, ...] = ()) -> LabelRows:
    """All rows of a unit, less some images. Each row is a pure function of its image id and view."""
    index = [image for image in zip(*store.read_index(unit), strict=True) if image[0] not in leave_out]
    views = range(unit.view_start, unit.view_stop)
    rows = [(*image, view, rng.stream(0, "row", image[0], view)) for image in index for view in views]
    num_classes = store.spec.teacher.num_classes
    logits_BC = [[8 * u for u in random.random(num_classes)] for *_, random in rows]
    plan, ids = store.spec.plan, store.read_index(unit)[0]
    drawn = [plan.draw(image_id, view, 40, 60) for image_id, _, _, _, view, _ in rows]
    mixes = [plan.draw_mix(ids, image_id, view) for image_id, _, _, _, view, _ in rows]
    hashes = [int.from_bytes(rng.key_bytes(0, "hash", row[0])[:8], "little") for row in rows]
    return LabelRows(
        image_id=[row[0] for row in rows],
        view=np.array([row[4] for row in rows]),
        label=np.array([-1 if row[1] is None else row[1] for row in rows]),
        labels=store.spec.labels_of(
            torch.tensor(logits_BC, dtype=torch.float32).reshape(-1, num_classes),
            [row[0] for row in rows],
            [row[4] for row in rows],
        ),
        box=np.array([view.box for view in drawn]).reshape(-1, 4),
        flip=np.array([view.flip for view in drawn]),
        ops=objects([view.ops for view in drawn]) if plan.has_ops else None,
        mix=objects([None if mix is None or mix.partner in leave_out else mix for mix in mixes])
        if plan.has_mix
        else None,
        source=np.full(len(rows), unit.shard),
        offset=np.array([row[2] for row in rows]),
        length=np.array([row[3] for row in rows]),
        image_hash=np.array(hashes, dtype=np.uint64),
        pixel_hash=np.arange(len(rows)),
        has_pixel_hash=np.arange(len(rows)) % 4 == 0,
        outputs={output.name: _made_up_output(output, rows) for output in store.spec.outputs},
    )


def _made_up_output(output: Output, rows: list[Any]) -> np.ndarray:
    keys = [(row[0], row[4]) for row in rows]
    values = [rng.stream(1, output.name, *key).random(output.size) for key in keys]
    return np.array(values, dtype=np.float16).reshape(len(rows), *output.shape)


def made_up_image(image_id: str, *, offset: int, length: int, image_hash: int) -> tuple[str, bytes]:
    """(file name ending, bytes) of an image of `made_up_rows`, for formats that keep images."""
    return "jpg", f"image {image_id}".encode()


def small_store(url: str, **arguments: Any) -> LabelStore:
    """A committed store of made-up labels; the arguments are those of `begin_small_store`."""
    store = begin_small_store(url, **arguments)
    for unit in store.units():
        store.write_unit(unit, [made_up_rows(store, unit)], image_bytes=made_up_image)
    store.commit()
    return store


def make_store(
    directory: str | Path,
    *,
    form: Literal["tar", "folder", "parquet"] = "tar",
    num_images: int = 12,
    image_classes: int | None = None,
    labelled: bool = True,
    views_per_image: int = 2,
    num_classes: int = 10,
    size_px: int = 16,
    k: int = 3,
    keep: Keep = "top",
    temperatures: tuple[float, ...] = (1.0,),
    unit_images: int = 4,
    unit_views: int | None = None,
    codec: Codec = "exact",
    format: Format = "arrow",
    plan: ViewPlan | None = None,
    outputs: tuple[str, ...] = (),
) -> LabelStore:
    """A committed store of `make_images`, truly labelled by `fake_teacher`; both lie below the directory.

    The images have `image_classes` classes, by default as many as the teacher.
    """
    root = Path(directory)
    images = make_images(
        root / "images", num_images=num_images, form=form, num_classes=image_classes or num_classes, labelled=labelled
    )
    job = LabellingJob(
        images=images,
        store=str(root / "labels"),
        teacher=fake_teacher_args(num_classes=num_classes, size_px=size_px),
        plan=plan or ViewPlan(area=(0.3, 1.0)),
        views_per_image=views_per_image,
        k=k,
        keep=keep,
        temperatures=temperatures,
        unit_images=unit_images,
        unit_views=unit_views,
        codec=codec,
        format=format,
        outputs=outputs,
    )
    return label_store(job).store


def plans() -> SearchStrategy[ViewPlan]:
    """View plans of policy none, from mild crops to extreme ones."""
    from hypothesis import strategies as st

    def pair(low: float, high: float) -> SearchStrategy[tuple[float, float]]:
        return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda x: (min(x), max(x)))

    return st.builds(
        ViewPlan,
        seed=st.integers(0, 2**63),
        area=pair(0.001, 1.0),
        aspect=pair(0.05, 20.0),
        flip_p=st.floats(0, 1),
        interpolation=st.sampled_from(["bilinear", "bicubic"]),
    )


def image_sizes(max_px: int = 3000) -> SearchStrategy[tuple[int, int]]:
    """(height_px, width_px), with single pixels and extreme aspect ratios among them."""
    from hypothesis import strategies as st

    side = st.one_of(st.integers(1, 4), st.integers(1, max_px))
    return st.tuples(side, side)


def logits(max_classes: int = 40, *, dtype: torch.dtype = torch.float32) -> SearchStrategy[Tensor]:
    """Logits [B, C] as networks give them: small to huge, with ties and -inf (never a whole row), B from 1 to 4."""
    from hypothesis import strategies as st

    value = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 5.0, -float("inf"), 1e4, -1e4]), st.floats(-60, 60, width=32), st.just(0.0)
    )

    def batch(shape: tuple[int, int]) -> SearchStrategy[Tensor]:
        row = st.lists(value, min_size=shape[1], max_size=shape[1]).filter(lambda x: max(x) > -float("inf"))
        return st.lists(row, min_size=shape[0], max_size=shape[0]).map(lambda x: torch.tensor(x, dtype=dtype))

    return st.tuples(st.integers(1, 4), st.integers(1, max_classes)).flatmap(batch)


def soft_labels(max_classes: int = 40, *, temperatures: tuple[float, ...] = (1.0, 2.0)) -> SearchStrategy[SoftLabels]:
    """Soft labels of any k up to C."""
    from hypothesis import strategies as st

    return logits(max_classes).flatmap(
        lambda x: st.integers(1, x.shape[1]).map(lambda k: SoftLabels.from_logits(x, k=k, temperatures=temperatures))
    )


def _members(samples: list[tuple[str, int | None, bytes]], encoding: str) -> list[tuple[str, bytes]]:
    members = []
    for key, label, data in samples:
        members.append((f"{key}.{encoding}", data))
        if label is not None:
            members.append((f"{key}.cls", str(label).encode()))
    return members


def _write_parquet(path: Path, samples: list[tuple[str, int | None, bytes]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    keys, labels, data = zip(*samples, strict=True) if samples else ((), (), ())
    columns = {
        "id": pa.array(keys, pa.string()),
        "image": pa.array(data, pa.binary()),
        "label": pa.array(labels, pa.int32()),
    }
    parquet.write_table(pa.table(columns), path)
