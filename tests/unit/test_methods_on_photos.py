"""Methods on real images with a real teacher: the loss falls, and what was rounded for storage changes it by no more
than the rounding can.

Views, soft labels and the teacher's tensors come from a store; beside them stands what the teacher says live on the
same pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kddata import losses, nets, rng
from kddata.boundary import attack_classes
from kddata.errors import ConfigError
from kddata.labelling import LabellingJob, boundary_outputs, label_store
from kddata.labels import SoftLabels
from kddata.losses import dense
from kddata.replay import Batch, loader
from kddata.store import LabelStore
from kddata.teacher import TeacherArgs, build_network, load_teacher
from kddata.training import (
    DataArgs,
    FirstStageArgs,
    OptimizerArgs,
    Progress,
    StudentArgs,
    TrainingJob,
    normaliser,
    train,
)
from kddata.views import ViewPlan

CIFAR = (
    Path(os.environ.get("KDDATA_DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "cifar10_jpeg_train.npz"
)
pytestmark = pytest.mark.skipif(not CIFAR.is_file(), reason=f"no real images: {CIFAR} is absent")

NUM_IMAGES, STEPS, ROWS = 320, 20, 32
MEAN = STD = (0.5, 0.5, 0.5)
T = 4.0


def teacher_net(num_classes: int) -> nn.Module:
    return nets.small_resnet(num_classes, depth=2, stem_stride=2)


def student_net(num_classes: int) -> nn.Module:
    return nets.small_resnet(num_classes, stem_stride=2)


# The last layers of the three stages; the pooled embedding is what the last linear layer is given.
TEACHER_NODES, STUDENT_NODES = ["4", "6", "8"], ["3", "4", "5"]
MAPS = {"teacher_nodes": TEACHER_NODES, "student_nodes": STUDENT_NODES}
PAIRS = {"teacher_pairs": [["4", "6"], ["6", "8"]], "student_pairs": [["3", "4"], ["4", "5"]]}
OUTPUTS = ("embedding", *(f"{kind}:{node}" for kind in ("features", "attention") for node in TEACHER_NODES))
OUTPUTS += tuple(f"fsp:{a}:{b}" for a, b in itertools.pairwise(TEACHER_NODES))
OUTPUTS += ("boundary", "boundary_logits")


def look(network: nn.Module, nodes: list[str], pixels: Tensor) -> dict[str, Tensor]:
    """Every named tensor of a network, and its logits."""
    assert isinstance(network, nn.Sequential)
    found, x = {}, pixels
    for name, layer in network.named_children():
        if isinstance(layer, nn.Linear):
            found["embedding"] = x
        x = layer(x)
        if name in nodes:
            found[f"features:{name}"] = x
    for name in nodes:
        found[f"attention:{name}"] = losses.attention_map(found[f"features:{name}"])
    for first, second in itertools.pairwise(nodes):
        found[f"fsp:{first}:{second}"] = losses.fsp_matrix(found[f"features:{first}"], found[f"features:{second}"])
    return {**found, "logits": x}


class Step(NamedTuple):
    batch: Batch
    pixels: Tensor
    live: dict[str, Tensor]


class Photos(NamedTuple):
    store: LabelStore
    teacher: TeacherArgs
    steps: list[Step]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """A store of CIFAR-10 images, labelled by a teacher that was trained on them for a moment, and its batches."""
    folder = tmp_path_factory.mktemp("photos")
    with np.load(CIFAR) as data:
        jpeg, offset, label = data["jpeg"], data["offset"], data["label"]
    for i in range(NUM_IMAGES):
        path = folder / "images" / f"{label[i]}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg[offset[i] : offset[i + 1]].tobytes())
    first = build_network(f"python:{__name__}:teacher_net", num_classes=10)
    save_file({name: x.contiguous() for name, x in first.state_dict().items()}, folder / "teacher.safetensors")
    pixels_of = normaliser(MEAN, STD, "cpu")

    args = TeacherArgs(
        arch=f"python:{__name__}:teacher_net",
        weights=str(folder / "teacher.safetensors"),
        num_classes=10,
        size_px=32,
        mean=MEAN,
        std=STD,
    )

    def store_of(name: str, outputs: tuple[str, ...] = ()) -> LabelStore:
        job = LabellingJob(
            images=str(folder / "images"),
            store=str(folder / name),
            teacher=args,
            outputs=outputs,
            plan=ViewPlan(area=(0.5, 1.0)),
            views_per_image=1,
            k=10,
            temperatures=(1.0,),
        )
        return label_store(job).store

    teacher = build_network(f"python:{__name__}:teacher_net", num_classes=10).train()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for batch in loader(store_of("untrained"), batch_size=ROWS, size_px=32, epochs=4):
        loss = F.cross_entropy(teacher(pixels_of(batch.pixels_u8_B3SS)), batch.targets_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({name: x.contiguous() for name, x in teacher.state_dict().items()}, folder / "teacher.safetensors")
    teacher.eval()
    taken: list[Step] = []
    store = store_of("labels", OUTPUTS)
    for batch in loader(store, batch_size=ROWS, size_px=32, epochs=2, outputs=OUTPUTS):
        pixels = pixels_of(batch.pixels_u8_B3SS)
        with torch.inference_mode():
            live = look(teacher, TEACHER_NODES, pixels)
        taken.append(Step(batch, pixels, {name: x.clone() for name, x in live.items()}))
    assert len(taken) == STEPS
    return Photos(store, args, taken)


def rounding(x: Tensor) -> Tensor:
    """The most that float16 moves a value: half a unit in the last place, of subnormal numbers below 2^-14."""
    return 2.0**-11 * x.abs() + 2.0**-25


def to_first_order(loss: Tensor, moved: list[Tensor]) -> float:
    """How far a loss can move with such values: twice the sum of slope times rounding, the second half of it for what
    is of second order, which is 2^-11 times smaller where slopes are not all near 0."""
    slopes = zip(torch.autograd.grad(loss, moved), moved, strict=True)
    return 2 * sum((g.abs() * rounding(x)).sum().item() for g, x in slopes)


def swapped(name: str, seen: dict[str, Tensor], step: Step, parts: nn.Module) -> float:
    """These losses are even: the slope in the teacher's tensors is that of the loss with the sides changed."""
    teacher = {key: x.clone().requires_grad_() for key, x in step.live.items()}
    if name == "at":
        moved = [teacher[f"attention:{node}"] for node in TEACHER_NODES]
        return to_first_order(losses.at_loss(moved, [seen[f"features:{node}"] for node in STUDENT_NODES]), moved)
    if name == "fsp":
        moved = [teacher[f"fsp:{a}:{b}"] for a, b in PAIRS["teacher_pairs"]]
        return to_first_order(losses.fsp_loss(moved, [seen[f"fsp:{a}:{b}"] for a, b in PAIRS["student_pairs"]]), moved)
    if name == "fitnets":
        assert isinstance(parts, nn.ModuleList)
        moved = [teacher["features:6"]]
        return to_first_order(losses.fitnets_loss(moved[0], parts[0](seen["features:4"], moved[0])[0]), moved)
    moved = [teacher["embedding"]]
    if name == "sp":
        return to_first_order(losses.sp_loss(moved, [seen["embedding"]]), moved)
    return to_first_order(losses.rkd_loss(moved[0], seen["embedding"]), moved)


