"""What holds for every loss over all classes: identities, rows without a target, reductions, what it asks for."""

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kddata.errors import ConfigError, LabelError
from kddata.labels import SoftLabels
from kddata.losses import (
    batch_correlation_loss,
    class_correlation_loss,
    dist_loss,
    dkd_loss,
    kd_loss,
    lskd_loss,
    make,
    nkd_loss,
    ofa_loss,
    ttm_loss,
    wsld_loss,
)
from kddata.losses.lskd import standardize

WITH_TARGETS: list[Callable[..., Tensor]] = [dkd_loss, nkd_loss, wsld_loss, ofa_loss]
WITHOUT: list[Callable[..., Tensor]] = [lskd_loss, ttm_loss, dist_loss]
Y = torch.tensor([0, 3, 8, 2, 2])


def logits(seed: int, num_rows: int = 5) -> Tensor:
    return 3 * torch.randn(num_rows, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_labels(k: int = 9) -> SoftLabels:
    return SoftLabels.from_logits(logits(1), k=k, temperatures=(1.0, 2.0, 4.0))


def test_kd_is_target_plus_the_rest_of_dkd() -> None:
    x, labels, t = logits(0), make_labels(), 4.0
    target = dkd_loss(x, labels, Y, temperature=t, alpha=1.0, beta=0.0, reduction="none")
    others = dkd_loss(x, labels, Y, temperature=t, alpha=0.0, beta=1.0, reduction="none")
    p_y = F.softmax(logits(1) / t, 1).gather(1, Y[:, None])[:, 0]
    torch.testing.assert_close(target + (1 - p_y) * others, kd_loss(x, labels, temperature=t, reduction="none"))


def test_gradient_of_the_rest_leaves_the_target_alone() -> None:
    """T (q_j / (1 - q_y) - p_j / (1 - p_y)) off the target, 0 on it."""
    x, t = logits(0).requires_grad_(), 4.0
    dkd_loss(x, make_labels(), Y, temperature=t, alpha=0.0, beta=1.0, reduction="sum").backward()
    p, q = (F.softmax(z / t, 1) for z in (logits(1), x.detach()))
    on = torch.zeros_like(p).scatter(1, Y[:, None], 1.0).bool()
    expected = t * (q / (1 - q.gather(1, Y[:, None])) - p / (1 - p.gather(1, Y[:, None])))
    torch.testing.assert_close(x.grad, expected.masked_fill(on, 0.0))


def test_ttm_at_temperature_one_is_kd() -> None:
    x, labels = logits(0), make_labels()
    torch.testing.assert_close(ttm_loss(x, labels, temperature=1.0), kd_loss(x, labels, temperature=1.0))
    torch.testing.assert_close(ttm_loss(x, labels, temperature=1.0, weighted=True), kd_loss(x, labels, temperature=1.0))


def test_agreement_of_scale_and_shift_costs_nothing() -> None:
    labels = make_labels()
    for loss in (lskd_loss(5 * logits(1) + 7, labels), dist_loss(logits(1), labels)):
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)  # DIST's 1e-8
    for loss in (batch_correlation_loss(logits(1), labels), class_correlation_loss(logits(1), labels)):
        assert loss < 1e-25


def test_constant_rows_are_standardised_to_zero() -> None:
    x = torch.full((2, 9), 3.0).requires_grad_()
    z = standardize(x)
    assert not z.any()
    (grad,) = torch.autograd.grad((z * torch.arange(9.0)).sum(), x)
    assert grad.abs().max() <= 4.0 / 1e-2 * 1.001


@pytest.mark.parametrize("loss", WITH_TARGETS)
def test_rows_without_a_target_have_no_loss(loss: Callable[..., Tensor]) -> None:
    x, labels = logits(0).requires_grad_(), make_labels()
    y = Y.masked_fill(torch.tensor([True, False, True, False, False]), -1)
    some = loss(x, labels, y, ignore_index=-1)
    kept = torch.tensor([1, 3, 4])
    torch.testing.assert_close(some, loss(x[kept], labels.rows(kept), y[kept]))
    (grad,) = torch.autograd.grad(some, x)
    assert not grad[[0, 2]].any()
    none = loss(x, labels, torch.full_like(Y, -1), ignore_index=-1)
    assert none.item() == 0
    assert not torch.autograd.grad(none, x)[0].any()
    with pytest.raises(ConfigError, match="this loss needs targets_B"):
        loss(x, labels, None)
    with pytest.raises(ConfigError, match="targets are class ids from 0 to 8"):
        loss(x, labels, Y + 1)


