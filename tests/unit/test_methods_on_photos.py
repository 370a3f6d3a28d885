"""Methods on real images with a real teacher: the loss falls, and what was rounded for storage changes it by no more
than the rounding can.

Views and soft labels come from a store. The teacher's tensors are captured once and rounded to float16, as a store
keeps them, beside what the teacher says live on the same pixels.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kddata import losses, nets
from kddata.labelling import LabellingJob, label_store
from kddata.labels import SoftLabels
from kddata.losses import dense
from kddata.replay import Batch, loader
from kddata.teacher import TeacherArgs, build_network
from kddata.training import normaliser
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
    stored: dict[str, Tensor]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Batches of a store of CIFAR-10 images, labelled by a teacher that was trained on them for a moment."""
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

    def store_of(name: str) -> Any:
        job = LabellingJob(
            images=str(folder / "images"),
            store=str(folder / name),
            teacher=TeacherArgs(
                arch=f"python:{__name__}:teacher_net",
                weights=str(folder / "teacher.safetensors"),
                num_classes=10,
                size_px=32,
                mean=MEAN,
                std=STD,
            ),
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
    for batch in loader(store_of("labels"), batch_size=ROWS, size_px=32, epochs=2):
        pixels = pixels_of(batch.pixels_u8_B3SS)
        with torch.inference_mode():
            live = look(teacher, TEACHER_NODES, pixels)
        live = {name: x.clone() for name, x in live.items()}
        taken.append(Step(batch, pixels, live, {name: x.half().float() for name, x in live.items()}))
    assert len(taken) == STEPS
    return taken


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
        stored = method(seen["logits"], step.batch.labels, targets, outputs=step.stored, **more)
        yield live, stored, seen, step, parts
        optimizer.zero_grad()
        live.backward()
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_stored_tensors_teach_as_the_live_teacher_does(name: str, steps: list[Step]) -> None:
    torch.manual_seed(0)
    method = losses.make(name, **METHODS[name])
    student, seen_losses = build_network(f"python:{__name__}:student_net", num_classes=10), []
    weight = METHODS[name].get("weight", 1.0)
    for live, stored, seen, step, parts in run(method, student, steps):
        bound = on_logits(name, seen, step) if name in ("kd", "aekt") else swapped(name, seen, step, parts)
        assert abs(stored.item() - live.item()) <= weight * bound
        assert weight * bound < 0.02 * live.item() + 1e-3  # else the line above would say little
        seen_losses.append(live.item())
    assert np.mean(seen_losses[-5:]) < 0.9 * np.mean(seen_losses[:5])


def test_fitnets_in_its_two_stages(steps: list[Step]) -> None:
    """The hint alone moves the layers below it, and its regressor; KD then starts from those."""
    torch.manual_seed(0)
    student = build_network(f"python:{__name__}:student_net", num_classes=10)
    before = {name: x.clone() for name, x in student.named_parameters()}
    hints = [live.item() for live, *_ in run(losses.make("fitnets", **METHODS["fitnets"]), student, steps)]
    assert np.mean(hints[-5:]) < 0.9 * np.mean(hints[:5])
    for name, x in student.named_parameters():
        assert torch.equal(x, before[name]) == (int(name.split(".")[0]) > 4), name
    soft = [live.item() for live, *_ in run(losses.make("kd", temperature=T), student, steps)]
    assert np.mean(soft[-5:]) < 0.9 * np.mean(soft[:5])