def of_target(log_p: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """(target and rest [B, 2], the other classes among themselves [B, C - 1]), in logarithms."""
    others = log_p[~F.one_hot(targets_B, log_p.shape[1]).bool()].view(len(log_p), -1)
    rest = others.logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, targets_B[:, None]), rest], 1), others - rest


def on_logits(name: str, seen: dict[str, Tensor], step: Step) -> float:
    """KD, or AEKT without its hard term, written out so that it has a slope in the teacher's log-probabilities."""
    log_p_1 = step.live["logits"].log_softmax(1).requires_grad_()
    log_p, log_q = (log_p_1 / T).log_softmax(1), (seen["logits"] / T).log_softmax(1)
    if name == "kd":
        loss = T**2 * dense.kl(log_p, log_q).mean()
    else:
        p, q = (of_target(x, step.batch.targets_B) for x in (log_p, log_q))
        ratio = (p[0] - q[0].detach())[:, 0].exp().clamp(0, 2)
        loss = T**2 * (ratio * dense.kl(p[0], q[0]) + dense.kl(p[1], q[1])).mean()
    return to_first_order(loss, [log_p_1])


METHODS: dict[str, dict[str, Any]] = {
    "kd": {"temperature": T},
    "aekt": {"temperature": T, "hard_weight": 0},
    "at": {**MAPS, "weight": 1000, "hard_weight": 0},
    "sp": {"weight": 3000, "hard_weight": 0},
    "rkd": {"hard_weight": 0},
    "fitnets": {"teacher_nodes": ["6"], "student_nodes": ["4"], "hard_weight": 0},
    "fsp": {**PAIRS, "hard_weight": 0},
}


