"""The train job file, and the plain job that it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from kddata.config.reading import (
    Count,
    Location,
    NotNegative,
    Positive,
    Section,
    Share,
    absolute,
    absolute_arch,
    absolute_weights,
    all_absolute,
    with_places,
)
from kddata.errors import ConfigError

if TYPE_CHECKING:
    from kddata.training import StudentArgs, TrainingJob


class Cache(Section):
    """`cache:` a folder of the local disk for copies of images that are read from far away, and most bytes of them."""

    folder: str
    max_bytes: Count


class Student(Section):
    """`student:` who learns.

    new_head: the weights are of another number of classes. freeze_batchnorm: its statistics and weights stay.
    precision: bfloat16 autocasts the forward pass in training. compile: by torch.compile.
    """

    arch: str
    num_classes: Count
    weights: str | None = None
    new_head: bool = False
    freeze_batchnorm: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False


class Noise(Section):
    """`data.noise:` flip: wrong with probability rate; uniform: drawn anew from all classes with probability rate."""

    rate: Share
    convention: Literal["flip", "uniform"] = "flip"
    seed: int = 0


class Imbalance(Section):
    """`data.imbalance:` ratio of the largest class to the smallest, falling exponentially or in one step."""

    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    kind: Literal["exponential", "step"] = "exponential"
    seed: int = 0


class Data(Section):
    """`data:` rows of a step over all workers, side of the student's input, seed of order and weights.

    subset: a share of the images, or a list of classes or of image ids. noise, imbalance: of the ground truth.
    views_per_visit: of an image, from one decode. views_together: of an image, in one step, for methods such as mlkd.
    """

    batch_size: Count
    size_px: Count
    seed: int = 0
    subset: Annotated[float, Field(gt=0, le=1)] | tuple[int, ...] | tuple[str, ...] | None = None
    noise: Noise | None = None
    imbalance: Imbalance | None = None
    views_per_visit: Count = 1
    views_together: Count = 1


class Optimizer(Section):
    """`optimizer:` how the student learns."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive
    momentum: Share = 0.9
    weight_decay: NotNegative = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NotNegative = 0.0
    epochs: Count
    accumulate: Count = 1
    clip_norm: Positive | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    backbone_lr_scale: NotNegative = 1.0
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0


class FirstStage(Section):
    """`first_stage:` of a run in two stages, before `method` and the epochs of the optimizer.

    method: as below; hard_weight is 0 where it is not named: hints alone. lr: null for that of the optimizer.
    """

    method: dict[str, Any]
    epochs: Count
    lr: Positive | None = None
    weight_decay: NotNegative = 0.0


class Evaluate(Section):
    """`evaluate:` images with ground truth, looked at every so many epochs and after the last.

    patience: training ends after so many evaluations in a row without a better metric; the best student is kept.
    """

    images: Location
    every_epochs: Count = 1
    metric: Literal["top1", "top5", "nll", "brier", "ece"] = "top1"
    patience: Count | None = None


class RunPlace(Section):
    """`run:` the folder storage/name holds checkpoints and the result; the same name goes on where it stopped.

    export: the result holds the student as a torch.export program, too.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    storage: str = "runs"
    checkpoint_steps: Count | None = None
    export: bool = True


class TrainCluster(Section):
    """`cluster:` of a train job: workers (ranks), what each of them gets, and how often dead ones are replaced.

    rank_timeout_s: a worker that does not answer for so long counts as dead.
    """

    workers: Count = 1
    gpus_per_worker: NotNegative = 0
    threads_per_worker: Count = 1
    loader_processes: Annotated[int, Field(ge=0)] = 0
    rank_timeout_s: Positive = 600.0
    max_failures: Annotated[int, Field(ge=0)] = 3


class Member(Section):
    """A store of an ensemble, and the weight of what its teacher said."""

    url: str
    weight: NotNegative = 1.0


class TrainFile(Section):
    """A train job: a store, or several over the same views -> a student.

    `method` is {name, and the arguments of that loss}. peers: the other students of a cohort, for method dml. combine,
    of several stores: losses adds up the loss against each with its weight; mixture takes the loss against the weighted
    mixture of the teachers' probabilities.
    """

    store: str | Annotated[tuple[Member, ...], Field(min_length=1)]
    combine: Literal["losses", "mixture"] = "losses"
    images: Location | None = None
    cache: Cache | None = None
    student: Student
    first_stage: FirstStage | None = None
    peers: tuple[Student, ...] = ()
    method: dict[str, Any]
    data: Data
    optimizer: Optimizer
    evaluate: Evaluate | None = None
    run: RunPlace
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    cluster: TrainCluster = TrainCluster()


def train_job(file: TrainFile) -> TrainingJob:
    """The plain job of a train file. Paths become absolute, since workers run elsewhere.

    Raises ConfigError for a method or an argument of it that does not exist.
    """
    from kddata import training
    from kddata.corruption import ClassImbalance, LabelNoise

    method, stage = _method(file.method, "method"), file.first_stage
    evaluate = file.evaluate
    first, *others = (Member(url=file.store),) if isinstance(file.store, str) else file.store
    return training.TrainingJob(
        store=absolute(first.url),
        weight=first.weight,
        others=tuple(training.Member(url=absolute(member.url), weight=member.weight) for member in others),
        combine=file.combine,
        run=absolute(file.run.storage).rstrip("/") + "/" + file.run.name,
        student=_student(file.student),
        peers=tuple(map(_student, file.peers)),
        first_stage=None
        if stage is None
        else training.FirstStageArgs(
            method=_method(stage.method, "first_stage.method"),
            epochs=stage.epochs,
            lr=stage.lr,
            weight_decay=stage.weight_decay,
        ),
        method=method,
        data=training.DataArgs(
            batch_size=file.data.batch_size,
            size_px=file.data.size_px,
            seed=file.data.seed,
            subset=file.data.subset,
            noise=None if file.data.noise is None else LabelNoise(**file.data.noise.model_dump()),
            imbalance=None if file.data.imbalance is None else ClassImbalance(**file.data.imbalance.model_dump()),
            views_per_visit=file.data.views_per_visit,
            views_together=file.data.views_together,
        ),
        optimizer=training.OptimizerArgs(**file.optimizer.model_dump()),
        images=None if file.images is None else all_absolute(file.images),
        cache=None if file.cache is None else training.CacheArgs(**file.cache.model_dump()),
        evaluate=None
        if evaluate is None
        else training.EvaluationArgs(
            images=all_absolute(evaluate.images),
            every_epochs=evaluate.every_epochs,
            metric=evaluate.metric,
            patience=evaluate.patience,
        ),
        checkpoint_steps=file.run.checkpoint_steps,
        export=file.run.export,
    )


def _student(student: Student) -> StudentArgs:
    from kddata import training

    fields = student.model_dump()
    places = {"arch": absolute_arch(student.arch), "weights": absolute_weights(student.weights)}
    return training.StudentArgs(**{**fields, **places})


def _method(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A method that exists, with absolute places. Raises ConfigError for one that does not."""
    from kddata import losses

    if not isinstance(values.get("name"), str):
        raise ConfigError("a method has a name", actual=values, where=where, fix="such as {name: kd}")
    method = with_places(values)
    losses.make(**method)
    return method
