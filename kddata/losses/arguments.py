"""Arguments: what a method's arguments may be, checked before any image is read, by the annotation of each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

from kddata.errors import ConfigError


def check_value(key: str, value: Any, annotation: str) -> None:
    """Raises ConfigError unless the value is what the annotation stands for."""
    rule = next((rule for kinds, rule, fits in _VALUES if annotation in kinds and not fits(value)), None)
    if rule is None and key == "temperature" and value <= 0:
        rule = "above 0"
    if rule is not None:
        raise ConfigError(f"method.{key} is {rule}", actual=repr(value))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is_list(x: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(map(fits, x))


def _is_node(x: Any) -> bool:
    return isinstance(x, str) and x != "" and ":" not in x


_VALUES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("float",), "a number", _is_number),
    (("bool",), "true or false", lambda x: isinstance(x, bool)),
    (("int",), "a whole number, not below 0", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0),
    (("str",), "a text", lambda x: isinstance(x, str) and x != ""),
    (("Backend",), "auto, torch or triton", lambda x: x in ("auto", "torch", "triton")),
    (("DenseTail | None",), "uniform, renorm or null", lambda x: x in (None, "uniform", "renorm")),
    (("Sequence[float]",), "a list of numbers above 0", lambda x: _is_list(x, lambda t: _is_number(t) and t > 0)),
    (("Nodes",), "a list of layers", lambda x: _is_list(x, _is_node)),
    (("Nodes | None",), "a list of layers or null", lambda x: x is None or _is_list(x, _is_node)),
    (("str | None",), "a text or null", lambda x: x is None or (isinstance(x, str) and x != "")),
    (("Pairs",), "a list of two layers each", lambda x: _is_list(x, lambda p: len(p) == 2 and _is_list(p, _is_node))),
)


def unknown(what: str, name: str, known: list[str]) -> ConfigError:
    """The error of a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, known, n=1)
    return ConfigError(
        f"{what} is one of {', '.join(known)}", actual=repr(name), fix=f"perhaps {near[0]} was meant" if near else None
    )