def run(method: losses.Method, student: nn.Module, steps: list[Step], lr: float = 0.02) -> Iterator[Any]:
    """(live loss, stored loss, what was seen, step, parts) of each step, which is taken on the live loss."""
    shapes = [
        {name: x.shape[1:] for name, x in seen.items()}
        for seen in (look(student.eval(), STUDENT_NODES, steps[0].pixels), steps[0].live)
    ]
    parts = method.parts(*shapes)
    student.train()
    optimizer = torch.optim.SGD([*student.parameters(), *parts.parameters()], lr=lr, momentum=0.9)
    for step in steps:
        seen = look(student, STUDENT_NODES, step.pixels)
        more = {"parts": parts, "student": seen, "image_ids": step.batch.image_ids}
        live_labels = SoftLabels.from_logits(step.live["logits"], k=10)
        targets = step.batch.targets_B
        live = method(seen["logits"], live_labels, targets, outputs=step.live, **more)
        outputs = {key: x.float() for key, x in step.batch.outputs.items()}
        stored = method(seen["logits"], step.batch.labels, targets, outputs=outputs, **more)
        yield live, stored, seen, step, parts
        optimizer.zero_grad()
        live.backward()
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_stored_tensors_teach_as_the_live_teacher_does(name: str, photos: Photos) -> None:
    torch.manual_seed(0)
    method = losses.make(name, **METHODS[name])
    student, seen_losses = build_network(f"python:{__name__}:student_net", num_classes=10), []
    weight = METHODS[name].get("weight", 1.0)
    for live, stored, seen, step, parts in run(method, student, photos.steps):
        bound = on_logits(name, seen, step) if name in ("kd", "aekt") else swapped(name, seen, step, parts)
        assert abs(stored.item() - live.item()) <= weight * bound
        assert weight * bound < 0.02 * live.item() + 1e-3  # else the line above would say little
        seen_losses.append(live.item())
    assert np.mean(seen_losses[-5:]) < 0.9 * np.mean(seen_losses[:5])


# Every method on features and relations, and two on logits, as a job names them.
JOBS: dict[str, dict[str, Any]] = {
    **{name: METHODS[name] for name in ("at", "sp", "rkd", "fitnets", "fsp")},
    "aekt": {"temperature": T},
    **{name: {} for name in ("pkt", "cc")},
    **dict.fromkeys(("nst", "vid", "reviewkd", "ft", "ab"), MAPS),
    "ofd": {**MAPS, "weight": 1e-3},
    "crd": {"num_images": NUM_IMAGES, "negatives": 64, "weight": 0.8},
    "srrl": {"student_nodes": ["5"], "classifier_layer": "11"},
    "sum": {"terms": [{"name": "kd", "temperature": T, "alpha": 0.9}, {"name": "at", **MAPS, "weight": 1000}]},
    "bss": {"weight": 2.0, "hard_weight": 0},
}


def job_of(photos: Photos, run: Path, method: dict[str, Any], **changes: Any) -> TrainingJob:
    student = {"arch": f"python:{__name__}:student_net", "num_classes": 10, "weights": changes.pop("weights", None)}
    return TrainingJob(
        store=photos.store.url,
        run=str(run),
        student=StudentArgs(**student),
        method=method,
        data=DataArgs(batch_size=ROWS, size_px=32),
        optimizer=OptimizerArgs(lr=0.02, epochs=2),
        **changes,
    )


