"""Training: students from stored labels, without Ray. `train(job)` is the whole run; its parts serve other loops."""

from kddata.training.classify import Classified, classify
from kddata.training.job import (
    DataArgs,
    EvaluationArgs,
    FirstStageArgs,
    Member,
    OptimizerArgs,
    StudentArgs,
    TrainingJob,
)
from kddata.training.loop import check, train
from kddata.training.predict import Predictions, normaliser, predict
from kddata.training.results import Progress, TrainingResult, finished
from kddata.training.steps import Step, training_steps

__all__ = [
    "Classified",
    "DataArgs",
    "EvaluationArgs",
    "FirstStageArgs",
    "Member",
    "OptimizerArgs",
    "Predictions",
    "Progress",
    "Step",
    "StudentArgs",
    "TrainingJob",
    "TrainingResult",
    "check",
    "classify",
    "finished",
    "normaliser",
    "predict",
    "train",
    "training_steps",
]
