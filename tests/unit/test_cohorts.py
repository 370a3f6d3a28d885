"""Cohorts: peers that teach each other as in the paper, branches with their gate; resumed to the same bits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from kddata import losses
from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses import Gate, dml_loss, kd_loss, one_loss
from kddata.nets import small_cnn
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.teacher import build_network
from kddata.testing import fake_teacher_args, make_images, make_store
from kddata.training import DataArgs, EvaluationArgs, OptimizerArgs, Progress, StudentArgs, TrainingJob, train
from kddata.training.branches import Branched, cut
from kddata.training.mutual import mutual_steps


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_mutual_learning_is_the_mean_kl_of_the_others_without_a_gradient_in_them() -> None:
    x, peers = logits(6, 5).requires_grad_(), logits(6, 2, 5, seed=1).requires_grad_()
    wanted = torch.stack(
        [functional.kl_div(x.log_softmax(1), peers[:, i].softmax(1), reduction="none").sum(1) for i in (0, 1)]
    ).mean(0)
    found = dml_loss(x, peers, reduction="none")
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert peers.grad is None


def test_a_cached_teacher_is_one_more_peer() -> None:
    x, peers, labels = logits(6, 5), logits(6, 1, 5, seed=1), SoftLabels.from_logits(logits(6, 5, seed=2), k=3)
    alone = dml_loss(x, peers, reduction="none")
    cached = kd_loss(x, labels, temperature=1, reduction="none")
    torch.testing.assert_close(dml_loss(x, peers, labels, reduction="none"), (alone + cached) / 2)
    torch.testing.assert_close(dml_loss(x, peers[:, :0], labels), cached.mean())
    with pytest.raises(ConfigError, match=r"with a peer or a teacher at least; got \(6, 0, 5\)"):
        dml_loss(x, peers[:, :0])


def test_the_loss_of_branches_is_the_sum_of_the_paper() -> None:
    branches, gate = logits(6, 3, 5).requires_grad_(), logits(6, 3, seed=1).softmax(1)
    targets, t = torch.arange(6) % 5, 3.0
    ensemble = (branches * gate[:, :, None]).sum(1)
    wanted = functional.cross_entropy(ensemble, targets)
    for branch in branches.unbind(1):
        divergence = functional.kl_div(
            (branch / t).log_softmax(1), (ensemble.detach() / t).softmax(1), reduction="batchmean"
        )
        wanted = wanted + functional.cross_entropy(branch, targets) + t**2 * divergence
    found = one_loss(branches, gate, targets)
    torch.testing.assert_close(found, wanted)
    (one,), (other,) = torch.autograd.grad(found, branches), torch.autograd.grad(wanted, branches)
    torch.testing.assert_close(one, other)
    labels = SoftLabels.from_logits(logits(6, 5, seed=2), k=5)
    more = sum(kd_loss(branch, labels, temperature=t) for branch in branches.unbind(1))
    torch.testing.assert_close(one_loss(branches, gate, targets, labels), found + more)


def test_rows_without_ground_truth_learn_from_the_ensemble_alone() -> None:
    branches, gate = logits(4, 3, 5), torch.full((4, 3), 1 / 3, dtype=torch.float64)
    found = one_loss(branches, gate, torch.tensor([1, -1, 2, -1]), reduction="none", ignore_index=-1)
    (ensemble,) = (branches.mean(1),)
    kl = sum(
        9 * functional.kl_div((b / 3).log_softmax(1), (ensemble / 3).softmax(1), reduction="none").sum(1)
        for b in branches.unbind(1)
    )
    torch.testing.assert_close(found[[1, 3]], kl[[1, 3]])


def test_a_gate_shares_out_one() -> None:
    gate = Gate(8, 3).eval()
    maps = torch.randn(5, 8, 2, 2)
    torch.testing.assert_close(gate(maps), gate(maps.mean((2, 3))))
    torch.testing.assert_close(gate(maps).sum(1), torch.ones(5))


# -- branches ---------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Skips half of its rows in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 5)
        self.drop = torchvision.ops.StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "node"),
    [
        (Deep, "first"),
        (lambda: small_cnn(5), "7"),
        (lambda: torchvision.models.resnet18(num_classes=5), "layer3"),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), "features.8"),
    ],
)
def test_a_student_is_cut_into_its_own_modules(build: Callable[[], nn.Module], node: str) -> None:
    network, x = build().eval(), torch.randn(4, 3, 32, 32)
    lower, upper = cut(network, node, x)
    assert not network.training
    for mode in (True, False):
        for part in (network, lower, upper):
            part.train(mode)
        torch.manual_seed(1)
        whole = network(x)
        torch.manual_seed(1)
        assert torch.equal(upper(lower(x)), whole)
    own = {id(p) for p in network.parameters()}
    halves = [{id(p) for p in part.parameters()} for part in (lower, upper)]
    assert halves[0] | halves[1] == own
    assert not halves[0] & halves[1]
    assert lower(x).shape[2] < 32


class Past(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(self.first(x) + x)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.flatten(1)) if x.sum() > 0 else x


class Twice(nn.Sequential):
    def __init__(self) -> None:
        layer = nn.Linear(12, 12)
        super().__init__(nn.Flatten(), layer, nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[1](self[0](x))))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.dropout(self.first(x.flatten(1)), 0.5, self.training))


class Talking(Dropping):
    """Says more in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.last(self.first(x.flatten(1)))
        return logits if self.training else logits + 1


