"""Reading a job file: YAML plus `key=value` overrides, checked against a model, with every fault listed at once.

Trade-off: values are checked strictly (k: "10" is refused), so that a slip of quoting is found here and not an hour
into a run.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kddata.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_MAX_VALUES = 1_000_000  # of a job file with its aliases written out; a list of 100,000 image shards is far below
_YAML_WORDS = {  # of a job file, where pydantic speaks of JSON
    "Input should be a valid array": "Input should be a list in brackets, as in [a, b]",
    "Input should be an object": "Input should be a section of keys with values",
}
_FOREIGN = 2  # sections that are missing, and as many that are unknown: no slip of the finger
Location = str | tuple[str, ...]


class Section(BaseModel):
    """A part of a job file: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    data = parse(text, where=str(path))
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
        found: list[dict[str, Any]] = [dict(fault) for fault in error.errors(include_url=False)]
        faults = _faults(kind, found)
        sections = [str(fault["type"]) for fault in found if len(fault["loc"]) == 1]
        foreign = sections.count("missing") >= _FOREIGN and sections.count("extra_forbidden") >= _FOREIGN
        raise ConfigError(
            "a job file has known keys and fitting values",
            actual=f"{len(faults)} fault{'s' * (len(faults) > 1)}:\n  " + "\n  ".join(faults) + "\n",
            where=where,
            fix="check whether it is the job file of another command: whole sections are missing, and others unknown"
            if foreign
            else "mend these keys, in the file or in the overrides",
        ) from None


def _faults(kind: type[BaseModel], found: list[dict[str, Any]]) -> list[str]:
    """One line for each value in which pydantic found faults: where several types would do, it finds one for each."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for fault in found:
        *way, last = fault["loc"]
        key = ".".join(map(str, filter(_is_key, fault["loc"])))
        if fault["type"] == "extra_forbidden":
            wanted[_unknown(kind, ".".join(map(str, [*filter(_is_key, way), last]))), ""] = []
        elif fault["type"] == "missing":
            wanted[f"{key}: missing", ""] = []
        else:
            message = fault["msg"].removeprefix("Value error, ")
            message = _YAML_WORDS.get(message, message)
            wanted.setdefault((key, f"; got {fault['input']!r}"), []).append(f"{message[0].lower()}{message[1:]}")
    return [_line(key, list(dict.fromkeys(messages)), got) for (key, got), messages in wanted.items()]


def _line(key: str, messages: list[str], got: str) -> str:
    if not messages:
        return key
    first, *others = messages
    return f"{key}: {' or '.join([first, *(other.removeprefix('input should be ') for other in others)])}{got}"


def _is_key(part: str | int) -> bool:
    """Whether a part of a place is a key or an index of the file, and not the type by which pydantic read a value."""
    return isinstance(part, int) or not (part in ("str", "int", "float", "bool") or re.search(r"[^a-z0-9_]", part))


def _unknown(kind: type[BaseModel], key: str) -> str:
    """One line for a key that there is not."""
    known, (section, _, last) = _keys(kind), key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    # By its own name, not the whole: optimizer.learning_rate looks like optimizer.name, which helps nobody.
    near = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    near = near or [name for name in known if name.rpartition(".")[2] == last][:1]
    near = near or difflib.get_close_matches(key, [name for name in known if not name.startswith(section)], n=1)
    return f"{key}: no such key; " + (f"the nearest is {near[0]}" if near else f"known are {', '.join(siblings)}")


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
    for i, part in enumerate(path[:-1]):
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(
                "an override goes into a mapping",
                actual=f"{part}: {below!r}",
                where=repr(override),
                fix=f"replace the whole of {part}, as {'.'.join(path[: i + 1])}=VALUE",
            )
        data = below
    data[path[-1]] = parse(text, where=repr(override))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name for name, _ in node.value]
        values = [name.value for name in names]
        for i, name in enumerate(names):
            if name.value in values[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name.value!r} twice", name.start_mark)
        return super().construct_mapping(node, deep=deep)


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _expanded(value: Any, seen: dict[int, int]) -> int:
    """How many values there are once every alias is written out: ten short lines of YAML can stand for a billion."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in seen:
        seen[id(value)] = _MAX_VALUES  # what an alias inside its own anchor stands for
        parts = value.values() if isinstance(value, dict) else value
        seen[id(value)] = 1 + sum(_expanded(part, seen) for part in parts)
    if seen[id(value)] >= _MAX_VALUES:
        raise ValueError(f"aliases stand for at most {_MAX_VALUES} values in all")
    return seen[id(value)]


def parse(text: str, *, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError for broken YAML and for aliases that stand for too much."""
    try:
        value = yaml.load(text, _Loader)
        _expanded(value, {})
        return value
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("a job file and its overrides are YAML", actual=reason, where=where) from error


def absolute(location: str) -> str:
    """A location of which a plain path has become absolute, since workers run elsewhere; URLs stay."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


def absolute_weights(weights: str | None) -> str | None:
    """Weights of which a plain path has become absolute; a name of torchvision's stays."""
    from kddata.builders import is_published

    return weights if weights is None or is_published(weights) else absolute(weights)


def absolute_arch(arch: str) -> str:
    """An arch of which the folder in hf:FOLDER has become absolute, like a location; any other stays."""
    scheme, _, name = arch.partition(":")
    return f"hf:{absolute(name)}" if scheme == "hf" and Path(name).expanduser().is_dir() else arch


def all_absolute(location: Location) -> Location:
    """`absolute` for one location or a list of them."""
    return absolute(location) if isinstance(location, str) else tuple(map(absolute, location))


def with_places(method: dict[str, Any]) -> dict[str, Any]:
    """A method whose files (of the teacher's weights) have absolute places, in the terms of a sum too."""
    found = dict(method)
    for key in ("classifier", "teacher_weights"):
        if isinstance(found.get(key), str):
            found[key] = absolute(found[key])
    if isinstance(found.get("terms"), list):
        found["terms"] = [with_places(term) if isinstance(term, dict) else term for term in found["terms"]]
    return found
