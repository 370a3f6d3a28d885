"""kddata: label once, distil many. See README.md.

The public names arrive lazily, with the modules that hold them: `import kddata` alone loads none of them.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "replay",
    "KddataError": "errors",
    "LabelStore": "store",
    "LabellingJob": "labelling",
    "SoftLabels": "labels",
    "StoreSpec": "cards",
    "Teacher": "teacher",
    "TeacherArgs": "teacher",
    "TeacherCard": "cards",
    "TrainingJob": "training",
    "View": "views",
    "ViewPlan": "views",
    "build_network": "teacher",
    "kd_loss": "losses",
    "label_store": "labelling",
    "load_teacher": "teacher",
    "loader": "replay",
    "open_source": "images",
    "render": "views",
    "train": "training",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from kddata.cards import StoreSpec as StoreSpec
    from kddata.cards import TeacherCard as TeacherCard
    from kddata.errors import KddataError as KddataError
    from kddata.images import open_source as open_source
    from kddata.labelling import LabellingJob as LabellingJob
    from kddata.labelling import label_store as label_store
    from kddata.labels import SoftLabels as SoftLabels
    from kddata.losses import kd_loss as kd_loss
    from kddata.replay import Batch as Batch
    from kddata.replay import loader as loader
    from kddata.store import LabelStore as LabelStore
    from kddata.teacher import Teacher as Teacher
    from kddata.teacher import TeacherArgs as TeacherArgs
    from kddata.teacher import build_network as build_network
    from kddata.teacher import load_teacher as load_teacher
    from kddata.training import TrainingJob as TrainingJob
    from kddata.training import train as train
    from kddata.views import View as View
    from kddata.views import ViewPlan as ViewPlan
    from kddata.views import render as render


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kddata.{_HOME[name]}"), name)
    near = difflib.get_close_matches(name, __all__, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise AttributeError(f"module 'kddata' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
