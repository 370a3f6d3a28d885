"""The cohort: several pupils that are trained in one run, as one thing to save, judge and keep.

To the training loop it is a pupil; the first of them is the run's student, and the others are kept beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kddata import rng
from kddata.losses import Method
from kddata.store import LabelStore
from kddata.training.exam import Exam
from kddata.training.job import OptimizerArgs, TrainingJob
from kddata.training.pupil import Pupil


class Cohort:
    """The students of a job with peers; each starts from random numbers of its own. See `Pupil`."""

    parts = None
    capture = None

    def __init__(
        self,
        job: TrainingJob,
        store: LabelStore,
        method: Method,
        *,
        pixels_of: Callable[[Tensor], Tensor],
        device: str,
    ) -> None:
        self.pupils = []
        for number, student in enumerate((job.student, *job.peers)):
            seed = job.data.seed
            if number:
                seed = int.from_bytes(rng.key_bytes(seed, "peer", number)[:7], "little")
            alone = dataclasses.replace(job, student=student, data=dataclasses.replace(job.data, seed=seed))
            self.pupils.append(Pupil(alone, store, method, pixels_of=pixels_of, device=device))
        self.network = nn.ModuleList(pupil.network for pupil in self.pupils)

    def optimizer(self, args: OptimizerArgs) -> Optimizers:
        """One for each."""
        return Optimizers([pupil.optimizer(args) for pupil in self.pupils])

    def after_step(self) -> None:
        for pupil in self.pupils:
            pupil.after_step()

    def examined(self, exam: Exam) -> dict[str, Any]:
        """The scores of the first, and those of the others under `peers`."""
        first, *others = (pupil.examined(exam) for pupil in self.pupils)
        return {**first, "peers": others}

    def result(self) -> nn.Module:
        return self.pupils[0].result()

    def peers(self) -> list[nn.Module]:
        """The other students that are left in the end."""
        return [pupil.result() for pupil in self.pupils[1:]]

    def state_dict(self) -> dict[str, Any]:
        return {f"{i}.{name}": x for i, pupil in enumerate(self.pupils) for name, x in pupil.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, pupil in enumerate(self.pupils):
            begin = f"{i}."
            pupil.load_state_dict({key[len(begin) :]: x for key, x in state.items() if key.startswith(begin)})

    def close(self) -> None:
        for pupil in self.pupils:
            pupil.close()


class Optimizers:
    """Optimizers as one, for a checkpoint."""

    def __init__(self, each: list[Optimizer]) -> None:
        self.each = each

    def state_dict(self) -> dict[str, Any]:
        """Theirs, by number."""
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.each)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        for i, optimizer in enumerate(self.each):
            optimizer.load_state_dict(state[str(i)])
