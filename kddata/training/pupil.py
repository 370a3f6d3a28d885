"""The pupil: the student with all that is learned beside it, as one thing to train, save, judge and keep.

It knows neither batches nor losses. Trade-off: what is captured of the student belongs to it, so that it has an end
(`close`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddata import rng
from kddata.features import Capture
from kddata.losses import Method
from kddata.store import LabelStore
from kddata.training.branches import Branched
from kddata.training.exam import Exam
from kddata.training.head import Answering, folded, require_foldable
from kddata.training.job import OptimizerArgs, TrainingJob
from kddata.training.students import average_of, build_student, make_optimizer


class Pupil:
    """A student of a job, on its device.

    Attributes:
        network: what is trained: the student, and within it or beside it what the method learns.
        student: the student alone.
        parts: what the method learns beside it, where it has any.
        capture: of the student's tensors that the method needs, where it needs any.
    """

    def __init__(
        self,
        job: TrainingJob,
        store: LabelStore,
        method: Method,
        *,
        pixels_of: Callable[[Tensor], Tensor],
        device: str,
    ) -> None:
        self._args, self._method = job.student, method
        self.student = build_student(
            job.student, size_px=job.data.size_px, seed=job.data.seed, pixels_of=pixels_of, device=device
        )
        self._average = None if job.optimizer.ema is None else average_of(self.student, job.optimizer.ema)
        self.capture = Capture(self.student, method.needs.student) if method.needs.student else None
        self.parts = _parts(job, store, method, self.student, self.capture, pixels_of, device)
        alone = self.parts is None and not method.needs.boundary
        self.network = self.student if alone else _Both(self.student, self.parts)
        if method.needs.cohort == "branches":
            self.network = _branched(job, method, self.student, pixels_of, device)
            self.parts = self.network.parts
        if job.student.compile:
            self._kept.compile()  # in place, so that names of weights stay
            self.student.compile()

    def optimizer(self, args: OptimizerArgs) -> Optimizer:
        """Of all that is trained."""
        return make_optimizer(args, self.network, self.student)

    def examined(self, exam: Exam) -> dict[str, Any]:
        """The scores of what is judged, by name."""
        return exam.summary(self.judged)

    def after_step(self) -> None:
        """To be called after each optimizer step."""
        if self._average is not None:
            self._average.update_parameters(self.student)

    @property
    def judged(self) -> nn.Module:
        """What answers in evaluation: the student or its average, with the method's head behind it."""
        if self._method.head is None:
            return self._kept
        return Answering(self._kept, lambda x: self._method.answer(x, self.parts))

    def result(self) -> nn.Module:
        """The student that is left in the end: of the architecture that was asked for."""
        if self._method.head is None:
            return self._kept
        num_classes, arch = self._args.num_classes, self._args.arch
        return folded(self._kept, lambda x: self._method.answer(x, self.parts), num_classes, where=arch)

    def peers(self) -> list[nn.Module]:
        """Other students that are left in the end: none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: module.state_dict() for name, module in self._modules().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; other keys are left alone."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])

    def close(self) -> None:
        """Takes what captures off the student."""
        if self.capture is not None:
            self.capture.close()

    @property
    def _kept(self) -> nn.Module:
        return self.student if self._average is None else self._average.module

    def _modules(self) -> dict[str, nn.Module]:
        found = {"student": self.student, "parts": self.parts, "average": self._average}
        return {name: module for name, module in found.items() if module is not None}


class _Both(nn.Module):
    """Answers as the student; holds the method's parts too, so that ranks share their gradients.

    With boundary samples, both answers come from one call, since ranks average gradients by the call.
    """

    def __init__(self, student: nn.Module, parts: nn.Module | None) -> None:
        super().__init__()
        self.student, self.parts = student, parts

    def forward(self, pixels: Tensor, samples: Tensor | None = None) -> Any:
        if samples is None:
            return self.student(pixels)
        of_samples = self.student(samples)  # first: what is captured is of the last call
        return self.student(pixels), of_samples


def _branched(
    job: TrainingJob, method: Method, student: nn.Module, pixels_of: Callable[[Tensor], Tensor], device: str
) -> Branched:
    """The student with further branches, each from random numbers of its own, and their gate."""
    pixels = pixels_of(torch.zeros(2, 3, job.data.size_px, job.data.size_px, dtype=torch.uint8))
    others = []
    for number in range(1, method.needs.branches):
        seed = int.from_bytes(rng.key_bytes(job.data.seed, "branch", number)[:7], "little")
        args = {"size_px": job.data.size_px, "seed": seed, "pixels_of": pixels_of, "device": device}
        others.append(build_student(job.student, **args))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(rng.key_bytes(job.data.seed, "gate")[:8], "little"))
        return Branched(student, others, method.needs.node, pixels)


def _parts(
    job: TrainingJob,
    store: LabelStore,
    method: Method,
    student: nn.Module,
    capture: Capture | None,
    pixels_of: Callable[[Tensor], Tensor],
    device: str,
) -> nn.Module | None:
    """What the method learns beside the student, from random numbers of the run's seed; None where it has none.

    Raises ConfigError where tensors of the two sides cannot be compared, and where the method has a head and the
    student cannot take it in at the end; TeacherError where the student has no such tensor.
    """
    num_classes, size_px = job.student.num_classes, job.data.size_px
    pixels = pixels_of(torch.arange(3 * size_px**2).remainder(256).view(1, 3, size_px, size_px).to(torch.uint8))
    student_shapes: dict[str, Sequence[int]] = {"logits": (num_classes,)}
    if capture is not None:
        with torch.inference_mode():
            student(pixels)
        student_shapes |= {name: tuple(x.shape[1:]) for name, x in capture.take().items()}
    if not method.needs.parts:
        return None
    if method.head is not None:
        require_foldable(student, pixels, num_classes, where=job.student.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(rng.key_bytes(job.data.seed, "parts")[:8], "little"))
        parts = method.parts(student_shapes, {output.name: output.shape for output in store.spec.outputs})
    return parts.to(device)
