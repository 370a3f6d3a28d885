"""Cards: what a teacher and a store are, as frozen values with a fingerprint.

A fingerprint is the SHA-256 of the canonical JSON of every field; two stores with one fingerprint hold labels that
mean the same. Cards hold no path, no time and no code, and reading one builds nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kddata import rng
from kddata.errors import ConfigError, StoreMismatchError, StoreVersionError
from kddata.labels import MAX_DRAWS, SoftLabels, declare
from kddata.views import ViewPlan

FORMAT_VERSION = 1
COMPACT_MAX_K = 255

Keep = Literal["top", "sampled"]
Codec = Literal["exact", "compact"]
Format = Literal["arrow", "tar", "tar+images"]
MemoryFormat = Literal["contiguous", "channels_last"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What is known about a teacher: enough to tell two apart, and to feed one the pixels that it expects.

    Attributes:
        arch: how it was named to the builder, such as "torchvision:mobilenet_v2".
        weights_sha256: of its parameters and buffers by name, dtype, shape and value.
        num_classes: C, the width of its logits.
        classes_sha256: of the list of class names, one a line, or None where there is none.
        size_px: side of its square input.
        mean, std: of its input channels, for pixels in [0, 1].
        dtype: in which it runs.
        labels_sha256: of the labels it was trained on, or None where unknown.
    """

    arch: str
    weights_sha256: str
    num_classes: int
    classes_sha256: str | None = None
    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Dtype = "float32"
    labels_sha256: str | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # 0 and 0.0 are one card, with one fingerprint
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if self.num_classes < 1 or self.size_px < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                "a teacher has at least one class and pixel, three means, and three standard deviations above 0",
                actual=f"{self.num_classes} classes, {self.size_px} px, mean {self.mean}, std {self.std}",
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError("a teacher runs in float32 or bfloat16", actual=repr(self.dtype))


