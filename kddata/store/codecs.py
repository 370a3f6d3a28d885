"""Codecs: how the values of soft labels are rounded and packed into Arrow columns. Pure functions.

`exact`: `ids` uint16 where C <= 65536, else int32; `log_p` float16; `log_tail` float32. Rounding to the nearest float16
keeps the order of a row (equal values may appear) and moves a log-probability by at most 2^-11 of itself (2^-25 next
to 0). Tail masses keep float32: at high temperatures a student's loss hangs on them. The float16s of sampled labels
stand for counts of draws, and are read as these: nothing is rounded.

Letters: B rows, C classes, K kept classes, T temperatures.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from kddata.cards import StoreSpec
from kddata.errors import LabelError
from kddata.labels import SoftLabels, log_share

_FLOAT16_MIN = -65504.0


def fields(spec: StoreSpec) -> list[pa.Field]:
    """The columns that hold the soft labels of a store."""
    ids = pa.uint16() if spec.teacher.num_classes <= 1 << 16 else pa.int32()
    return [
        pa.field("ids", pa.list_(ids, spec.k), nullable=False),
        pa.field("log_p", pa.list_(pa.float16(), spec.k), nullable=False),
        pa.field("log_tail", pa.list_(pa.float32(), len(spec.temperatures)), nullable=False),
    ]


def encode(labels: SoftLabels, spec: StoreSpec) -> list[pa.Array]:
    """Labels as the arrays of `fields(spec)`. Raises LabelError for labels that break their rules or the spec."""
    check(labels, spec)
    log_p = labels.log_p_BK.detach().cpu().to(torch.promote_types(labels.log_p_BK.dtype, torch.float32)).numpy()
    # What is finite stays finite: only classes of probability 0 are -inf.
    log_p = np.where(np.isneginf(log_p), log_p, np.maximum(log_p, _FLOAT16_MIN)).astype(np.float16)
    values = (labels.ids_BK.detach().cpu().numpy(), log_p, labels.log_tail_BT.detach().cpu().numpy())
    return [_pack(value, field.type) for value, field in zip(values, fields(spec), strict=True)]


def check(labels: SoftLabels, spec: StoreSpec) -> None:
    """Raises LabelError unless labels keep their rules and are of a spec's form."""
    form = (labels.num_classes, labels.k, labels.temperatures, labels.sampled)
    wanted = (spec.teacher.num_classes, spec.k, spec.temperatures, spec.keep == "sampled")
    if form != wanted:
        raise LabelError(
            f"labels of this store have (classes, k, temperatures, sampled) = {wanted}",
            actual=form,
            fix="make them with the labels_of of the store's spec",
        )
    labels.validate()


def counts(log_p_BK: np.ndarray, k: int) -> np.ndarray:
    """int64 [B, K]: how many of k draws each class had, of log(count / k) with the rounding of a float16 or less."""
    return np.rint(k * np.exp(log_p_BK.astype(np.float64))).astype(np.int64)


def from_counts(count_BK: np.ndarray, spec: StoreSpec) -> np.ndarray:
    """float32 [B, K]: log(count / k). Raises LabelError for counts that are not of k draws, most drawn first."""
    if (count_BK < 0).any() or (np.diff(count_BK, axis=1) > 0).any() or (count_BK.sum(1) != spec.k).any():
        raise LabelError(f"a row of sampled labels counts {spec.k} draws, the most drawn class first")
    return log_share(torch.from_numpy(count_BK), spec.k).float().numpy()


def decode(columns: list[pa.Array], spec: StoreSpec) -> SoftLabels:
    """Labels from the arrays of `fields(spec)`: ids int32, log_p and log_tail float32.

    Raises LabelError for class ids that the teacher does not have.
    """
    num_classes = spec.teacher.num_classes
    ids, log_p, log_tail = (column.flatten().to_numpy(zero_copy_only=False) for column in columns)
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_classes:
        raise LabelError(f"class ids are between 0 and {num_classes - 1}", actual=f"{ids.min()} to {ids.max()}")
    log_p = log_p.astype(np.float32).reshape(-1, spec.k)
    if spec.keep == "sampled":
        if np.isnan(log_p).any() or (log_p > 0).any():
            raise LabelError("log-probabilities are at most 0")
        log_p = from_counts(counts(log_p, spec.k), spec)
    return SoftLabels(
        ids_BK=torch.from_numpy(ids.astype(np.int32).reshape(-1, spec.k)),
        log_p_BK=torch.from_numpy(log_p),
        log_tail_BT=torch.from_numpy(log_tail.astype(np.float32).reshape(-1, len(spec.temperatures))),
        temperatures=spec.temperatures,
        num_classes=num_classes,
        sampled=spec.keep == "sampled",
    )


def _pack(value: np.ndarray, kind: pa.FixedSizeListType) -> pa.Array:
    flat = np.ascontiguousarray(value, dtype=kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, type=kind.value_type), type=kind)