@pytest.mark.parametrize(
    ("network", "node", "message"),
    [
        (
            Dropping(),
            "first",
            r"the same in training and evaluation, .*got otherwise in dropout = .*Next: let a module",
        ),
        (Talking(), "first", r"the same in training and evaluation, .*got otherwise in return last"),
        (Past(), "first", r"goes through the module where branches part; got x reaches the logits by another way"),
        (Untraceable(), "first", r"torch.fx can trace; got TraceError"),
        (Twice(), "1", r"called once; got 2 calls of 1"),
        (Past(), "second", r"behind a module of the student; got 'second'"),
    ],
)
def test_what_cannot_be_cut_is_refused(network: nn.Module, node: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(network, node, torch.ones(2, 3, 2, 2))


def test_branches_are_the_student_and_others_of_other_weights() -> None:
    student, others = small_cnn(5), [small_cnn(5), small_cnn(5)]
    x = torch.randn(4, 3, 16, 16)
    branched = Branched(student, others, "7", x).eval()
    own, all_three, gate = branched(x)
    assert torch.equal(own, student.eval()(x))
    assert torch.equal(all_three[:, 0], own)
    assert not torch.equal(all_three[:, 1], all_three[:, 2])
    assert gate.shape == (4, 3)


class ChannelsLast(nn.Module):
    """As Swin has its features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 4, stride=4), nn.Linear(24, 5)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_channels_last_features_are_refused() -> None:
    network = ChannelsLast()
    with pytest.raises(ConfigError, match=r"channels first; got \(2, 8, 8, 24\)"):
        Branched(network, [network], "norm", torch.randn(2, 3, 32, 32))
    assert Branched(network, [network], "stem", torch.randn(2, 3, 32, 32))
    swin = torchvision.models.swin_t(num_classes=5)
    with pytest.raises(ConfigError, match=r"the same in training and evaluation, .*shifted_window_attention"):
        Branched(swin, [swin], "features.2", torch.randn(2, 3, 32, 32))


# -- training ---------------------------------------------------------------------------------------------------------


def plain(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 6 * 6, num_classes))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("cohorts"), num_images=30, num_classes=5, k=3, temperatures=(1.0, 3.0))


CNN, PLAIN = "python:kddata.nets:small_cnn", f"python:{__name__}:plain"
METHODS: dict[str, dict[str, Any]] = {
    "dml": {"name": "dml"},
    "dml with a teacher": {"name": "dml", "teacher": True},
    "one": {"name": "one", "node": "7", "branches": 3},
    "one with a teacher": {"name": "one", "node": "7", "branches": 2, "teacher": True},
}


@pytest.fixture(params=METHODS)
def job(request: pytest.FixtureRequest, store: LabelStore, tmp_path: Path) -> TrainingJob:
    mutual = METHODS[request.param]["name"] == "dml"
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=CNN, num_classes=5),
        peers=(StudentArgs(arch=PLAIN, num_classes=5), StudentArgs(arch=CNN, num_classes=5)) if mutual else (),
        method=METHODS[request.param],
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=4, ema=0.5),
        evaluate=EvaluationArgs(images=make_images(tmp_path / "test", num_images=10, num_classes=5)),
        checkpoint_steps=1,
    )


def test_a_cohort_learns_and_a_stopped_one_ends_in_the_same_bits(job: TrainingJob) -> None:
    whole = train(job)
    assert whole.loss_S[-1] < whole.loss_S[0]
    again = dataclasses.replace(job, run=job.run + "-again")

    def stop(progress: Progress) -> None:
        if progress.step in (2, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(again, report=stop)
    assert train(again).loss_S == whole.loss_S
    files = [{path.name: path.read_bytes() for path in Path(run).glob("*.safetensors")} for run in (job.run, again.run)]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["model.safetensors", *(f"peer-{i + 1}.safetensors" for i in range(len(job.peers)))]
    network = build_network(CNN, num_classes=5, weights=f"{job.run}/model.safetensors")
    assert set(load_file(f"{job.run}/model.safetensors")) == set(network.state_dict())
    record = whole.epochs[-1]
    assert "top1" in record
    assert [peer.keys() <= record.keys() for peer in record.get("peers", [])] == [True] * len(job.peers)
    card = json.loads(Path(job.run, "card.json").read_text())
    assert [peer["arch"] for peer in card.get("peers", [])] == [peer.arch for peer in job.peers]


def test_peers_take_their_steps_in_turn_against_what_the_others_say_by_then(store: LabelStore) -> None:
    """The same two steps by hand: without BatchNorm and dropout, nothing else is moved."""
    torch.manual_seed(0)
    networks = [plain(5).double(), plain(5).double()]
    copies = [plain(5).double(), plain(5).double()]
    for one, other in zip(networks, copies, strict=True):
        other.load_state_dict(one.state_dict())
    (batch,) = loader(store, batch_size=60, size_px=16)

    def pixels_of(x: Tensor) -> Tensor:
        return x.double() / 255

    method = losses.make("dml")
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in networks]
    steps = mutual_steps(
        networks, [batch], optimizers, method, first_step=0, learning_rate=lambda step: 0.5, pixels_of=pixels_of
    )
    (step,) = steps
    x, y, found = pixels_of(batch.pixels_u8_B3SS), batch.targets_B, []
    for own, other in ((copies[0], copies[1]), (copies[1], copies[0])):
        z = own(x)
        with torch.no_grad():
            p = other(x).softmax(1)
        loss = functional.cross_entropy(z, y) + functional.kl_div(z.log_softmax(1), p, reduction="batchmean")
        own.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in own.parameters():
                weight -= 0.5 * weight.grad
        found.append(loss.item())
    assert float(step.loss) == pytest.approx(sum(found) / 2, rel=1e-9)
    for network, copy in zip(networks, copies, strict=True):
        for a, b in zip(network.parameters(), copy.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def _one_of_two(rank: int, job: TrainingJob, meeting: str, stop: int | None = None) -> None:
    def report(progress: Progress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    with nullcontext() if stop is None else pytest.raises(KeyboardInterrupt):
        train(job, rank=rank, world_size=2, wrap=nn.parallel.DistributedDataParallel, report=report)
    torch.distributed.destroy_process_group()


def both(job: TrainingJob, meeting: Path, stop: int | None = None) -> None:
    """Two processes train, to the end or until they have told of the step `stop`."""
    torch.multiprocessing.start_processes(_one_of_two, args=(job, str(meeting), stop), nprocs=2, start_method="fork")


def test_two_processes_train_peers_as_one_does(store: LabelStore, tmp_path: Path) -> None:
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "alone"),
        student=StudentArgs(arch=PLAIN, num_classes=5),
        peers=(StudentArgs(arch=PLAIN, num_classes=5),),
        method={"name": "dml", "teacher": True},
        data=DataArgs(batch_size=17, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=2),
    )
    shared = dataclasses.replace(job, run=str(tmp_path / "both"))
    one = train(job)
    both(shared, tmp_path / "meeting")
    assert train(shared).loss_S == pytest.approx(one.loss_S, rel=1e-5)
    for name in ("model", "peer-1"):
        a, b = (load_file(f"{run.run}/{name}.safetensors") for run in (job, shared))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


def test_two_processes_train_branches_and_stopped_ones_end_in_the_same_bits(store: LabelStore, tmp_path: Path) -> None:
    """Not as one process does: the BatchNorm of a gate, as any, sees the rows of its own rank."""
    whole = TrainingJob(
        store=store.url,
        run=str(tmp_path / "whole"),
        student=StudentArgs(arch=CNN, num_classes=5),
        method=METHODS["one with a teacher"],
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=2),
        checkpoint_steps=1,
    )
    stopped = dataclasses.replace(whole, run=str(tmp_path / "stopped"))
    both(whole, tmp_path / "0")
    both(stopped, tmp_path / "1", stop=3)
    assert not Path(stopped.run, "card.json").exists()
    both(stopped, tmp_path / "2")
    result = train(whole)
    assert result.loss_S[-1] < result.loss_S[0]
    assert train(stopped).loss_S == result.loss_S
    assert load_file(f"{whole.run}/model.safetensors").keys() == build_network(CNN, num_classes=5).state_dict().keys()
    a, b = (Path(job.run, "model.safetensors").read_bytes() for job in (whole, stopped))
    assert a == b


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ()}, r"got method dml with 0 peers"),
        ({"method": {"name": "hard"}}, r"got method hard with 1 peers"),
        ({"peers": (StudentArgs(arch=PLAIN, num_classes=7),)}, r"students of different numbers of classes"),
        (
            {"peers": (StudentArgs(arch=PLAIN, num_classes=5, precision="bfloat16"),)},
            r"students of different precision",
        ),
        (
            {
                "peers": (),
                "method": {"name": "one", "node": "0"},
                "optimizer": OptimizerArgs(lr=0.05, epochs=1, backbone_lr_scale=0.1),
            },
            r"method one trains a cohort as it is; got with optimizer.backbone_lr_scale",
        ),
        ({"teacher": fake_teacher_args(num_classes=5, size_px=16)}, r"a teacher in the loop"),
        ({"method": {"name": "one", "node": "7"}}, r"got method one with 1 peers"),
    ],
)
def test_what_is_no_cohort_is_refused(store: LabelStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=PLAIN, num_classes=5),
        peers=(StudentArgs(arch=PLAIN, num_classes=5),),
        method={"name": "dml"},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=1),
    )
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(job, **changes))


def test_a_cohort_is_no_term_of_a_sum_and_branches_are_two_at_least() -> None:
    with pytest.raises(ConfigError, match=r"of one student; got method dml"):
        losses.make("sum", terms=[{"name": "dml"}, {"name": "hard"}])
    with pytest.raises(ConfigError, match=r"two branches or more; got 1"):
        losses.make("one", node="7", branches=1)
    assert math.isclose(losses.make("one", node="7").needs.branches, 3)