def falls(loss_S: list[float]) -> bool:
    return bool(np.mean(loss_S[-5:]) < np.mean(loss_S[:5]))


@pytest.mark.parametrize("name", JOBS)
def test_a_job_trains_from_the_cache(name: str, photos: Photos, tmp_path: Path) -> None:
    """The loss falls. With the teacher in the loop, the cache's loss of the first step is the same in every bit."""
    method = {"name": name, **JOBS[name]} | ({"classifier": photos.teacher.weights} if name == "srrl" else {})
    cached = train(job_of(photos, tmp_path / "cached", method))
    assert falls(cached.loss_S)
    if name == "bss":
        first = photos.steps[0].batch
        student = build_network(f"python:{__name__}:student_net", num_classes=10).to(memory_format=torch.channels_last)
        with torch.no_grad():
            answer = student.train()(normaliser(MEAN, STD, "cpu")(first.outputs["boundary"]))
        labels = SoftLabels.from_logits(first.outputs["boundary_logits"].float(), k=10)
        assert cached.loss_S[0] == pytest.approx(2 * losses.bss_loss(answer, labels).item(), rel=1e-5)
    if name in METHODS or name in ("sum", "bss"):
        job = job_of(photos, tmp_path / "live", method, teacher=photos.teacher)
        if name == "bss":  # thirty passes of the teacher a view
            job = dataclasses.replace(job, optimizer=OptimizerArgs(lr=0.02, epochs=1))
        live = train(job)
        assert live.cached_loss_S[0] == cached.loss_S[0]
        assert live.loss_S != live.cached_loss_S
        assert falls(live.loss_S)


