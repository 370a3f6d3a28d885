"""Teachers: networks built from a description and weights, frozen, that answer uint8 views with logits.

A description names its builder, such as "torchvision:mobilenet_v2"; see `kddata.builders`. Students are built here too.
Nothing here trains, stores or draws views. Trade-off: every forward pass is padded to one batch size and pinned to one
thread count, so that a view's logits do not depend on what else is in its batch. (Its place in the batch may move last
bits: some CPU kernels treat the rows at the end of a small matrix otherwise.)

Shapes: B views, C classes, S side in pixels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kddata import builders, rng
from kddata.boundary import boundary_samples, to_pixels
from kddata.cards import Dtype, MemoryFormat, TeacherCard
from kddata.errors import ConfigError, TeacherError
from kddata.features import Capture

_NAMED_MISFITS = 5
_WEIGHTS = "name a safetensors file by its path or URL; relative paths start at the working directory"


class Answers(Protocol):
    """What labelling asks of a teacher. Equal calls get equal logits; those of equal pixels do not depend on the views
    beside them, but for last bits, which the batch size and the place in a batch may move.
    """

    @property
    def card(self) -> TeacherCard:
        """Who answers."""
        ...

    def __call__(self, pixels_u8_B3SS: Tensor) -> Tensor:
        """float32 [B, C] logits on the CPU, for uint8 views of the card's size, any B."""
        ...

    def answer(self, pixels_u8_B3SS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same logits, and the outputs [B, ...] that the teacher was loaded to give, on the CPU, by name."""
        ...

    def boundary(self, pixels_u8_B3SS: Tensor, attack_class_B: Tensor) -> tuple[Tensor, Tensor]:
        """Boundary samples towards these classes, and float32 logits of them; see `Teacher.boundary`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TeacherArgs:
    """A teacher as a job names it.

    Attributes:
        arch: "torchvision:NAME", "timm:NAME", "hf:NAME-or-path", or "python:package.module:callable".
        weights: URL or path of a safetensors file, or a name of torchvision's (ResNet50_Weights.IMAGENET1K_V2); None
            only for a `python:` callable that brings its own.
        num_classes: C.
        size_px: side of its input.
        dtype: in which it runs. bfloat16 is quick on GPUs, and keeps about three digits of a logit.
        mean, std: of its input channels, for pixels in [0, 1].
        class_names: in the order of its logits, where known.
        labels_sha256: of the labels that it was trained on, where known: as in the card.json of a training run.
    """

    arch: str
    weights: str | None = None
    num_classes: int
    size_px: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    class_names: tuple[str, ...] | None = None
    labels_sha256: str | None = None
    dtype: Dtype = "float32"


class Teacher:
    """A frozen network with its card. Calling it answers views with logits; see `Answers`."""

    def __init__(
        self,
        network: nn.Module,
        card: TeacherCard,
        *,
        device: str = "cpu",
        batch_size: int = 16,
        threads: int = 1,
        memory_format: MemoryFormat = "channels_last",
        compile: bool = False,
        outputs: Sequence[str] = (),
    ) -> None:
        self.card = card
        self._device = torch.device(device)
        self._batch_size, self._threads = batch_size, threads
        self._layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self._dtype = torch.bfloat16 if card.dtype == "bfloat16" else torch.float32
        network = network.eval().requires_grad_(False).to(self._device, self._dtype)
        self._network = network.to(memory_format=self._layout)
        self._capture = Capture(self._network, outputs)
        if compile:  # one shape alone is ever asked: chunks are padded to the batch size
            self._network = torch.compile(self._network, dynamic=False)  # type: ignore[assignment]
        self._take_statistics()

    def _take_statistics(self) -> None:
        self._mean_311, self._std_311 = (
            torch.tensor(values, device=self._device)[:, None, None] for values in (self.card.mean, self.card.std)
        )

    def __call__(self, pixels_u8_B3SS: Tensor) -> Tensor:
        """float32 [B, C] logits on the CPU. Raises TeacherError where the network's answer has another shape."""
        return self.answer(pixels_u8_B3SS)[0]

    @torch.inference_mode()
    def answer(self, pixels_u8_B3SS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and float32 outputs [B, ...] by name, on the CPU. Raises like a call.

        Where there are no views, there are no outputs either.
        """
        self._check(pixels_u8_B3SS)
        with _torch_threads(self._threads), _exact_cudnn():
            parts = [self._forward(chunk) for chunk in pixels_u8_B3SS.split(self._batch_size)]
        if not len(pixels_u8_B3SS):
            return torch.empty(0, self.card.num_classes), {}
        outputs = {name: torch.cat([outputs[name] for _, outputs in parts]) for name in parts[0][1]}
        return torch.cat([logits for logits, _ in parts]), outputs

    def boundary(self, pixels_u8_B3SS: Tensor, attack_class_B: Tensor) -> tuple[Tensor, Tensor]:
        """(samples, logits): the views walked to the boundary towards these classes, as `boundary_samples` says.

        Samples are pixels of 0 to 255, float16 [B, 3, S, S]; logits float32 [B, C], of those rounded samples. Both are
        on the CPU, and a row does not depend on the others. The walk is in the teacher's normalised input. Raises like
        a call.
        """
        self._check(pixels_u8_B3SS)
        with _torch_threads(self._threads), _exact_cudnn():
            chunks = zip(pixels_u8_B3SS.split(self._batch_size), attack_class_B.split(self._batch_size), strict=True)
            samples = [self._walk(*chunk) for chunk in chunks]
            with torch.inference_mode():
                logits = [self._forward(sample)[0] for sample in samples]
        return torch.cat(samples), torch.cat(logits)

    def _walk(self, pixels_u8_B3SS: Tensor, attack_class_B: Tensor) -> Tensor:
        num_views = len(pixels_u8_B3SS)
        attack = attack_class_B.new_zeros(self._batch_size)
        attack[:num_views] = attack_class_B
        moved = boundary_samples(
            lambda x: self._network(x.to(self._dtype).contiguous(memory_format=self._layout)).float(),
            self._input(pixels_u8_B3SS),
            attack.to(self._device),
            lowest=(0 - self._mean_311) / self._std_311,
            highest=(1 - self._mean_311) / self._std_311,
        )
        self._capture.forget()
        return to_pixels(moved, self._mean_311, self._std_311)[:num_views].cpu()

    def with_statistics(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Teacher:
        """The same network fed pixels that are normalised otherwise. Nothing is copied."""
        other = copy.copy(self)
        other.card = dataclasses.replace(self.card, mean=mean, std=std)
        other._take_statistics()
        return other

    def _check(self, pixels_u8_B3SS: Tensor) -> None:
        size_px = self.card.size_px
        if pixels_u8_B3SS.dtype != torch.uint8 or tuple(pixels_u8_B3SS.shape[1:]) != (3, size_px, size_px):
            raise ValueError(
                f"views for this teacher are uint8 [B, 3, {size_px}, {size_px}]; "
                f"got {pixels_u8_B3SS.dtype} {tuple(pixels_u8_B3SS.shape)}"
            )

    def _input(self, pixels_B3SS: Tensor) -> Tensor:
        """Pixels, normalised and padded to the batch size, on the device."""
        padded = pixels_B3SS.new_zeros(self._batch_size, *pixels_B3SS.shape[1:])
        padded[: len(pixels_B3SS)] = pixels_B3SS
        return padded.to(self._device).float().div_(255).sub_(self._mean_311).div_(self._std_311)

    def _forward(self, pixels_B3SS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        num_views, wanted = len(pixels_B3SS), (self._batch_size, self.card.num_classes)
        x = self._input(pixels_B3SS)
        logits = self._network(x.to(self._dtype).contiguous(memory_format=self._layout))
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            raise TeacherError(
                f"a teacher of {wanted[1]} classes answers a batch of {wanted[0]} views with logits of shape {wanted}",
                actual=tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__,
                where=self.card.arch,
                fix="set teacher.num_classes to the width of the network's output",
            )
        outputs = {name: x[:num_views].float().cpu() for name, x in self._capture.take().items()}
        return logits[:num_views].float().cpu(), outputs


def load_teacher(
    args: TeacherArgs,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    threads: int = 1,
    memory_format: MemoryFormat = "channels_last",
    compile: bool = False,
    outputs: Sequence[str] = (),
) -> Teacher:
    """A teacher, ready to answer: built, loaded, fingerprinted, and asked once about a black view.

    Args:
        compile: by torch.compile, which takes its time in the first answer; then there are no outputs.
        outputs: names of the tensors inside it that `answer` gives too; see `kddata.features`.

    Raises TeacherError for an unknown architecture, weights that are missing or do not fit, a class list of another
    length than num_classes, or an answer of another width; and where it cannot be compiled here.
    """
    if compile and outputs:
        raise ConfigError(
            "a compiled teacher answers with logits alone",
            actual=f"outputs {', '.join(outputs)}",
            fix="set teacher.compile=false",
        )
    if args.class_names is not None and len(args.class_names) != args.num_classes:
        raise TeacherError(
            "a class list has one name for each class of its teacher",
            actual=f"{len(args.class_names)} names, num_classes {args.num_classes}",
            where=args.arch,
        )
    if args.weights is None and not args.arch.startswith("python:"):
        raise TeacherError("a teacher has weights", actual="weights: null", where=args.arch, fix="name them")
    network = build_network(args.arch, num_classes=args.num_classes, weights=args.weights)
    names = None if args.class_names is None else "".join(f"{name}\n" for name in args.class_names)
    card = TeacherCard(
        arch=builders.public_name(args.arch),
        weights_sha256=weights_sha256(network),
        num_classes=args.num_classes,
        classes_sha256=None if names is None else hashlib.sha256(names.encode()).hexdigest(),
        size_px=args.size_px,
        mean=args.mean,
        std=args.std,
        dtype=args.dtype,
        labels_sha256=args.labels_sha256,
    )
    teacher = Teacher(
        network,
        card,
        device=device,
        batch_size=batch_size,
        threads=threads,
        memory_format=memory_format,
        compile=compile,
        outputs=outputs,
    )
    try:
        teacher(torch.zeros(1, 3, args.size_px, args.size_px, dtype=torch.uint8))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise TeacherError(
            "a compiled teacher has a compiler: C++ on the CPU, Triton on a GPU",
            actual=" ".join(str(error).split())[:200],
            where=args.arch,
            fix="install one, or set teacher.compile=false",
        ) from error
    except (AssertionError, RuntimeError, ValueError) as error:  # what networks raise for an input of another size
        raise TeacherError(
            f"a teacher takes views of {args.size_px} px (teacher.size_px)",
            actual=" ".join(str(error).split())[:200],
            where=args.arch,
            fix="set teacher.size_px to the input size of the network",
        ) from error
    return teacher


def build_network(
    arch: str, *, num_classes: int, weights: str | None = None, seed: int = 0, new_head: bool = False
) -> nn.Module:
    """The network that `arch` names, in eval mode, on the CPU, in float32: a pure function of its arguments.

    Args:
        arch: as in `TeacherArgs`; see `kddata.builders`.
        num_classes: handed to the builder by this name.
        weights: URL or path of a safetensors file, or a name of torchvision's. They fit exactly; half precision is cast
            to float. None keeps the builder's own initial weights.
        seed: of those initial weights.
        new_head: the weights are of another number of classes; tensors that differ in it alone keep initial values.

    Raises ConfigError for an arch that names no builder, TeacherError for weights that are missing or do not fit, and
    for a builder whose package is not installed.
    """
    build = builders.builder(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(rng.key_bytes(seed, "weights")[:8], "little"))
        network = build(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise TeacherError("arch builds a torch.nn.Module", actual=type(network).__name__, where=arch)
    network = network.float().eval()
    if weights is not None:
        _load_weights(network, weights, arch, num_classes if new_head else None)
    return network


def weights_sha256(network: nn.Module) -> str:
    """Hex SHA-256 of every parameter and buffer: name, dtype, shape and values, in order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}\n{value.dtype}\n{tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_weights(network: nn.Module, url: str, arch: str, new_classes: int | None) -> None:
    """Loads a file that fits; with `new_classes`, all of it but the layer whose width is the number of classes."""
    stored = builders.published_weights(arch, url) if builders.is_published(url) else _read_weights(url, arch)
    wanted, stored = network.state_dict(), builders.renamed(network, stored)
    if new_classes is not None:
        head = [
            name
            for name, value in wanted.items()
            if name in stored
            and len(value.shape) > 0
            and (value.shape[0], stored[name].shape[1:]) == (new_classes, value.shape[1:])
            and stored[name].shape != value.shape
        ]
        if not head:
            raise TeacherError(
                "new_head is for weights of another number of classes",
                actual=f"no layer of {url} that differs from num_classes {new_classes} alone",
                where=arch,
                fix="leave new_head out",
            )
        stored = {name: value for name, value in stored.items() if name not in head}
        stored |= {name: wanted[name] for name in head}
    # A BatchNorm's step counter says nothing about its answers, and many files leave it out.
    missing = [name for name in wanted if name not in stored and not name.endswith("num_batches_tracked")]
    unexpected = sorted(name for name in stored if name not in wanted)
    misshapen = [
        f"{name} {list(stored[name].shape)} for {list(value.shape)}"
        for name, value in wanted.items()
        if name in stored and stored[name].shape != value.shape
    ]
    misfits = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(misfits.values()):
        raise TeacherError(
            f"weights fit {arch} exactly",
            actual="; ".join(f"{len(names)} {how}: {_first(names)}" for how, names in misfits.items() if names),
            where=url,
            fix="check arch and num_classes",
        )
    network.load_state_dict(stored, strict=False)  # casts to the network's dtype; all that may miss are step counters


def _read_weights(url: str, arch: str) -> dict[str, Tensor]:
    import fsspec
    from safetensors import SafetensorError
    from safetensors.torch import load

    if "::" in url or url.lower().startswith("pipe:"):
        raise TeacherError("weights are one file at a path or URL", actual=repr(url), where=arch, fix="copy them first")
    try:
        with fsspec.open(url, "rb") as file:
            return load(file.read())
    except FileNotFoundError as error:
        raise TeacherError("weights exist", actual="no such file", where=url, fix=_WEIGHTS) from error
    except OSError as error:
        raise TeacherError("weights can be read", actual=error, where=url, fix=_WEIGHTS) from error
    except SafetensorError as error:
        raise TeacherError("weights are a safetensors file", actual=str(error), where=url, fix=_WEIGHTS) from error


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMED_MISFITS]) + (", ..." if len(names) > _NAMED_MISFITS else "")


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Torch's thread count within a block: it changes last bits, so a teacher never takes what it finds."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _exact_cudnn() -> contextlib.AbstractContextManager[None]:
    """cuDNN without autotuning and TF32: the same bits on every run."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
