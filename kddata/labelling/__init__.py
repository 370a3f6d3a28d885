"""Labelling: images x views x a teacher become a store of soft labels, in this process, with no Ray.

    label_store(job)                     # equals, and may be taken apart into:
    store = prepare(job)                 # begin the store, index the images
    for unit in missing_units(store):    # in any order, in any process
        label_unit(store, unit, source, teacher)
    finish(store, limit=job.bad_images)

Deliberately not here: who labels which unit, and progress bars.
"""

from kddata.labelling.attacks import boundary_outputs
from kddata.labelling.job import (
    Labelled,
    LabellingJob,
    alone_on,
    check_bad_images,
    each_missing_unit,
    finish,
    is_tidy,
    job_spec,
    label_store,
    load_job_teacher,
    missing_units,
    prepare,
    require_distinct,
)
from kddata.labelling.planning import Estimate, estimate
from kddata.labelling.serving import require_served
from kddata.labelling.unit import hashed_by_draw, label_unit

__all__ = [
    "Estimate",
    "Labelled",
    "LabellingJob",
    "alone_on",
    "boundary_outputs",
    "check_bad_images",
    "each_missing_unit",
    "estimate",
    "finish",
    "hashed_by_draw",
    "is_tidy",
    "job_spec",
    "label_store",
    "label_unit",
    "load_job_teacher",
    "missing_units",
    "prepare",
    "require_distinct",
    "require_served",
]
