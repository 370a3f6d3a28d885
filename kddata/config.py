"""Job files: YAML plus `key=value` overrides, checked, and turned into the plain jobs that the rest of kddata takes.

Every key here does something; an unknown one is an error that names the nearest. Nothing below this module knows
pydantic or YAML. Trade-off: values are checked strictly (k: "10" is refused), so that a slip of quoting is found
here and not an hour into a run.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kddata.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Rgb = tuple[float, float, float]
Range = tuple[float, float]

IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)


class Section(BaseModel):
    """A part of a job file: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Teacher(Section):
    """`teacher:` who is asked."""

    arch: str
    weights: str | None = None
    num_classes: Count
    size_px: Count
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD
    class_names: str | None = None
    batch_size: Count = 16
    memory_format: Literal["contiguous", "channels_last"] = "channels_last"


class Views(Section):
    """`views:` what is cut from each image. policy center: the evaluation view at the teacher's input size."""

    per_image: Count = 1
    seed: int = 0
    policy: Literal["none", "center"] = "none"
    area: Range = (0.08, 1.0)
    aspect: Range = (3 / 4, 4 / 3)
    flip_p: Share = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class Labels(Section):
    """`labels:` what is kept of each answer."""

    k: Count
    temperatures: tuple[Positive, ...] = (1.0,)
    codec: Literal["exact"] = "exact"


class Units(Section):
    """`units:` how work and label files are cut: at most so many images of one image shard, and views (null: all)."""

    images: Count = 1024
    views: Count | None = None


class Limits(Section):
    """`limits:` bad_images is the share of images that may be unreadable; pixels the most that one image may have."""

    bad_images: Share = 0.001
    pixels: Count = 100_000_000


class LabelCluster(Section):
    """`cluster:` of a label job: processes that hold a teacher, and what each of them gets."""

    teachers: Count = 1
    gpus_per_teacher: Annotated[float, Field(ge=0)] = 0
    threads_per_teacher: Count = 1


class LabelFile(Section):
    """A label job: images x views x teacher -> a store."""

    images: str | tuple[str, ...]
    store: str
    teacher: Teacher
    views: Views = Views()
    labels: Labels
    units: Units = Units()
    limits: Limits = Limits()
    cluster: LabelCluster = LabelCluster()


File = TypeVar("File", bound=Section)


def load(kind: type[File], path: str | Path, overrides: Sequence[str] = ()) -> File:
    """A checked job file, with `dotted.key=value` overrides whose values are YAML.

    Raises ConfigError for a missing file, broken YAML, a repeated or unknown key (naming the nearest), or a value
    that does not fit; every fault is listed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("a job file can be read", actual=error, where=path, fix="check the path") from error
    data = _parse(text, where=str(path))
    if not isinstance(data, dict):
        raise ConfigError("a job file is a mapping of keys to values", actual=type(data).__name__, where=path)
    for override in overrides:
        _override(data, override)
    return check(kind, data, where=str(path))


def check(kind: type[File], data: dict[str, Any], *, where: str) -> File:
    """The job file that a mapping holds. Raises ConfigError that lists every fault."""
    try:  # by way of JSON, where lists are tuples and nothing else is converted
        return kind.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        faults = [_fault(kind, dict(fault)) for fault in error.errors(include_url=False)]
        raise ConfigError(
            "a job file has known keys and fitting values",
            actual=f"{len(faults)} fault{'s' * (len(faults) > 1)}:\n  " + "\n  ".join(dict.fromkeys(faults)) + "\n",
            where=where,
            fix="mend these keys, in the file or in the overrides",
        ) from None


def _fault(kind: type[BaseModel], fault: dict[str, Any]) -> str:
    """One line for one fault that pydantic found."""
    parts = [str(part) for part in fault["loc"]]
    key = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        known = _keys(kind)
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        near = difflib.get_close_matches(key, siblings + known, n=1, cutoff=0.6)
        near = near or [name for name in known if name.rpartition(".")[2] == parts[-1]][:1]
        return f"{key}: no such key; " + (f"the nearest is {near[0]}" if near else f"known are {', '.join(siblings)}")
    if fault["type"] == "missing":
        return f"{key}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}; got {fault['input']!r}"


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a job file."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _keys(field.annotation, f"{prefix}{name}.")
    return found


def _override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted key of a job file in place."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError("an override is key=value with a dotted key, such as labels.k=10", actual=repr(override))
    for part in path[:-1]:
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError("an override goes into a mapping", actual=f"{part}: {below!r}", where=repr(override))
        data = below
    data[path[-1]] = _parse(text, where=repr(override))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name.value!r} twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep=deep)


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _parse(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("a job file and its overrides are YAML", actual=reason, where=where) from error
