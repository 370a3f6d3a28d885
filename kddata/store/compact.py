"""The compact codec: small and rounded, for the largest stores. benchmarks/store_size.py measures it. Pure functions.

A record of a compact shard is one *image* with all V views of its unit, so that what its views share is stored once:

    image_id, label, offset, length, image_hash, resize       of the image
    classes       the classes that its views name, most frequent first (at most 255)
    ids           [V, K] uint8: places in `classes`; 255 means the next entry of `rare`
    rare          classes without a place, in order of use
    log_p         [V, K] uint8: rises of the code c = round(16 sqrt(-log p)) from one kept class to the next; of
                  sampled labels, c = k - count, which is exact
    log_tail      [V, T] uint8: 128 + round(4 logit(tail mass)); 0 is an empty tail
    box_low, box_high  [V, 4] uint8: the two bytes of each number of a box
    flip          ceil(V / 8) bytes, first view in the lowest bit
    pixel_hash    the hashes of those views that have one; hashed: which views they are, counted from 0

Order and classes are kept exactly, so the top-1 class never changes. An error of d in a log-probability costs about
p d^2 / 2 nats; steps even in sqrt(-log p) spread that evenly over a row. Rows of bytes with few distinct values are
what zstd, which every buffer passes through, packs well.

Letters: I images, V views, B = I V rows, K kept classes, T temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from kddata.cards import StoreSpec
from kddata.errors import LabelError
from kddata.labels import SoftLabels
from kddata.store import codecs
from kddata.store.rows import LabelRows

_LOG_P_STEPS = 16.0
_TAIL_STEPS = 4.0
_ESCAPE = 255


def fields(spec: StoreSpec, num_views: int) -> list[pa.Field]:
    """The columns of a compact shard whose unit has this many views of each image."""

    def packed(name: str, width: int) -> pa.Field:
        return pa.field(name, pa.list_(pa.uint8(), width), nullable=False)

    return [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("image_hash", pa.uint64(), nullable=False),
        pa.field("resize", pa.list_(pa.int32(), 2)),
        pa.field("classes", pa.list_(_id_type(spec)), nullable=False),
        packed("ids", num_views * spec.k),
        pa.field("rare", pa.list_(_id_type(spec)), nullable=False),
        packed("log_p", num_views * spec.k),
        packed("log_tail", num_views * len(spec.temperatures)),
        packed("box_low", num_views * 4),
        packed("box_high", num_views * 4),
        packed("flip", -(-num_views // 8)),
        pa.field("hashed", pa.list_(pa.uint16()), nullable=False),
        pa.field("pixel_hash", pa.list_(pa.uint64()), nullable=False),
    ]


def encode(rows: LabelRows, spec: StoreSpec, num_views: int) -> list[pa.Array]:
    """Whole images, each with its `num_views` rows in order, as the arrays of `fields`.

    Raises LabelError for labels or boxes that the codec cannot hold.
    """
    num_images = len(rows) // num_views
    assert num_images * num_views == len(rows)
    labels = rows.labels
    codecs.check(labels, spec)
    if rows.box.size and (rows.box.min() < 0 or rows.box.max() > 0xFFFF):
        raise LabelError("codec compact holds boxes of up to 65535 px", actual=rows.box.max(), fix="codec: exact")
    first = slice(None, None, num_views)
    classes, places, rare = _index_classes(labels.ids_BK.cpu().numpy().reshape(num_images, num_views * spec.k))
    hashed_I = rows.has_pixel_hash.reshape(num_images, num_views)
    resize = None if rows.resize is None else rows.resize[first]
    no_resize = np.full(num_images, resize is None)
    resize = np.zeros((num_images, 2), np.int32) if resize is None else resize
    flip = np.packbits(rows.flip.reshape(num_images, num_views), axis=1, bitorder="little")
    arrays = [
        pa.array(rows.image_id[first], pa.string()),
        pa.array(rows.label[first], pa.int32(), mask=rows.label[first] < 0),
        pa.array(rows.offset[first]),
        pa.array(rows.length[first]),
        pa.array(rows.image_hash[first]),
        pa.FixedSizeListArray.from_arrays(pa.array(resize.reshape(-1)), 2, mask=pa.array(no_resize)),
        _lists(classes, _id_type(spec)),
        places,
        _lists(rare, _id_type(spec)),
        _log_p_codes(labels.log_p_BK.double().cpu().numpy(), spec),
        _tail_codes(labels.log_tail_BT.double().cpu().numpy()),
        rows.box & 0xFF,
        rows.box >> 8,
        flip,
        _lists([np.flatnonzero(row) for row in hashed_I], pa.uint16()),
        _lists(np.split(rows.pixel_hash[rows.has_pixel_hash], np.cumsum(hashed_I.sum(1))[:-1]), pa.uint64()),
    ]
    return [
        _pack(array, field.type) if isinstance(array, np.ndarray) else array
        for array, field in zip(arrays, fields(spec, num_views), strict=True)
    ]


def decode(columns: dict[str, pa.Array], spec: StoreSpec, *, views: range, source: int) -> LabelRows:
    """The rows of the arrays of `fields`, by name. Values differ from the encoded ones by their rounding alone.

    Raises LabelError for codes that name no class.
    """
    num_images, num_views, k = len(columns["image_id"]), len(views), spec.k
    num_rows = num_images * num_views
    numbers = {name: columns[name].to_numpy(zero_copy_only=False) for name in ("offset", "length", "image_hash")}
    widths = {"ids": num_views * k, "log_p": num_views * k, "log_tail": num_views * len(spec.temperatures)}
    widths |= {"box_low": num_views * 4, "box_high": num_views * 4, "flip": -(-num_views // 8)}
    codes = {name: columns[name].flatten().to_numpy().reshape(num_images, width) for name, width in widths.items()}
    log_p_codes = np.cumsum(codes["log_p"].reshape(num_rows, k), axis=1, dtype=np.int64)
    if spec.keep == "sampled":
        log_p = codecs.from_counts(k - log_p_codes, spec)
    else:
        log_p = -np.square(log_p_codes.astype(np.float32) / np.float32(_LOG_P_STEPS))
    tail_codes = codes["log_tail"].reshape(num_rows, len(spec.temperatures))
    logit = (tail_codes.astype(np.float32) - 128) / np.float32(_TAIL_STEPS)
    log_tail = np.where(tail_codes == 0, -np.inf, -np.logaddexp(np.float32(0), -logit)).astype(np.float32)
    resize = columns["resize"]
    has_pixel_hash = np.zeros(num_rows, bool)
    hashed_view, hashes = (columns[name].flatten().to_numpy() for name in ("hashed", "pixel_hash"))
    if len(hashed_view) != len(hashes) or (hashed_view >= num_views).any():
        raise LabelError(f"each pixel hash is of one of {num_views} views of its image")
    marked = np.repeat(np.arange(num_images), _lengths(columns["hashed"])) * num_views + hashed_view
    pixel_hash = np.zeros(num_rows, np.uint64)
    has_pixel_hash[marked] = True
    pixel_hash[marked] = hashes
    ids = _look_up(columns["classes"], codes["ids"], columns["rare"], spec.teacher.num_classes)
    return LabelRows(
        image_id=[text for text in columns["image_id"].to_pylist() for _ in views],
        view=np.tile(np.arange(views.start, views.stop, dtype=np.int32), num_images),
        label=np.repeat(columns["label"].fill_null(-1).to_numpy(), num_views),
        labels=SoftLabels(
            ids_BK=torch.from_numpy(ids.reshape(num_rows, k)),
            log_p_BK=torch.from_numpy(log_p),
            log_tail_BT=torch.from_numpy(log_tail),
            temperatures=spec.temperatures,
            num_classes=spec.teacher.num_classes,
            sampled=spec.keep == "sampled",
        ),
        box=(codes["box_low"].astype(np.int32) | codes["box_high"].astype(np.int32) << 8).reshape(num_rows, 4),
        flip=np.unpackbits(codes["flip"], axis=1, count=num_views, bitorder="little").reshape(num_rows).astype(bool),
        resize=None
        if resize.null_count
        else np.repeat(resize.flatten().to_numpy().reshape(num_images, 2), num_views, axis=0),
        source=np.full(num_rows, source, np.int32),
        offset=np.repeat(numbers["offset"], num_views),
        length=np.repeat(numbers["length"], num_views),
        image_hash=np.repeat(numbers["image_hash"], num_views),
        pixel_hash=pixel_hash,
        has_pixel_hash=has_pixel_hash,
    )


def _id_type(spec: StoreSpec) -> pa.DataType:
    return pa.uint16() if spec.teacher.num_classes <= 1 << 16 else pa.int32()


def _index_classes(ids_IN: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """(classes, places, rare) of each image: `ids_IN[i]` is `classes[i][places[i]]`, or the next of `rare[i]`."""
    classes, rare = [], []
    places = np.empty(ids_IN.shape, np.uint8)
    for i, ids_N in enumerate(ids_IN):
        named, inverse, counts = np.unique(ids_N, return_inverse=True, return_counts=True)
        by_count = np.argsort(-counts, kind="stable")
        place = np.empty(len(named), np.int64)
        place[by_count] = np.arange(len(named))
        place_N = np.minimum(place[inverse], _ESCAPE)
        places[i] = place_N
        classes.append(named[by_count[:_ESCAPE]])
        rare.append(ids_N[place_N == _ESCAPE])
    return classes, places, rare


def _look_up(classes: pa.ListArray, places_IN: np.ndarray, rare: pa.ListArray, num_classes: int) -> np.ndarray:
    """int32 [I, N]: the inverse of `_index_classes`."""
    named, starts = classes.flatten().to_numpy().astype(np.int32), classes.offsets.to_numpy()
    starts = starts - starts[0]
    escaped = places_IN == _ESCAPE
    places = np.where(escaped, 0, places_IN)
    if (places >= np.diff(starts)[:, None]).any() or not np.array_equal(
        escaped.sum(1), np.diff(rare.offsets.to_numpy())
    ):
        raise LabelError("a place of an image's class list names a class")
    ids = named[starts[:-1, None] + places]
    ids[escaped] = rare.flatten().to_numpy()
    if ids.size and not 0 <= ids.min() <= ids.max() < num_classes:
        raise LabelError(f"class ids are between 0 and {num_classes - 1}", actual=f"{ids.min()} to {ids.max()}")
    return ids


def _log_p_codes(log_p_BK: np.ndarray, spec: StoreSpec) -> np.ndarray:
    if spec.keep == "sampled":
        codes = spec.k - codecs.counts(log_p_BK, spec.k)
    else:
        codes = np.rint(_LOG_P_STEPS * np.sqrt(np.maximum(-log_p_BK, 0))).clip(max=255)
    return np.diff(codes, axis=1, prepend=0).astype(np.uint8)


def _tail_codes(log_tail_BT: np.ndarray) -> np.ndarray:
    log_tail = np.minimum(log_tail_BT, -1e-15)  # rounding may lift a mass to 1
    logit = log_tail - np.log(-np.expm1(log_tail))
    return np.where(log_tail_BT == -np.inf, 0, 128 + np.rint(_TAIL_STEPS * logit).clip(-127, 127)).astype(np.uint8)


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return np.diff(lists.offsets.to_numpy()) if len(lists) else np.empty(0, np.int64)


def _lists(parts: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)
    values = np.concatenate([*parts, np.empty(0, np.int64)]) if kind != pa.uint64() else np.concatenate(parts)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(kind.to_pandas_dtype()), kind))


def _pack(values: np.ndarray, kind: pa.FixedSizeListType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values, np.uint8).reshape(-1)), type=kind)
