"""Builders: who makes the network that an `arch` names. Nothing here reads weights, or runs a network.

    torchvision:NAME                     a classifier of torchvision
    timm:NAME                            a model of timm; needs the extra kddata[timm]
    hf:NAME-or-path                      image classification of Hugging Face transformers, by the config.json of a
                                         folder or of a model on the hub; needs the extra kddata[hf]
    python:package.module:callable       the user's own code, called with num_classes=

An arch comes from a job file, never from a store. Trade-off: libraries that one name needs are imported when it is
asked for, so that their absence costs nobody else anything.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kddata.errors import ConfigError, TeacherError

SCHEMES = "torchvision:NAME, timm:NAME, hf:NAME-or-path or python:package.module:callable"
_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")


def builder(arch: str) -> Callable[..., object]:
    """A callable that makes the network, given num_classes=. Raises ConfigError or TeacherError where there is none."""
    scheme, _, name = arch.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face, "python": _python}
    if scheme not in builders:
        raise ConfigError(f"arch is {SCHEMES}", actual=repr(arch))
    return builders[scheme](name)


def public_name(arch: str) -> str:
    """The arch as cards hold it: without a path of this machine. A folder is named by what its config.json says."""
    scheme, _, name = arch.partition(":")
    if scheme != "hf" or not Path(name).is_dir():
        return arch
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    except (OSError, ValueError, AttributeError) as error:
        raise _no_config(name, error) from error
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return f"hf:{config.get('model_type')}@{digest[:16]}"


def is_published(weights: str) -> bool:
    """Whether weights are named as torchvision publishes them, such as "ResNet50_Weights.IMAGENET1K_V2"."""
    return re.fullmatch(r"\w+_Weights\.\w+", weights) is not None


def published_weights(arch: str, name: str) -> dict[str, Tensor]:
    """The weights that torchvision publishes for an arch under a name, from its cache, or fetched into it.

    The hash in the file's name is checked when it is fetched, and no code is loaded (weights_only).

    Raises TeacherError for a name that is not among those of the arch, and where they cannot be fetched.
    """
    import torchvision

    scheme, _, model = arch.partition(":")
    known = []
    if scheme == "torchvision" and model in torchvision.models.list_models():
        known = [str(weights) for weights in torchvision.models.get_model_weights(model)]
    if name not in known:
        raise TeacherError(
            "named weights are those that torchvision publishes for the arch",
            actual=f"{name} for {arch}",
            fix=f"one of {', '.join(known)}, or a safetensors file" if known else "name a safetensors file",
        )
    try:
        return torchvision.models.get_weight(name).get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise TeacherError(
            "published weights can be fetched",
            actual=error,
            where=name,
            fix="fetch them where the network is reached, and name the file as safetensors",
        ) from error


def renamed(network: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored weights under the names that the network has: transformers renames and splits those of older files.

    What does not fit stays as it is, for the caller to name.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(network, transformers.PreTrainedModel):
        return stored
    if stored.keys() == network.state_dict().keys():
        return stored
    with _quiet(transformers):
        loaded, found = type(network).from_pretrained(
            None,
            config=network.config,
            state_dict=dict(stored),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    misshapen = {key: shape for key, shape, _ in found["mismatched_keys"]}
    fits = {k: v for k, v in loaded.state_dict().items() if k not in misshapen and k not in found["missing_keys"]}
    others = {key: stored[key] for key in found["unexpected_keys"] if key in stored}
    return {**fits, **others, **{key: torch.empty(tuple(shape)) for key, shape in misshapen.items()}}


def _torchvision(name: str) -> Callable[..., object]:
    from torchvision import models

    known = models.list_models(module=models)  # classifiers alone
    _require_known("torchvision:NAME names a torchvision classifier", name, known, listed="torchvision.models")
    return lambda num_classes: models.get_model(name, weights=None, num_classes=num_classes)


def _timm(name: str) -> Callable[..., object]:
    timm = _extra("timm", "timm")
    _require_known("timm:NAME names a model of timm", name.partition(".")[0], timm.list_models(), listed="timm")
    return lambda num_classes: timm.create_model(name, pretrained=False, num_classes=num_classes)


def _hugging_face(name: str) -> Callable[..., object]:
    transformers = _extra("transformers", "hf")

    def build(num_classes: int) -> nn.Module:
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            config.num_labels = num_classes
            network = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise _no_config(name, error) from error
        network.register_forward_hook(_logits)
        return network

    return build


def _python(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    where = f"python:{name}"
    try:
        found = getattr(importlib.import_module(module_name), attribute, None) if attribute else None
    except ImportError as error:
        raise ConfigError(
            "arch python:package.module:callable names a module that can be imported here",
            actual=str(error),
            where=where,
            fix="install it, or run where it lies on PYTHONPATH",
        ) from error
    if not callable(found):
        raise ConfigError("arch python:package.module:callable names a callable", actual=repr(name), where=where)
    return found


def _logits(network: nn.Module, arguments: Any, output: Any) -> Any:
    """The logits alone of what a transformers model returns."""
    return getattr(output, "logits", output)


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without the progress bars and reports that transformers prints; what does not fit is said by an error."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _extra(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise TeacherError(
            f"arch {extra}: needs the package {package}", actual=error, fix=f"pip install 'kddata[{extra}]'"
        ) from error


def _require_known(rule: str, name: str, known: Sequence[str], *, listed: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"perhaps {rule.partition(':')[0]}:{near[0]}" if near else f"see {listed}.list_models()"
        raise ConfigError(f"arch {rule}", actual=repr(name), fix=fix)


def _no_config(name: str, error: Exception) -> TeacherError:
    return TeacherError(
        "arch hf:NAME-or-path has the config.json of a model for image classification that transformers itself knows",
        actual=" ".join(str(error).split())[:200],
        where=f"hf:{name}",
        fix="name a folder with config.json, or a model on the hub where it can be reached; remote code is never run",
    )
