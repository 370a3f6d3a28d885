"""Training on a part of a store, and with ground truth made wrong or rare on purpose."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from kddata.config import TrainFile, load, train_job
from kddata.corruption import ClassImbalance, LabelNoise, labels_sha256
from kddata.errors import ConfigError
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.testing import make_store
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob, train
from kddata.views import ViewPlan

CLASSES = 4
CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "train.yaml"


@pytest.fixture(scope="module", params=["none", "cutmix"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    root = tmp_path_factory.mktemp("partial")
    return make_store(root, num_images=40, num_classes=CLASSES, plan=ViewPlan(area=(0.3, 1.0), mix=request.param))


def seen(store: LabelStore, **more: object) -> tuple[Counter, dict[str, int]]:
    """(views by image, ground truth by image) of an epoch."""
    views, labels = Counter(), {}
    for batch in loader(store, batch_size=16, size_px=8, **more):
        views.update(batch.image_ids)
        labels |= dict(zip(batch.image_ids, batch.targets_B.tolist(), strict=True))
    return views, labels


def test_a_subset_of_mixed_or_plain_views_comes_whole_with_the_same_pixels(store: LabelStore) -> None:
    whole = {
        (image_id, view): pixels
        for batch in loader(store, batch_size=80, size_px=8)
        for image_id, view, pixels in zip(batch.image_ids, batch.view_indices, batch.pixels_u8_B3SS, strict=True)
    }
    views, _ = seen(store, subset=0.5)
    assert 0 < len(views) < 40
    assert set(views.values()) == {store.views_per_image}
    for batch in loader(store, batch_size=16, size_px=8, subset=0.5):
        for row, key in enumerate(zip(batch.image_ids, batch.view_indices, strict=True)):
            assert bool((batch.pixels_u8_B3SS[row] == whole[key]).all())


def test_noise_changes_the_targets_alone_and_a_partner_like_itself(store: LabelStore) -> None:
    noise = LabelNoise(rate=0.5, seed=2)
    _, true = seen(store)
    _, noisy = seen(store, noise=noise)
    assert noisy == {image_id: noise.label(image_id, label, CLASSES) for image_id, label in true.items()}
    assert 0 < sum(noisy[x] != true[x] for x in true) < len(true)
    if store.spec.plan.mix == "none":
        return
    for clean, wrong in zip(
        loader(store, batch_size=80, size_px=8), loader(store, batch_size=80, size_px=8, noise=noise), strict=True
    ):
        rows = [row for unit in store.units() for row in zip(*_mixes(store, unit.number), strict=True)]
        partners = {(image_id, view): partner for image_id, view, partner in rows}
        for i, key in enumerate(zip(clean.image_ids, clean.view_indices, strict=True)):
            partner = partners[key]
            assert wrong.targets2_B[i] == noise.label(partner, int(clean.targets2_B[i]), CLASSES)


def _mixes(store: LabelStore, unit: int) -> tuple[list[str], list[int], list[str]]:
    rows = store.read(unit)
    partners = [image_id if mix is None else mix.partner for image_id, mix in zip(rows.image_id, rows.mix, strict=True)]
    return rows.image_id, rows.view.tolist(), partners


def test_imbalance_is_of_the_subset(store: LabelStore) -> None:
    _, some = seen(store, subset=0.8)
    imbalance = ClassImbalance(ratio=4, kind="step")
    _, rare = seen(store, subset=0.8, imbalance=imbalance)
    before, after = Counter(some.values()), Counter(rare.values())
    counts = imbalance.counts_C(max(before.values()), CLASSES)
    assert [after[c] for c in range(CLASSES)] == [min(before[c], counts[c]) for c in range(CLASSES)]
    assert set(rare) <= set(some)


def test_a_run_on_a_part_says_so_and_names_the_labels_it_saw(store: LabelStore, tmp_path: Path) -> None:
    noise = LabelNoise(rate=0.4)
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=CLASSES),
        method={"name": "hard"},
        data=DataArgs(batch_size=16, size_px=16, subset=0.7, noise=noise),
        optimizer=OptimizerArgs(lr=0.05, epochs=1),
    )
    result = train(job)
    _, labels = seen(store, subset=0.7, noise=noise)
    assert result.card["labels_sha256"] == labels_sha256(labels.items())
    assert result.card["data"]["noise"]["rate"] == 0.4
    other = dataclasses.replace(job, data=dataclasses.replace(job.data, subset=0.6))
    with pytest.raises(ConfigError, match=r"data.subset: begun with 0.7, now 0.6"):
        train(other)


def test_job_files_say_all_of_it() -> None:
    job = train_job(
        load(TrainFile, CONFIG, ["data.subset=[1, 2]", "data.noise={rate: 0.2}", "data.imbalance={ratio: 50}"])
    )
    assert job.data.subset == (1, 2)
    assert (job.data.noise, job.data.imbalance) == (LabelNoise(rate=0.2), ClassImbalance(ratio=50))
    assert train_job(load(TrainFile, CONFIG, ["data.subset=[a, b/c]"])).data.subset == ("a", "b/c")
    assert train_job(load(TrainFile, CONFIG, ["data.subset=0.1"])).data.subset == 0.1