@dataclass(frozen=True, kw_only=True)
class Output:
    """A tensor that a store holds for every view, beside the labels: its name (see `kddata.features`) and shape."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ConfigError("an output has a fixed shape of positive sizes", actual=self.shape, where=self.name)

    @property
    def size(self) -> int:
        """Numbers a view, each of 2 bytes."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """All that the meaning and the bytes of a store's labels depend on, apart from the images.

    The number of views an image is not part of it: a store can be extended.

    Attributes:
        plan: how views are drawn.
        teacher: who spoke.
        k: kept classes.
        keep: the k most probable ones, or as many draws from the teacher's probabilities (see `SoftLabels.from_draws`).
        temperatures: at which the tail mass is stored.
        codec: how label values are rounded and packed.
        format: of the shard files.
        outputs: tensors of the teacher that are kept beside its labels, as float16.
        unit_images: at most so many images of one image shard are one unit.
        unit_views: so many views are in a unit; None for all.
        batch_size: of the teacher's forward pass; it changes last bits, as do the next two.
        threads: of torch in each labelling process.
        memory_format: of the teacher's input.
        compile: whether the teacher was compiled (torch.compile), which changes last bits too.
        format_version: of the store's files.
    """

    plan: ViewPlan
    teacher: TeacherCard
    k: int
    keep: Keep = "top"
    temperatures: tuple[float, ...] = (1.0,)
    codec: Codec = "exact"
    format: Format = "arrow"
    outputs: tuple[Output, ...] = ()
    unit_images: int = 1024
    unit_views: int | None = None
    batch_size: int = 16
    threads: int = 1
    memory_format: MemoryFormat = "channels_last"
    compile: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.teacher.num_classes:
            raise ConfigError(
                f"labels.k is between 1 and the teacher's {self.teacher.num_classes} classes", actual=self.k
            )
        if self.codec == "compact" and self.k > COMPACT_MAX_K:
            raise ConfigError(
                f"codec compact keeps at most {COMPACT_MAX_K} classes", actual=f"k = {self.k}", fix="codec: exact"
            )
        for name in ("unit_images", "unit_views", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is at least 1", actual=value)
        names = [output.name for output in self.outputs]
        if len(set(names)) < len(names):
            raise ConfigError("labels.outputs names each output once", actual=names)
        object.__setattr__(self, "temperatures", declare(self.temperatures))
        if self.compile and self.outputs:
            raise ConfigError(
                "a compiled teacher answers with logits alone",
                actual=f"labels.outputs {', '.join(names)}",
                fix="set teacher.compile=false",
            )
        if self.keep not in ("top", "sampled"):
            raise ConfigError("labels.keep is top or sampled", actual=repr(self.keep))
        if self.keep == "sampled" and self.temperatures != (1.0,):
            raise ConfigError(
                "sampled labels are of temperature 1: importance weights cannot be tempered afterwards",
                actual=f"labels.temperatures {list(self.temperatures)}",
                fix="set labels.temperatures=[1], or labels.keep=top",
            )
        if self.keep == "sampled" and self.k > MAX_DRAWS:
            raise ConfigError(f"labels.keep=sampled draws at most {MAX_DRAWS} classes", actual=f"labels.k = {self.k}")

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the canonical JSON of every field."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is its inverse. Fields that came later are left out at their defaults."""
        value = json.loads(canonical_json(dataclasses.asdict(self)))
        if not self.outputs:
            del value["outputs"]
        if self.keep == "top":
            del value["keep"]
        if not self.compile:
            del value["compile"]
        return value

    def labels_of(self, logits_BC: Tensor, image_ids: Sequence[str], views: Sequence[int]) -> SoftLabels:
        """What a store of this spec keeps of a teacher's answers to these views: whoever asks, the same draws."""
        if self.keep == "top":
            return SoftLabels.from_logits(logits_BC, k=self.k, temperatures=self.temperatures)
        keys = zip(image_ids, views, strict=True)
        start_B = [rng.unit_interval(self.plan.seed, "sampled", image_id, int(view)) for image_id, view in keys]
        return SoftLabels.from_draws(logits_BC, k=self.k, start_B=torch.tensor(start_B, dtype=torch.float64))

    def require_outputs(self, names: Sequence[str], *, where: str) -> None:
        """Raises ConfigError naming the outputs that a store of this spec does not hold."""
        held = [output.name for output in self.outputs]
        missing = [name for name in names if name not in held]
        if missing:
            raise ConfigError(
                f"the store holds the outputs {', '.join(names)}",
                actual=f"without {', '.join(missing)}; it holds {', '.join(held) or 'none'}",
                where=where,
                fix=f"label again with labels.outputs naming {missing[0]}",
            )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StoreSpec:
        """The spec written by `to_json`. Raises StoreVersionError for a newer format version."""
        version = data.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise StoreVersionError(
                f"this library reads store format versions up to {FORMAT_VERSION}",
                actual=f"version {version}",
                fix="upgrade kddata",
            )
        plan = _build(ViewPlan, data["plan"])
        teacher = _build(TeacherCard, data["teacher"])
        outputs = tuple(_build(Output, output) for output in data.get("outputs", ()))
        return _build(cls, {**data, "plan": plan, "teacher": teacher, "outputs": outputs})

    def require_equal(self, other: StoreSpec, *, where: str) -> None:
        """Raises StoreMismatchError naming every field in which a stored spec (self) and a wanted one differ."""
        found = differences(self.to_json(), other.to_json())
        if found:
            raise StoreMismatchError(
                "a store keeps the spec it was begun with",
                actual="; ".join(f"{key}: stored {mine!r}, asked {theirs!r}" for key, mine, theirs in found),
                where=where,
                fix="name another store, or go back to the stored values (nothing was changed)",
            )


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, shortest floats that read back equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def differences(mine: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, mine, theirs) for every leaf in which two JSON values differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        found = []
        for name in sorted(mine.keys() | theirs.keys()):
            found += differences(mine.get(name), theirs.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if mine == theirs else [(key, mine, theirs)]


def _build(kind: Any, data: dict[str, Any]) -> Any:
    """A dataclass from JSON: lists become tuples, unknown fields are refused."""
    known = {field.name for field in dataclasses.fields(kind)}
    if data.keys() - known:
        raise StoreVersionError(
            f"this library knows every field of a {kind.__name__}",
            actual=f"also {sorted(data.keys() - known)}",
            fix="upgrade kddata",
        )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