@pytest.mark.parametrize("loss", WITH_TARGETS + WITHOUT)
def test_reductions_and_weights(loss: Callable[..., Tensor]) -> None:
    x, labels, w = logits(0), make_labels(), torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0]).double()
    each = loss(x, labels, Y, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(loss(x, labels, Y), each.mean())
    torch.testing.assert_close(loss(x, labels, Y, reduction="sum", weights_B=w), (w * each).sum())
    torch.testing.assert_close(loss(x, labels, Y, weights_B=w), (w * each).mean())


@pytest.mark.parametrize("loss", WITH_TARGETS + WITHOUT)
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor]) -> None:
    x, labels = logits(0).half(), make_labels()
    ours = loss(x.requires_grad_(), labels, Y)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), loss(x.double(), labels, Y), rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(ours, x)[0].dtype == torch.float16


@pytest.mark.parametrize("loss", WITH_TARGETS + WITHOUT)
def test_truncated_labels_need_a_named_tail(loss: Callable[..., Tensor]) -> None:
    x, labels = logits(0).requires_grad_(), make_labels(k=4)
    with pytest.raises(LabelError, match="needs the teacher's probabilities of all classes; got k = 4 of 9"):
        loss(x, labels, Y, temperature=2.0)
    if loss in (lskd_loss, ttm_loss):
        return
    for tail in ("uniform", "renorm"):
        ours = loss(x, labels, Y, temperature=2.0, tail=tail)
        assert torch.isfinite(torch.autograd.grad(ours, x)[0]).all()
        assert torch.isfinite(ours)
    uniform = SoftLabels.from_logits(labels.dense("uniform", temperature=2.0).log() * 2.0, k=9)
    if loss in (dkd_loss, ofa_loss, dist_loss):  # the others also look at temperature 1
        expected = loss(x, uniform, Y, temperature=2.0)
        torch.testing.assert_close(loss(x, labels, Y, temperature=2.0, tail="uniform"), expected)


@pytest.mark.parametrize(
    ("name", "args", "loss"),
    [
        ("dkd", {"temperature": 2, "alpha": 0.5, "beta": 2.0}, dkd_loss),
        ("dkd", {"standardized": True}, dkd_loss),
        ("lskd", {"temperature": 3}, lskd_loss),
        ("nkd", {"gamma": 1.0}, nkd_loss),
        ("wsld", {"alpha": 2}, wsld_loss),
        ("dist", {"beta": 2.0}, dist_loss),
        ("ttm", {"weighted": True}, ttm_loss),
        ("ofa", {"eps": 1.2}, ofa_loss),
    ],
)
def test_methods_add_ground_truth(name: str, args: dict[str, object], loss: Callable[..., Tensor]) -> None:
    x, labels = logits(0), make_labels()
    method = pickle.loads(pickle.dumps(make(name, **args, weight=0.5, hard_weight=2)))
    expected = 0.5 * loss(x, labels, Y, **args) + 2 * F.cross_entropy(x, Y)
    torch.testing.assert_close(method(x, labels, Y), expected)
    assert method.needs.targets
    assert make(name, **args, hard_weight=0).needs.targets == (loss in WITH_TARGETS)


def test_methods_say_what_a_store_lacks() -> None:
    store = {"k": 5, "num_classes": 9, "temperatures": (1.0, 2.0), "has_targets": True}
    with pytest.raises(ConfigError, match=r"method dkd needs all classes; got k = 5 of 9 .*labels.k=9"):
        make("dkd").check(**store)
    make("dkd").check(**{**store, "k": 9})
    make("dkd", temperature=2, tail="uniform").check(**store)
    with pytest.raises(ConfigError, match="method nkd needs the tail mass at temperature 4"):
        make("nkd", temperature=4, tail="uniform").check(**store)
    with pytest.raises(ConfigError, match="method dkd needs all classes"):
        make("dkd", temperature=2, tail="uniform", standardized=True).check(**store)
    make("ttm", hard_weight=0).check(**{**store, "k": 9, "has_targets": False})
    with pytest.raises(ConfigError, match="method ttm needs ground-truth labels"):
        make("ttm").check(**{**store, "k": 9, "has_targets": False})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"temperature": 0}, "method.temperature is above 0; got 0"),
        ({"beta": "8"}, "method.beta is a number; got '8'"),
        ({"standardized": 1}, "method.standardized is true or false; got 1"),
        ({"tail": "bucket"}, "method.tail is uniform, renorm or null; got 'bucket'"),
        ({"hard_wieght": 1}, "got 'hard_wieght'.*perhaps hard_weight was meant"),
        ({"reduction": "sum"}, "an argument of method dkd is one of .*got 'reduction'"),
    ],
)
def test_bad_arguments_of_methods(args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("dkd", **args)
