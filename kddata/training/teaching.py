"""A teacher in the loop: it labels each batch anew, as the store was labelled. The oracle of the cached labels.

Trade-off: it must be the store's own, so that a run differs from a cached one by the rounding of what is stored alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kddata.cards import differences
from kddata.errors import StoreMismatchError
from kddata.labelling import boundary_outputs
from kddata.losses import Method
from kddata.replay import Batch
from kddata.store import LabelStore
from kddata.teacher import TeacherArgs, load_teacher
from kddata.training.steps import Taught


def teacher_in_the_loop(args: TeacherArgs, store: LabelStore, method: Method, device: str) -> Callable[[Batch], Taught]:
    """Labels a batch, and makes the outputs that the method needs. Raises StoreMismatchError for another teacher."""
    spec = store.spec
    teacher = load_teacher(
        args,
        device=device,
        batch_size=spec.batch_size,
        threads=spec.threads,
        memory_format=spec.memory_format,
        compile=spec.compile,
        outputs=method.needs.outputs,
    )
    found = differences(dataclasses.asdict(spec.teacher), dataclasses.asdict(teacher.card))
    if found:
        raise StoreMismatchError(
            "a teacher in the loop is the store's own",
            actual="; ".join(f"{key}: stored {mine!r}, asked {theirs!r}" for key, mine, theirs in found),
            where=store.url,
        )

    def teach(batch: Batch) -> Taught:
        assert batch.teacher_pixels_u8 is not None
        logits, outputs = teacher.answer(batch.teacher_pixels_u8)
        outputs = {name: x.clone() for name, x in outputs.items()}  # autograd keeps no tensors of inference mode
        if method.needs.boundary:
            here = batch.teacher_pixels_u8, logits, batch.image_ids, batch.view_indices
            outputs |= {name: x.clone() for name, x in boundary_outputs(spec, teacher, *here).items()}
        return Taught(spec.labels_of(logits, batch.image_ids, batch.view_indices), outputs)

    return teach
