"""Tensors of a teacher's weights that a method reads: of its classifier, and of its BatchNorms."""

from __future__ import annotations

from collections.abc import Sequence

import fsspec
from safetensors.torch import load
from torch import Tensor

from kddata.errors import ConfigError


def read_weights(url: str, key: str, names: Sequence[str], *, ndim: int, kind: str, fix: str) -> list[Tensor]:
    """The tensors of these names in a safetensors file.

    Args:
        key: of the method's argument that names the file.
        ndim: of the weights among which others are suggested, which are `kind` layers.

    Raises ConfigError where the file, or a tensor in it, is not there.
    """
    try:
        with fsspec.open(url, "rb") as file:
            weights = load(file.read())
    except FileNotFoundError as error:
        raise ConfigError(f"method.{key} names the teacher's weights", actual="no such file", where=url) from error
    missing = [name for name in names if name not in weights]
    if missing:
        layers = [name.removesuffix(".weight") for name, x in weights.items() if x.ndim == ndim]
        layers = sorted(layer for layer in layers if f"{layer}.weight" in weights)
        raise ConfigError(
            f"the teacher's weights hold {' and '.join(missing)}",
            actual=f"{kind} layers {', '.join(layers) or 'none'}",
            where=url,
            fix=fix,
        )
    return [weights[name] for name in names]
