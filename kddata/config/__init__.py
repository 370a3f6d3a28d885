"""Job files: what a person writes, checked, and turned into the plain jobs that the rest of kddata takes.

Every key does something; an unknown one is an error that names the nearest. Nothing below this package knows pydantic
or YAML.
"""

from kddata.config.evaluate import EvaluateFile, judged_student
from kddata.config.label import LabelFile, label_job
from kddata.config.reading import load
from kddata.config.sweep import SweepFile, SweepTrial, sweep_trials
from kddata.config.teach import TeachFile, teaching_job
from kddata.config.train import TrainFile, train_job

__all__ = [
    "EvaluateFile",
    "LabelFile",
    "SweepFile",
    "SweepTrial",
    "TeachFile",
    "TrainFile",
    "judged_student",
    "label_job",
    "load",
    "sweep_trials",
    "teaching_job",
    "train_job",
]
