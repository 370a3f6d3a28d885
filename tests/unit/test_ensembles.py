"""Several stores over the same views: joined row by row, weighed in training, refused where they differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kddata
from kddata import losses
from kddata.config import TrainFile, load, train_job
from kddata.errors import ConfigError, LabelError, StoreMismatchError
from kddata.labelling import LabellingJob, label_store, load_job_teacher
from kddata.labels import SoftLabels
from kddata.teacher import TeacherArgs, build_network
from kddata.testing import make_images
from kddata.training import DataArgs, Member, OptimizerArgs, StudentArgs, TrainingJob, normaliser, train
from kddata.views import ViewPlan

CLASSES = 6


def squeezenet(num_classes: int) -> nn.Module:
    return torchvision.models.squeezenet1_1(num_classes=num_classes)


def plain_net(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, num_classes)
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_images(tmp_path_factory.mktemp("images") / "shards", num_images=10, num_classes=CLASSES)


def labelling(images: str, store: Path, **more: object) -> LabellingJob:
    values = {
        "images": images,
        "store": str(store),
        "teacher": TeacherArgs(arch=f"python:{__name__}:squeezenet", num_classes=CLASSES, size_px=224),
        "plan": ViewPlan(seed=5),
        "views_per_image": 2,
        "k": CLASSES,
        "temperatures": (1.0, 2.0),
        "unit_images": 3,
    }
    return LabellingJob(**(values | more))


@pytest.fixture(scope="module")
def jobs(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[LabellingJob, LabellingJob]:
    """A teacher of 224 px, and one of 260 px with other statistics and fewer classes kept, on one plan."""
    root = tmp_path_factory.mktemp("stores")
    larger = TeacherArgs(
        arch=f"python:{__name__}:plain_net", num_classes=CLASSES, size_px=260, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    one, other = (
        labelling(images, root / "one"),
        labelling(images, root / "other", teacher=larger, k=4, codec="compact"),
    )
    for job in (one, other):
        label_store(job)
    return one, other


def training(stores: tuple[LabellingJob, ...], run: Path, **more: object) -> TrainingJob:
    first, *others = stores
    values = {
        "store": first.store,
        "weight": 0.25,
        "others": tuple(Member(url=job.store, weight=0.75) for job in others),
        "run": str(run),
        "student": StudentArgs(arch=f"python:{__name__}:plain_net", num_classes=CLASSES),
        "method": {"name": "kd", "temperature": 2, "alpha": 0.8},
        "data": DataArgs(batch_size=20, size_px=32, seed=1),
        "optimizer": OptimizerArgs(lr=0.05, epochs=2),
    }
    return TrainingJob(**(values | more))


def first_loss(stores: tuple[LabellingJob, ...], combine) -> float:
    """Of the one step of an epoch, by hand: what `combine` makes of what both teachers say of the very views, now."""
    store = kddata.LabelStore.open(stores[0].store)
    student = build_network(f"python:{__name__}:plain_net", num_classes=CLASSES, seed=1).train()
    pixels_of = normaliser(store.spec.teacher.mean, store.spec.teacher.std, "cpu")
    (batch,) = kddata.loader(store, batch_size=20, size_px=32, seed=1)
    with torch.no_grad():
        logits = student(pixels_of(batch.pixels_u8_B3SS))
        return float(combine(logits, batch))


def test_the_loss_is_the_weighted_sum_over_teachers_of_two_input_sizes(jobs, tmp_path: Path) -> None:
    result = train(training(jobs, tmp_path / "run"))

    def combine(logits, batch):
        total = 0.0
        for job, weight in zip(jobs, (0.25, 0.75), strict=True):
            store = kddata.LabelStore.open(job.store)
            (own,) = kddata.loader(store, batch_size=20, size_px=job.teacher.size_px, seed=1)
            assert own.image_ids == batch.image_ids
            labels = SoftLabels.from_logits(
                load_job_teacher(job)(own.pixels_u8_B3SS), k=job.k, temperatures=job.temperatures
            )
            stored = own.labels if job.codec == "compact" else labels  # compact ones are rounded
            method = losses.make(name="kd", temperature=2, alpha=0.8)
            total += weight * method(logits, stored, batch.targets_B, ignore_index=-1)
        return total

    assert result.loss_S[0] == pytest.approx(first_loss(jobs, combine), rel=1e-5)
    stores = result.card["ensemble"]["stores"]
    assert [member["weight"] for member in stores] == [0.25, 0.75]
    assert [member["teacher"]["size_px"] for member in stores] == [224, 260]


def test_weights_make_another_student_and_another_run(jobs, tmp_path: Path) -> None:
    base = training(jobs, tmp_path / "run")
    result = train(base)
    changed = dataclasses.replace(base, weight=0.5)
    with pytest.raises(ConfigError, match="ensemble"):
        train(changed)
    other = train(dataclasses.replace(changed, run=str(tmp_path / "other")))
    assert other.loss_S[0] != result.loss_S[0]


def test_one_teacher_twice_is_one_teacher(jobs, images: str, tmp_path: Path) -> None:
    again = labelling(images, tmp_path / "again")
    label_store(again)
    alone = train(training(jobs[:1], tmp_path / "alone", weight=1.0))
    twice = train(training((jobs[0], again), tmp_path / "twice"))
    torch.testing.assert_close(torch.tensor(twice.loss_S), torch.tensor(alone.loss_S), rtol=1e-5, atol=0)


def test_a_mixture_is_of_probabilities(jobs, images: str, tmp_path: Path) -> None:
    full = dataclasses.replace(jobs[1], store=str(tmp_path / "full"), k=CLASSES, codec="exact")
    label_store(full)
    stores = (jobs[0], full)
    result = train(training(stores, tmp_path / "run", combine="mixture"))

    def combine(logits, batch):
        (other,) = kddata.loader(kddata.LabelStore.open(full.store), batch_size=20, size_px=32, seed=1)
        p = 0.25 * batch.labels.dense("renorm") + 0.75 * other.labels.dense("renorm")
        labels = SoftLabels.from_logits(p.log(), k=CLASSES)
        return losses.make(name="kd", temperature=2, alpha=0.8)(logits, labels, batch.targets_B, ignore_index=-1)

    assert result.loss_S[0] == pytest.approx(first_loss(stores, combine), rel=1e-5)


@given(
    st.integers(2, 6),
    st.lists(st.floats(0, 3), min_size=2, max_size=3).filter(lambda w: sum(w) > 0.1),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_mixtures_are_weighted_means(num_classes: int, weights: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        SoftLabels.from_logits(torch.randn(3, num_classes, generator=generator, dtype=torch.float64), k=num_classes)
        for _ in weights
    ]
    mixed = SoftLabels.mixture(parts, weights)
    mixed.validate()
    wanted = sum(w / sum(weights) * part.dense("renorm") for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(mixed.dense("renorm"), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1e308, 1e308], [0.5, 0.5]),
        ([1.5e308, 0.5e308], [0.75, 0.25]),
        ([2.0, 5e-324], [1.0, 0.0]),
        ([5e-324, 5e-324], [0.5, 0.5]),
        ([1e308, 0.0], [1.0, 0.0]),
    ],
)
def test_weights_at_the_ends_of_floats_are_weights(weights: list[float], shares: list[float]) -> None:
    parts = [SoftLabels.from_logits(torch.tensor([row]), k=3) for row in ([0.0, 1.0, 2.0], [3.0, -1.0, 0.0])]
    mixed = SoftLabels.mixture(parts, weights)
    mixed.validate()
    wanted = torch.stack([share * part.dense("renorm") for share, part in zip(shares, parts, strict=True)]).sum(0)
    torch.testing.assert_close(mixed.dense("renorm"), wanted)


def test_what_cannot_be_an_ensemble_is_refused_before_the_first_step(jobs, images: str, tmp_path: Path) -> None:
    one = jobs[0]
    differing = {
        "plan.seed": labelling(images, tmp_path / "plan", plan=ViewPlan(seed=6)),
        "views_per_image": labelling(images, tmp_path / "views", views_per_image=3),
        "unit_images": labelling(images, tmp_path / "units", unit_images=4),
        "num_classes": labelling(
            images,
            tmp_path / "classes",
            teacher=dataclasses.replace(one.teacher, num_classes=CLASSES + 1),
        ),
    }
    for field, job in differing.items():
        label_store(job)
        with pytest.raises(StoreMismatchError, match=field.replace(".", r"\.")):
            train(training((one, job), tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"k = 4 of {CLASSES}"):
        train(training(jobs, tmp_path / "run", combine="mixture"))
    with pytest.raises(ConfigError, match="teacher in the loop"):
        train(training(jobs, tmp_path / "run", teacher=one.teacher))
    with pytest.raises(ConfigError, match=r"method kd needs .* temperature 3"):
        train(training(jobs, tmp_path / "run", method={"name": "kd", "temperature": 3}))
    assert not (tmp_path / "run").exists()


def test_images_that_changed_between_two_labellings_are_found(jobs, tmp_path: Path) -> None:
    others = make_images(tmp_path / "others", num_images=10, num_classes=CLASSES, seed=1)
    job = labelling(others, tmp_path / "store")
    label_store(job)
    with pytest.raises(StoreMismatchError, match="same views of the same images"):
        train(training((jobs[0], job), tmp_path / "run"))


def test_truncated_labels_are_not_mixed() -> None:
    labels = SoftLabels.from_logits(torch.randn(2, 5), k=3)
    with pytest.raises(LabelError, match="k = 3 of 5"):
        SoftLabels.mixture([labels, labels], [0.5, 0.5])


def test_a_job_file_names_stores_with_weights(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "jobs" / "configs" / "train.yaml"
    job = train_job(load(TrainFile, file, ["store=[{url: a, weight: 0.2}, {url: b, weight: 0.8}]", "combine=mixture"]))
    assert (Path(job.store).name, job.weight, job.combine) == ("a", 0.2, "mixture")
    assert [(Path(member.url).name, member.weight) for member in job.others] == [("b", 0.8)]
    assert train_job(load(TrainFile, file)).others == ()
    with pytest.raises(ConfigError, match="store"):
        load(TrainFile, file, ["store=[]"])
