"""Training: students from stored labels, without Ray. `train(job)` is the whole run; its parts serve other loops."""

from kddata.training.classify import Classified, classify
from kddata.training.driving import driving_run, tidy_up
from kddata.training.job import (
    CacheArgs,
    DataArgs,
    EvaluationArgs,
    FirstStageArgs,
    Member,
    OptimizerArgs,
    StudentArgs,
    TrainingJob,
)
from kddata.training.judge import Fidelity, Judgement, judge
from kddata.training.loop import check, train
from kddata.training.predict import Predictions, normaliser, predict
from kddata.training.results import Progress, TrainingResult, finished
from kddata.training.steps import Step, training_steps
from kddata.training.trained import TrainedStudent, open_student, student_of_weights

__all__ = [
    "CacheArgs",
    "Classified",
    "DataArgs",
    "EvaluationArgs",
    "Fidelity",
    "FirstStageArgs",
    "Judgement",
    "Member",
    "OptimizerArgs",
    "Predictions",
    "Progress",
    "Step",
    "StudentArgs",
    "TrainedStudent",
    "TrainingJob",
    "TrainingResult",
    "check",
    "classify",
    "driving_run",
    "finished",
    "judge",
    "normaliser",
    "open_student",
    "predict",
    "student_of_weights",
    "tidy_up",
    "train",
    "training_steps",
]