@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "with the cached teacher"])
@pytest.mark.parametrize("name", ["dml", "one"])
def test_a_cohort_trains_on_the_views_of_a_store(name: str, teacher: bool, photos: Photos, tmp_path: Path) -> None:
    """The loss falls, and the student is right about its training images twice as often as by chance."""
    method: dict[str, Any] = {"name": name, "teacher": teacher, **({"node": "4"} if name == "one" else {})}
    peer = StudentArgs(arch=f"python:{__name__}:teacher_net", num_classes=10)
    job = job_of(photos, tmp_path / "run", method, peers=(peer,) if name == "dml" else ())
    job = dataclasses.replace(job, optimizer=OptimizerArgs(lr=0.05, epochs=4))
    assert falls(train(job).loss_S)
    student = build_network(job.student.arch, num_classes=10, weights=f"{job.run}/model.safetensors").eval()
    with torch.inference_mode():
        right = [student(step.pixels).argmax(1) == step.batch.targets_B for step in photos.steps[: NUM_IMAGES // ROWS]]
    assert torch.cat(right).float().mean() > 0.2


def test_mlkd_trains_on_pairs_of_views(photos: Photos, tmp_path: Path) -> None:
    job = LabellingJob(
        images=photos.store.location,
        store=str(tmp_path / "pairs"),
        teacher=photos.teacher,
        plan=ViewPlan(area=(0.5, 1.0)),
        views_per_image=2,
        k=10,
    )
    store = label_store(job).store
    training = dataclasses.replace(job_of(photos, tmp_path / "run", {"name": "mlkd"}), store=store.url)
    with pytest.raises(ConfigError, match=r"mlkd compares 2 views of each image of a step.*data.views_together=2"):
        train(training)
    data = DataArgs(batch_size=ROWS, size_px=32, views_together=2)
    training = dataclasses.replace(training, data=data, optimizer=OptimizerArgs(lr=0.02, epochs=1))
    assert falls(train(training).loss_S)
    with pytest.raises(ConfigError, match=r"method mlkd needs 2 views of each image; got 1 .*views.per_image=2"):
        train(dataclasses.replace(training, store=photos.store.url))


def test_boundary_samples_lie_nearer_to_where_the_teacher_changes_its_mind(photos: Photos) -> None:
    teacher, pixels_of = load_teacher(photos.teacher), normaliser(MEAN, STD, "cpu")
    network = build_network(photos.teacher.arch, num_classes=10, weights=photos.teacher.weights)
    spec, gaps, moved = photos.store.spec, [], []
    for step in photos.steps[:4]:
        batch, kept = step.batch, step.batch.outputs
        assert batch.teacher_pixels_u8 is None
        views = batch.pixels_u8_B3SS  # the student's size is the teacher's
        logits_BC = teacher(views)
        again = boundary_outputs(spec, teacher, views, logits_BC, batch.image_ids, batch.view_indices)
        assert torch.equal(again["boundary"], kept["boundary"])  # of these rows in another batch, in another order
        assert torch.equal(again["boundary_logits"].half(), kept["boundary_logits"])
        with torch.no_grad():
            of_sample = network(pixels_of(kept["boundary"]))
        torch.testing.assert_close(
            of_sample.half(), kept["boundary_logits"], rtol=2e-3, atol=1e-4
        )  # of the stored image
        assert 0 <= kept["boundary"].min() <= kept["boundary"].max() <= 255
        draws = [rng.unit_interval(spec.plan.seed, "boundary", image_id, 0) for image_id in batch.image_ids]
        towards_B1 = attack_classes(logits_BC, torch.tensor(draws, dtype=torch.float64))[:, None]
        base_B1 = logits_BC.argmax(1, keepdim=True)
        answers = logits_BC, kept["boundary_logits"].float()
        gaps.append([z.gather(1, base_B1) - z.gather(1, towards_B1) for z in answers])
        moved.append((kept["boundary"].float() - views).flatten(1).square().mean(1).sqrt())
    before, after = (torch.cat(gap) for gap in zip(*gaps, strict=True))
    assert (after < before).float().mean() > 0.95
    assert after.mean() < 0.5 * before.mean()
    assert 0 < torch.cat(moved).mean() < 16  # of 255: they still look like their view


def test_stored_boundary_samples_teach_as_live_ones_do(photos: Photos) -> None:
    """The image is the same in every bit; the logits are rounded, and the loss moves by no more than that makes it."""
    student, teacher = build_network(f"python:{__name__}:student_net", num_classes=10), load_teacher(photos.teacher)
    method, pixels_of = losses.make("bss", hard_weight=0), normaliser(MEAN, STD, "cpu")
    for step in photos.steps[:4]:
        batch = step.batch
        logits = teacher(batch.pixels_u8_B3SS)
        live = boundary_outputs(photos.store.spec, teacher, batch.pixels_u8_B3SS, logits, batch.image_ids, [0] * ROWS)
        with torch.no_grad():
            seen = {"boundary_logits": student(pixels_of(batch.outputs["boundary"].float()))}
        found = [
            method(step.live["logits"], None, outputs={key: x.float() for key, x in outputs.items()}, student=seen)
            for outputs in (live, batch.outputs)
        ]
        z = live["boundary_logits"].clone().requires_grad_()
        written_out = dense.kl((z / 3).log_softmax(1), (seen["boundary_logits"] / 3).log_softmax(1)).mean()
        torch.testing.assert_close(found[0], written_out)
        bound = to_first_order(written_out, [z])
        assert abs(found[0].item() - found[1].item()) <= bound < 0.02 * found[0].item()


def test_a_sum_with_boundary_samples_sees_the_features_of_its_views(photos: Photos, tmp_path: Path) -> None:
    """Its first loss is the sum of what each term has alone."""
    terms = [{"name": "kd", "temperature": T}, {"name": "bss", "weight": 2.0}, {"name": "at", **MAPS, "weight": 1000}]
    begun = [
        train(
            dataclasses.replace(
                job_of(photos, tmp_path / f"run{i}", method), optimizer=OptimizerArgs(lr=0.02, epochs=1)
            )
        ).loss_S[0]
        for i, method in enumerate(
            [{"name": "sum", "terms": terms}, terms[0], *({**term, "hard_weight": 0} for term in terms[1:])]
        )
    ]
    assert begun[0] == pytest.approx(sum(begun[1:]), rel=1e-5)


def test_a_student_of_another_size_cannot_take_boundary_samples(photos: Photos, tmp_path: Path) -> None:
    job = job_of(photos, tmp_path / "run", {"name": "bss"})
    with pytest.raises(ConfigError, match=r"the teacher's 32 px; got data.size_px 24 .*data.size_px=32"):
        train(dataclasses.replace(job, data=DataArgs(batch_size=ROWS, size_px=24)))


class Stop(Exception):
    pass


def stopping_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return report


@pytest.mark.parametrize("name", ["fitnets", "fsp"])
def test_two_stages_in_one_run(name: str, photos: Photos, tmp_path: Path) -> None:
    """Hints alone move the layers below them; then KD starts from those. A stop in either changes nothing."""
    hints = FirstStageArgs(
        method={key: x for key, x in {"name": name, **METHODS[name]}.items() if key != "hard_weight"}, epochs=2
    )
    kd = {"name": "kd", "temperature": T}
    job = dataclasses.replace(
        job_of(photos, tmp_path / "run", kd, checkpoint_steps=5),
        first_stage=hints,
        optimizer=OptimizerArgs(lr=0.02, epochs=1, weight_decay=1e-3),
    )
    seen: list[Progress] = []
    whole = train(job, report=seen.append)
    assert [x.step for x in seen] == [5, 10, 15, 20, 25, 30]
    assert {x.num_steps for x in seen} == {30}
    assert [x.epoch for x in seen] == [0, 0, 1, 1, 2, 2]
    assert falls(json.loads((tmp_path / "run/first/metrics.json").read_text())["loss_S"])
    assert (whole.card["method"], whole.card["first_stage"]["epochs"]) == (kd, 2)
    weights, highest = load_file(tmp_path / "run/first/model.safetensors"), 4 if name == "fitnets" else 5
    for key, x in build_network(f"python:{__name__}:student_net", num_classes=10).named_parameters():
        assert torch.equal(x, weights[key]) == (int(key.split(".")[0]) > highest), key

    by_hand = job_of(photos, tmp_path / "second", kd, weights=str(tmp_path / "run/first/model.safetensors"))
    assert train(dataclasses.replace(by_hand, optimizer=job.optimizer)).loss_S == whole.loss_S
    stopped = dataclasses.replace(job, run=str(tmp_path / "stopped"))
    for step in (15, 25):
        with pytest.raises(Stop):
            train(stopped, report=stopping_at(step))
    seen.clear()
    assert train(stopped, report=seen.append).loss_S == whole.loss_S
    assert seen[0].step == 30  # what was saved is not done again
    left = [load_file(tmp_path / run / "model.safetensors") for run in ("run", "stopped")]
    assert all(torch.equal(left[0][key], left[1][key]) for key in left[0])
    with pytest.raises(ConfigError, match=r"first_stage.epochs: begun with 2, now 1"):
        train(dataclasses.replace(stopped, first_stage=dataclasses.replace(hints, epochs=1)))


def test_what_a_store_does_not_hold_is_named_before_the_first_step(photos: Photos, tmp_path: Path) -> None:
    nodes = {"teacher_nodes": ["5"], "student_nodes": ["4"]}
    with pytest.raises(ConfigError, match=r"(?s)stored output attention:5.*labels.outputs=.*attention:5"):
        train(job_of(photos, tmp_path / "run", {"name": "at", **nodes}))
    with pytest.raises(ConfigError, match="no module '44'"):
        train(
            job_of(photos, tmp_path / "run", {"name": "at", **nodes, "teacher_nodes": ["6"], "student_nodes": ["44"]})
        )
    pairs = {"teacher_pairs": [["4", "6"]], "student_pairs": [["4", "5"]]}
    with pytest.raises(ConfigError, match=r"fsp:4:5 \[32, 64\] and fsp:4:6 \[16, 32\]"):
        train(job_of(photos, tmp_path / "run", {"name": "fsp", **pairs}))
    assert not (tmp_path / "run" / "job.json").exists()
