"""The label job file, and the plain job that it stands for."""

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
    from kddata.labelling import LabellingJob

Rgb = tuple[float, float, float]
Range = tuple[float, float]

IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)


class Teacher(Section):
    """`teacher:` who is asked. class_names: a text file, one name a line, by which the class list is known later.

    dtype: in which it runs; bfloat16 for speed on GPUs.
    compile: by torch.compile, for speed on GPUs; each process compiles anew, for a minute or so.
    labels_sha256: of the labels that it was trained on, where known: as card.json of a training run says.
    """

    arch: str
    weights: str | None = None
    num_classes: Count
    size_px: Count
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD
    class_names: str | None = None
    labels_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: Count = 16
    memory_format: Literal["contiguous", "channels_last"] = "channels_last"
    compile: bool = False


class Views(Section):
    """`views:` what is cut from each image. policy center: the evaluation view at the teacher's input size.

    policy color and randaugment: crops as of none, with colours jittered, or two ops of RandAugment.
    erase_p: probability that a rectangle of a view is erased.
    mix: mixup or cutmix every view with one of another image of its unit; the teacher sees the mixed image.
    first: index of the first view, for stores that are labelled apart and merged.
    """

    per_image: Count = 1
    first: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    policy: Literal["none", "center", "color", "randaugment"] = "none"
    area: Range = (0.08, 1.0)
    aspect: Range = (3 / 4, 4 / 3)
    flip_p: Share = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    erase_p: Share = 0.0
    mix: Literal["none", "mixup", "cutmix"] = "none"


class Labels(Section):
    """`labels:` what is kept of each answer, and how.

    keep: top, the k most probable classes; or sampled, k draws from the teacher's probabilities, which are unbiased and
    serve method kd with tail sampled at temperature 1.
    format: arrow; tar, for the webdataset library; or tar+images, with the images' bytes beside their labels.
    outputs: tensors inside the teacher to keep as float16: embedding, features:NODE, attention:NODE, fsp:NODE:NODE,
    where NODE is the dotted name of a module, such as layer2; boundary and boundary_logits: samples at the edge between
    two classes, for method bss.
    """

    k: Count
    keep: Literal["top", "sampled"] = "top"
    temperatures: tuple[Positive, ...] = (1.0,)
    codec: Literal["exact", "compact"] = "exact"
    format: Literal["arrow", "tar", "tar+images"] = "arrow"
    outputs: tuple[str, ...] = ()


class Units(Section):
    """`units:` how work and label files are cut: at most so many images of one image shard, and views (null: all)."""

    images: Count = 1024
    views: Count | None = None


class Limits(Section):
    """`limits:` bad_images is the share of images that may be unreadable; pixels the most that one image may have."""

    bad_images: Share = 0.001
    pixels: Count = 100_000_000


class LabelCluster(Section):
    """`cluster:` of a label job: processes that hold a teacher, and what each of them gets.

    unit_timeout_s: a process whose unit takes longer is replaced, and the unit done again; null for never.
    """

    teachers: Count = 1
    gpus_per_teacher: NotNegative = 0
    threads_per_teacher: Count = 1
    unit_timeout_s: Positive | None = None


class LabelFile(Section):
    """A label job: images x views x teacher -> a store.

    for_methods: methods that are to train from the store, each a name or {name, and its arguments} as in a train job:
    what one needs and the store would not hold is named before the teacher is loaded. The store does not depend on it.
    """

    images: Location
    store: str
    teacher: Teacher
    views: Views = Views()
    labels: Labels
    units: Units = Units()
    limits: Limits = Limits()
    for_methods: tuple[str | dict[str, Any], ...] = ()
    cluster: LabelCluster = LabelCluster()


def label_job(file: LabelFile) -> LabellingJob:
    """The plain job of a label file. Paths become absolute.

    Raises ConfigError for values that no plan of views can have, a class list that cannot be read, or a method of
    `for_methods` that could not train from the store.
    """
    from kddata.labelling import LabellingJob, require_served
    from kddata.teacher import TeacherArgs
    from kddata.views import ViewPlan

    teacher, views = file.teacher, file.views
    job = LabellingJob(
        images=all_absolute(file.images),
        store=absolute(file.store),
        teacher=TeacherArgs(
            arch=absolute_arch(teacher.arch),
            weights=absolute_weights(teacher.weights),
            num_classes=teacher.num_classes,
            size_px=teacher.size_px,
            mean=teacher.mean,
            std=teacher.std,
            class_names=None if teacher.class_names is None else read_class_names(teacher.class_names),
            dtype=teacher.dtype,
            labels_sha256=teacher.labels_sha256,
        ),
        plan=ViewPlan(
            seed=views.seed,
            policy=views.policy,
            area=views.area,
            aspect=views.aspect,
            flip_p=views.flip_p,
            interpolation=views.interpolation,
            center_px=teacher.size_px if views.policy == "center" else None,
            erase_p=views.erase_p,
            mix=views.mix,
        ),
        views_per_image=views.per_image,
        first_view=views.first,
        k=file.labels.k,
        keep=file.labels.keep,
        temperatures=file.labels.temperatures,
        codec=file.labels.codec,
        format=file.labels.format,
        outputs=file.labels.outputs,
        unit_images=file.units.images,
        unit_views=file.units.views,
        bad_images=file.limits.bad_images,
        max_pixels=file.limits.pixels,
        batch_size=teacher.batch_size,
        threads=file.cluster.threads_per_teacher,
        memory_format=teacher.memory_format,
        compile=teacher.compile,
    )
    require_served(job, [method if isinstance(method, str) else with_places(method) for method in file.for_methods])
    return job


def read_class_names(url: str) -> tuple[str, ...]:
    """The names in a text file, one a line. Raises ConfigError where it cannot be read."""
    import fsspec

    try:
        with fsspec.open(absolute(url), "rt", encoding="utf-8") as file:
            return tuple(file.read().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("a class list is a text file, one name a line", actual=error, where=url) from error
