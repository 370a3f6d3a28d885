"""Sampled labels: unbiased, as measured; the same draws whoever asks; kept exactly; refused where they do not serve."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn

from kddata import losses
from kddata.cards import StoreSpec
from kddata.care import audit, convert, export_parquet
from kddata.cli import audit_lines, summary
from kddata.errors import ConfigError, LabelError
from kddata.labels import MAX_DRAWS, SoftLabels
from kddata.losses import kd_loss
from kddata.store import LabelStore, codecs
from kddata.teacher import load_teacher
from kddata.testing import begin_small_store, fake_teacher, fake_teacher_args, made_up_rows, make_store, small_spec
from kddata.training import DataArgs, Member, OptimizerArgs, StudentArgs, TrainingJob, train

CLASSES, VIEWS = 20, 4000
STANDARD_ERRORS = 5.0  # of CLASSES + 1 means at once: a sound estimator is past it once in 80,000 seeds


def logits_of(num_rows: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled_spec(k: int, num_classes: int = CLASSES) -> StoreSpec:
    return dataclasses.replace(small_spec(num_classes=num_classes, k=k), keep="sampled", temperatures=(1.0,))


def plain_net(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 6 * 6, num_classes))


# -- unbiased ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_counts_are_k_p_rounded_up_or_down_and_k_p_in_the_mean_over_all_starts(k: int) -> None:
    """M evenly spaced starts give M k evenly spaced points: in a stretch of length p lie M k p of them, within 1."""
    logits, num_starts = logits_of(1, CLASSES), 257
    start_B = (torch.arange(num_starts, dtype=torch.float64) + 0.5) / num_starts
    labels = SoftLabels.from_draws(logits.expand(num_starts, -1), k=k, start_B=start_B)
    labels.validate()
    shares_BC = labels.dense("renorm")
    p_C = logits.softmax(1)[0]
    count_BC = (shares_BC * k).round()
    torch.testing.assert_close(count_BC / k, shares_BC)
    assert ((count_BC - k * p_C).abs() < 1).all()
    assert ((shares_BC.mean(0) - p_C).abs() <= 1.000001 / (num_starts * k)).all()


def test_a_class_of_probability_0_is_never_drawn_and_every_start_has_a_class() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for start in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        labels = SoftLabels.from_draws(logits, k=4, start_B=torch.tensor([start], dtype=torch.float64))
        labels.validate()
        assert (sorted(labels.ids_BK[0, :2].tolist()), labels.ids_BK[0, 2:].tolist()) == ([1, 3], [0, 2])
        assert labels.log_p_BK[0, 2:].tolist() == [-math.inf] * 2


def losses_and_gradients(student: Tensor, labels: SoftLabels, tail: str) -> tuple[Tensor, Tensor]:
    """(cross-entropy of each view's labels against one student's logits, d loss / d logits of each view)."""
    x = student.expand(len(labels), -1).clone().requires_grad_()
    loss_B = kd_loss(x, labels, temperature=1, tail=tail, reduction="none")  # type: ignore[arg-type]
    (grad_BC,) = torch.autograd.grad(loss_B.sum(), x)
    w = labels.log_p_BK.exp()
    own_entropy_B = -torch.where(w > 0, w * labels.log_p_BK, 0.0).sum(1)  # no student changes it
    return loss_B.detach() + own_entropy_B, grad_BC


def is_unbiased(estimates_VN: Tensor, truth_N: Tensor) -> bool:
    """Whether the mean over views is the truth, within so many standard errors of it (and the rounding of float64)."""
    error_N = (estimates_VN.mean(0) - truth_N).abs()
    standard_error_N = estimates_VN.std(0) / math.sqrt(len(estimates_VN))
    return bool((error_N <= STANDARD_ERRORS * standard_error_N + 1e-9).all())


@pytest.mark.parametrize("k", [3, 8])
def test_loss_and_gradient_are_those_of_all_classes_in_the_mean_over_views(k: int) -> None:
    """And those of top-k labels, whichever their tail, and of the drawn classes with their own probabilities, are not:
    the same measure finds them out.
    """
    teacher, student = logits_of(1, CLASSES, 1), logits_of(1, CLASSES, 2)
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    truth = torch.cat([-(log_p.exp() * log_q).sum(1), (log_q.exp() - log_p.exp())[0]])

    def estimates(labels: SoftLabels, tail: str) -> Tensor:
        cross_entropy_V, grad_VC = losses_and_gradients(student, labels, tail)
        return torch.cat([cross_entropy_V[:, None], grad_VC], 1)

    every = teacher.expand(VIEWS, -1)
    labels = sampled_spec(k).labels_of(every, ["image"] * VIEWS, range(VIEWS))
    drawn = estimates(labels, "sampled")
    assert is_unbiased(drawn, truth)

    kept = torch.where(labels.log_p_BK > -math.inf, every.log_softmax(1).gather(1, labels.ids_BK.long()), -math.inf)
    renormalised = dataclasses.replace(labels, log_p_BK=kept.log_softmax(1))
    assert not is_unbiased(estimates(renormalised, "sampled"), truth)
    top = SoftLabels.from_logits(every, k=k)
    for tail in ("renorm", "bucket", "uniform", "support"):
        biased = estimates(top, tail)
        assert not is_unbiased(biased, truth), tail
    assert is_unbiased(estimates(SoftLabels.from_logits(every, k=CLASSES), "renorm"), truth)


def test_evenly_spaced_draws_are_never_noisier_than_independent_ones() -> None:
    """Each count is k p up or down: its variance is f (1 - f), f the fraction of k p, against k p (1 - p)."""
    k, teacher = 8, logits_of(1, CLASSES, 1)
    labels = sampled_spec(k).labels_of(teacher.expand(VIEWS, -1), ["image"] * VIEWS, range(VIEWS))
    p = teacher.softmax(1)[0]
    fraction = (k * p).frac()
    variance = labels.dense("renorm").var(0)
    wanted = fraction * (1 - fraction) / k**2
    assert (wanted <= p * (1 - p) / k + 1e-12).all()
    fourth = fraction * (1 - fraction) * (1 - 3 * fraction * (1 - fraction)) / k**4  # of a count's distance to its mean
    standard_error = ((fourth - wanted**2).clamp(min=0) / VIEWS).sqrt()
    assert ((variance - wanted).abs() <= STANDARD_ERRORS * standard_error + 2 * wanted / VIEWS + 1e-12).all()


# -- the same draws, whoever asks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("sampled"), num_images=24, num_classes=5, k=3, keep="sampled")


def test_draws_depend_on_seed_image_and_view_alone(store: LabelStore, tmp_path: Path) -> None:
    other = make_store(tmp_path, num_images=24, num_classes=5, k=3, keep="sampled", unit_images=7, views_per_image=3)

    def rows(store: LabelStore) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
        units = [store.read(unit.number) for unit in store.units()]
        return {
            (image_id, int(view)): (rows.labels.ids_BK[i].tolist(), rows.labels.log_p_BK[i].tolist())
            for rows in units
            for i, (image_id, view) in enumerate(zip(rows.image_id, rows.view, strict=True))
        }

    few, many = rows(store), rows(other)
    assert len(few) == 48
    assert {key: many[key] for key in few} == few
    logits, spec = torch.zeros(200, CLASSES), sampled_spec(3)
    one = spec.labels_of(logits, ["a"] * 200, range(200))
    assert len({tuple(ids) for ids in one.ids_BK.tolist()}) > 3, "views draw apart"
    reseeded = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, seed=1))
    assert (one.ids_BK != reseeded.labels_of(logits, ["a"] * 200, range(200)).ids_BK).any()
    assert (one.ids_BK != spec.labels_of(logits, ["b"] * 200, range(200)).ids_BK).any()


def test_a_student_trains_from_the_store_as_with_the_teacher_in_the_loop(store: LabelStore, tmp_path: Path) -> None:
    """Nothing of sampled labels is rounded, so that losses are equal to the last bit."""
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "cached"),
        student=StudentArgs(arch=f"python:{__name__}:plain_net", num_classes=5),
        method={"name": "kd", "temperature": 1, "tail": "sampled", "alpha": 0.7},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=3),
    )
    cached = train(job)
    live = dataclasses.replace(job, run=str(tmp_path / "live"), teacher=fake_teacher_args(num_classes=5, size_px=16))
    in_the_loop = train(live)
    assert in_the_loop.loss_S == in_the_loop.cached_loss_S == cached.loss_S
    assert cached.loss_S[-1] < cached.loss_S[0]


def test_an_audit_draws_again(store: LabelStore) -> None:
    found = audit(store, fake_teacher(num_classes=5, size_px=16), views=48)
    assert (found.views, found.top1_match, found.mean_kl, found.faults) == (48, 1.0, None, ())
    shifted = dataclasses.replace(fake_teacher_args(num_classes=5, size_px=16), mean=(0.4, 0.4, 0.4))
    found = audit(store, load_teacher(shifted), views=48)
    assert any("of the draws of 48 views are as stored, less than 99.00%" in fault for fault in found.faults)


# -- kept exactly -----------------------------------------------------------------------------------------------------


def test_every_count_of_every_k_is_read_from_its_float16() -> None:
    for k in range(1, MAX_DRAWS + 1):
        count = np.arange(k + 1)
        with np.errstate(divide="ignore"):
            assert np.array_equal(codecs.counts(np.log(count / k).astype(np.float16), k), count), k


@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_what_is_read_is_what_was_drawn_to_the_last_bit(codec: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(sampled_spec(50, num_classes=200), codec=codec)  # type: ignore[arg-type]
    store = begin_small_store(str(tmp_path / "store"), spec=spec)
    written = [made_up_rows(store, unit) for unit in store.units()]
    for unit, rows in zip(store.units(), written, strict=True):
        store.write_unit(unit, [rows])
    store.commit()
    for unit, rows in zip(store.units(), written, strict=True):
        drawn, back = rows.labels, store.read(unit.number).labels
        assert back.sampled
        for name in ("ids_BK", "log_p_BK", "log_tail_BT"):
            assert torch.equal(getattr(back, name), getattr(drawn, name)), name


def test_codecs_and_formats_are_converted_without_loss_and_parquet_holds_the_draws(
    store: LabelStore, tmp_path: Path
) -> None:
    compact = convert(store, str(tmp_path / "compact"), codec="compact", format="tar")
    back = convert(compact, str(tmp_path / "back"), codec="exact", format="arrow")
    names = store.storage.sizes()
    assert names == back.storage.sizes()
    assert all(store.storage.read(name) == back.storage.read(name) for name in names)
    export_parquet(store, str(tmp_path / "labels.parquet"))
    table = parquet.read_table(tmp_path / "labels.parquet")
    shares = np.exp(np.array(table["log_p"].to_pylist()))
    assert shares.sum(1) == pytest.approx(np.ones(48))
    assert shares * 3 == pytest.approx(np.rint(shares * 3), abs=1e-6)
    assert b'"keep":"sampled"' in table.schema.metadata[b"kddata"]


def test_counts_that_are_not_of_k_draws_are_damage() -> None:
    spec = sampled_spec(3)
    with pytest.raises(LabelError, match="counts 3 draws, the most drawn class first"):
        codecs.from_counts(np.array([[2, 2, 0]]), spec)
    with pytest.raises(LabelError, match="counts 3 draws"):
        codecs.from_counts(np.array([[1, 2, 0]]), spec)
    top = SoftLabels.from_logits(logits_of(2, CLASSES).float(), k=3)
    with pytest.raises(LabelError, match=r"\(classes, k, temperatures, sampled\) = \(20, 3, \(1.0,\), True\)"):
        codecs.encode(top, spec)
    with pytest.raises(LabelError, match="sampled labels are shares of k draws"):
        dataclasses.replace(top, sampled=True).validate()


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_spec_that_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature 1.*got labels.temperatures \[1.0, 4.0\]"):
        dataclasses.replace(small_spec(), keep="sampled")
    with pytest.raises(ConfigError, match=f"at most {MAX_DRAWS} classes; got labels.k = {MAX_DRAWS + 1}"):
        sampled_spec(MAX_DRAWS + 1, num_classes=5000)
    with pytest.raises(ConfigError, match=r"labels\.keep is top or sampled; got 'some'"):
        dataclasses.replace(small_spec(), keep="some")  # type: ignore[arg-type]
    assert "keep" not in small_spec().to_json()
    assert StoreSpec.from_json(sampled_spec(3).to_json()) == sampled_spec(3)


def test_losses_that_take_them_for_top_classes_refuse_them() -> None:
    logits = logits_of(4, 6).float()
    labels = sampled_spec(6, num_classes=6).labels_of(logits, list("abcd"), range(4))  # k = C: no tail would be missed
    targets = torch.zeros(4, dtype=torch.long)
    for tail in ("bucket", "renorm", "uniform", "support"):
        with pytest.raises(LabelError, match="sampled labels are learned from by method kd with tail sampled"):
            kd_loss(logits, labels, temperature=1, tail=tail)  # type: ignore[arg-type]
    for name in ("dkd", "nkd", "wsld", "dist", "ttm", "lskd", "ofa"):
        with pytest.raises(LabelError, match="method kd with tail sampled"):
            losses.make(name)(logits, labels, targets)
    with pytest.raises(LabelError, match="temperature 1: importance weights cannot be tempered afterwards"):
        labels.at(2.0)
    with pytest.raises(LabelError, match="weigh the losses instead"):
        SoftLabels.mixture([labels, labels], [0.5, 0.5])
    with pytest.raises(LabelError, match="all sampled or none"):
        SoftLabels.cat([labels, SoftLabels.from_logits(logits, k=6)])


def test_ensembles_weigh_losses_and_are_not_mixed(tmp_path: Path) -> None:
    one, two, top = (
        make_store(tmp_path / name, num_images=24, num_classes=5, k=5, keep=keep)  # type: ignore[arg-type]
        for name, keep in (("one", "sampled"), ("two", "sampled"), ("top", "top"))
    )
    job = TrainingJob(
        store=one.url,
        others=(Member(url=two.url, weight=0.5),),
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:plain_net", num_classes=5),
        method={"name": "kd", "temperature": 1, "tail": "sampled"},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=1),
    )
    assert len(train(job).loss_S) == 3
    mixture = dataclasses.replace(job, run=str(tmp_path / "mixture"), combine="mixture")
    with pytest.raises(ConfigError, match=r"stores that keep all classes.*got k = 5 of 5, sampled"):
        train(mixture)
    with pytest.raises(ConfigError, match="method kd needs classes drawn at random; got the top classes"):
        train(dataclasses.replace(job, run=str(tmp_path / "both"), others=(Member(url=top.url, weight=0.5),)))


def test_people_are_told_what_the_numbers_are_of(store: LabelStore) -> None:
    lines = dict(summary(store.info()))
    assert lines["labels"] == "k = 3 draws of 5, temperatures [1.0]"
    assert lines["accuracy"].endswith("by the class most drawn")
    assert lines["entropy"].endswith("of the draws")
    found = audit(store, fake_teacher(num_classes=5))
    lines = dict(audit_lines(found))
    assert "of the draws are drawn again" in lines["asked again"]
    assert lines["accuracy"].endswith(", by the class most drawn")
    assert lines["entropy"].endswith(", estimated from the draws")
    assert lines["tail mass"].endswith(", estimated from the draws")
    assert found.sampled
    whole = dict(audit_lines(dataclasses.replace(found, sampled=False)))
    assert "draw" not in whole["accuracy"] + whole["entropy"] + whole["tail mass"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "kd", "temperature": 1}, "set method.tail to sampled"),
        ({"name": "kd", "temperature": 2, "tail": "sampled"}, "cannot be tempered"),
        ({"name": "dkd"}, "method dkd needs top classes; got classes drawn at random"),
    ],
)
def test_a_run_that_needs_other_labels_does_not_start(
    store: LabelStore, tmp_path: Path, method: dict[str, object], message: str
) -> None:
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:plain_net", num_classes=5),
        method=method,
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=1),
    )
    with pytest.raises(ConfigError, match=message):
        train(job)
    assert not (tmp_path / "run").exists()
