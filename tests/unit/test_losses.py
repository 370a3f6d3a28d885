"""What kd_loss, kd_linear_loss and methods do at the edges: ignored rows, statistics, extreme logits, bad input."""

import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kddata.errors import ConfigError, LabelError
from kddata.labels import SoftLabels
from kddata.losses import RowStats, hard_loss, kd_linear_loss, kd_loss, make, mlkd_loss, rows

TAILS = rows.TAILS


def logits(seed: int, num_rows: int = 4, num_classes: int = 7) -> Tensor:
    return 2 * torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed))


def make_labels(num_rows: int = 4, num_classes: int = 7, k: int = 3) -> SoftLabels:
    return SoftLabels.from_logits(logits(1, num_rows, num_classes), k=k, temperatures=(1.0, 2.0))


def grad_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def test_ignored_rows_keep_their_soft_term() -> None:
    x, labels, y = logits(0).requires_grad_(), make_labels(), torch.tensor([-1, 2, -1, 3])
    args = {"temperature": 2.0, "alpha": 0.5, "ignore_index": -1}
    loss = kd_loss(x, labels, y, **args)
    soft = kd_loss(x, labels, temperature=2.0)
    torch.testing.assert_close(loss, 0.5 * soft + 0.5 * F.cross_entropy(x, y, ignore_index=-1))
    none_left = kd_loss(x, labels, torch.full((4,), -1), **args)
    torch.testing.assert_close(none_left, 0.5 * soft)
    torch.testing.assert_close(grad_of(none_left, x), 0.5 * grad_of(soft, x))


def test_hard_loss_of_ignored_rows_alone_is_zero() -> None:
    x = logits(0).requires_grad_()
    loss = hard_loss(x, torch.full((4,), -100))
    assert loss.item() == 0
    assert not grad_of(loss, x).any()


def test_mixup_pair_of_one_class_is_that_class() -> None:
    x, y = logits(0).requires_grad_(), torch.tensor([0, 6, 2, 3])
    pair = hard_loss(x, y, targets2_B=y, lam=torch.tensor([0.0, 1.0, 0.3, 0.5]))
    torch.testing.assert_close(pair, F.cross_entropy(x, y))
    torch.testing.assert_close(grad_of(pair, x), grad_of(F.cross_entropy(x, y), x))


def test_weights_multiply_rows_and_stay_out_of_the_mean() -> None:
    x, labels, y, w = logits(0), make_labels(), torch.tensor([0, -100, 2, 3]), torch.tensor([0.0, 1.0, 2.0, 0.5])
    args = {"temperature": 2.0, "alpha": 0.5, "weights_B": w}
    each = kd_loss(x, labels, y, temperature=2.0, alpha=0.5, reduction="none")
    torch.testing.assert_close(kd_loss(x, labels, y, **args, reduction="none"), each * w)
    torch.testing.assert_close(kd_loss(x, labels, y, **args, reduction="sum"), (each * w).sum())
    soft = kd_loss(x, labels, temperature=2.0, reduction="none")
    hard = F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(kd_loss(x, labels, y, **args), (0.5 * w * soft).sum() / 4 + (0.5 * w * hard).sum() / 3)


@pytest.mark.parametrize("tail", TAILS)
def test_statistics_of_each_row(tail: rows.Tail) -> None:
    found: list[RowStats] = []
    temperature = 1.0 if tail == "sampled" else 2.0
    x, labels, y = logits(0).requires_grad_(), make_labels(), torch.tensor([0, -100, 2, 3])
    args = {"temperature": temperature, "tail": tail, "reduction": "none"}
    loss = kd_loss(x, labels, y, **args, on_stats=found.append)
    torch.testing.assert_close(loss, kd_loss(x, labels, **args))
    torch.testing.assert_close(grad_of(loss.sum(), x), grad_of(kd_loss(x, labels, **args).sum(), x))
    (stats,) = found
    assert not any(column.requires_grad for column in stats)
    torch.testing.assert_close(stats.kl_B * temperature**2, loss)
    torch.testing.assert_close(stats.ce_B, F.cross_entropy(x, y, reduction="none"))
    kept = torch.softmax(x / temperature, 1).gather(1, labels.ids_BK.long()).sum(1)
    torch.testing.assert_close(stats.tail_B, 1 - kept)
    torch.testing.assert_close(stats.top1_B, x.argmax(1))


def test_statistics_without_targets_have_no_cross_entropy() -> None:
    found: list[RowStats] = []
    kd_loss(logits(0), make_labels(), temperature=1.0, on_stats=found.append)
    assert found[0].ce_B.isnan().all()
    assert not found[0].kl_B.isnan().any()


@pytest.mark.parametrize("tail", TAILS)
def test_logits_at_the_ends_of_float16(tail: rows.Tail) -> None:
    """Right to a unit in the last place against float64, where exp of most differences is 0."""
    teacher = torch.tensor([[3e4, -3e4, 0, 1, 2, 3, 4], [-3e4, 3e4, 0, 1, 2, 3, 4]]).double()
    for labels in (
        SoftLabels.from_logits(logits(2, 2), k=3),
        SoftLabels.from_logits(teacher, k=3),
        SoftLabels.from_logits(teacher, k=7),
    ):
        results = []
        for dtype in (torch.float16, torch.float64):
            x = torch.tensor([[-3e4, 3e4, 0, 1, 2, 3, 4], [3e4, 3e4, 3e4, -3e4, 0, 1, 2]], dtype=dtype).requires_grad_()
            loss = kd_loss(x, labels, torch.tensor([0, 5]), temperature=1.0, tail=tail, alpha=0.5, reduction="none")
            results.append((loss.double(), grad_of(loss.sum(), x).double()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=2**-11, atol=1e-6)
        assert torch.isfinite(results[0][1]).all()


@pytest.mark.parametrize("tail", TAILS)
def test_masked_student_classes(tail: rows.Tail) -> None:
    """-inf logits: no NaN; +inf loss only where the teacher gives such a class some probability."""
    labels = SoftLabels.from_logits(logits(1), k=3)
    off = next(c for c in range(7) if c not in labels.ids_BK[0].tolist())
    x = logits(0).double()
    x[0, off] = -math.inf
    x[1, labels.ids_BK[1, 0].long()] = -math.inf
    x.requires_grad_()
    loss = kd_loss(x, labels, temperature=1.0, tail=tail, reduction="none")
    assert torch.isfinite(grad_of(loss.sum(), x)).all()
    assert bool(loss[0].isinf()) == (tail == "uniform")
    assert loss[1] == math.inf
    assert torch.isfinite(loss[2:]).all()
    x = torch.tensor([[-math.inf, 1.0, 2.0], [0.0, -math.inf, 1.0]])  # an ignored target says nothing of class 0
    torch.testing.assert_close(hard_loss(x, torch.tensor([-100, 0])), F.cross_entropy(x[1:], torch.tensor([0])))


@pytest.mark.parametrize("tail", TAILS)
def test_empty_tail_of_truncated_labels(tail: rows.Tail) -> None:
    """p_t = 0 and p = 0 contribute nothing, whatever the student says there."""
    p = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]).double()
    labels = SoftLabels(
        ids_BK=torch.tensor([[0, 1, 2], [4, 5, 6]]),
        log_p_BK=p.log(),
        log_tail_BT=torch.full((2, 1), -math.inf),
        temperatures=(1.0,),
        num_classes=7,
    )
    x = logits(0, 2).double().requires_grad_()
    loss = kd_loss(x, labels, temperature=1.0, tail=tail, reduction="sum")
    log_q = (
        x.gather(1, labels.ids_BK).log_softmax(1) if tail == "support" else x.log_softmax(1).gather(1, labels.ids_BK)
    )
    expected = F.kl_div(log_q, p, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad_of(loss, x), grad_of(expected, x))


def test_tiny_student_tail_is_summed_from_its_own_classes() -> None:
    """One minus the kept mass would be 0 here, and the loss infinite."""
    labels = make_labels()
    x = logits(0).scatter(1, labels.ids_BK.long(), 40.0)
    loss = kd_loss(x, labels, temperature=1.0, reduction="none")
    torch.testing.assert_close(loss.double(), kd_loss(x.double(), labels, temperature=1.0, reduction="none"))
    assert torch.isfinite(loss).all()


def test_no_rows() -> None:
    x, labels = logits(0, 0).requires_grad_(), make_labels().rows(slice(0, 0))
    loss = kd_loss(x, labels, torch.zeros(0, dtype=torch.long), temperature=1.0, alpha=0.5)
    assert loss.item() == 0
    assert grad_of(loss, x).shape == (0, 7)
    assert kd_loss(x, labels, temperature=1.0, reduction="none").shape == (0,)


def test_stored_types_of_labels() -> None:
    """As a store keeps them: uint16 ids and float16 log-probabilities."""
    labels = make_labels()
    stored = dataclasses.replace(labels, ids_BK=labels.ids_BK.to(torch.uint16), log_p_BK=labels.log_p_BK.half())
    rounded = dataclasses.replace(labels, log_p_BK=labels.log_p_BK.half().float())
    for tail in TAILS:
        args = {"temperature": 1.0, "tail": tail}
        torch.testing.assert_close(kd_loss(logits(0), stored, **args), kd_loss(logits(0), rounded, **args))


def test_inputs_stay_as_they_were() -> None:
    x, labels, y = logits(0), make_labels(), torch.tensor([0, -100, 2, 3])
    before = [x.clone(), labels.ids_BK.clone(), labels.log_p_BK.clone(), labels.log_tail_BT.clone(), y.clone()]
    student = x.requires_grad_()
    for tail in TAILS:
        kd_loss(student, labels, y, temperature=1.0, tail=tail, alpha=0.5, label_smoothing=0.1).backward()
    for was, now in zip(before, [x, labels.ids_BK, labels.log_p_BK, labels.log_tail_BT, y], strict=True):
        assert torch.equal(was, now)


def test_second_derivatives_are_refused() -> None:
    x = logits(0).requires_grad_()
    for factor, message in ((1.0, "does not require grad"), (x.sum(), "once_differentiable")):
        (grad,) = torch.autograd.grad(factor * kd_loss(x, make_labels(), temperature=1.0), x, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            grad.sum().backward()


def test_two_losses_of_one_batch_add_up() -> None:
    x, labels = logits(0).requires_grad_(), make_labels()
    first, second = (kd_loss(x, labels, temperature=t) for t in (1.0, 2.0))
    both = grad_of(first + 3 * second, x)
    first, second = (kd_loss(x, labels, temperature=t) for t in (1.0, 2.0))
    torch.testing.assert_close(both, grad_of(first, x) + 3 * grad_of(second, x))


def test_autocast_computes_in_float32() -> None:
    x, labels = logits(0).bfloat16().requires_grad_(), make_labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(x, labels, temperature=2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kd_loss(x, labels, temperature=2.0), rtol=0, atol=0)


def test_compiles_as_one_graph() -> None:
    labels, y = make_labels(), torch.tensor([0, -100, 2, 3])

    def loss(x: Tensor) -> Tensor:
        return kd_loss(x, labels, y, temperature=2.0, alpha=0.5)

    torch.compiler.reset()
    x = logits(0).requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, loss(x))
    torch.testing.assert_close(grad_of(compiled, x), grad_of(loss(x), x))


def test_linear_loss_under_autocast_follows_linear() -> None:
    features, weight = logits(3, 4, 5).requires_grad_(), logits(4, 7, 5).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = kd_linear_loss(features, weight, make_labels(), temperature=2.0)
        whole = kd_loss(F.linear(features, weight), make_labels(), temperature=2.0)
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)
    for ours_grad, grad in zip(
        torch.autograd.grad(ours, (features, weight)), torch.autograd.grad(whole, (features, weight)), strict=True
    ):
        assert ours_grad.dtype == torch.float32
        torch.testing.assert_close(ours_grad, grad, rtol=0.02, atol=0.01)


BAD = {
    "student logits are .B, C.": {"student_logits_BC": torch.zeros(4)},
    "floating point": {"student_logits_BC": torch.zeros(4, 7, dtype=torch.long)},
    "rows and classes of the student's logits; got labels of 4 rows and 7 classes, logits .4, 8.": {
        "student_logits_BC": torch.zeros(4, 8)
    },
    "temperature is a positive number; got 0": {"temperature": 0},
    "tail is one of bucket, renorm, uniform, support, sampled; got 'bukcet'": {"tail": "bukcet"},
    "reduction is one of mean, sum, none; got 'average'": {"reduction": "average"},
    "backend is one of auto, torch, triton; got 'cuda'": {"backend": "cuda"},
    "alpha is between 0 .* and 1": {"alpha": 1.5},
    "label_smoothing is between 0 and 1; got 2": {"label_smoothing": 2.0},
    "alpha < 1 asks for a hard term, and that needs targets; got alpha = 0.5": {"alpha": 0.5, "targets_B": None},
    "importance weights cannot be tempered": {"tail": "sampled", "temperature": 2.0},
    "targets_B holds integers, one for each of the 4 rows": {"alpha": 0.5, "targets_B": torch.zeros(3).long()},
    r"targets_B holds integers.*got \(4,\) torch.float32": {"alpha": 0.5, "targets_B": torch.zeros(4)},
    r"targets are class ids from 0 to 6, or ignore_index \(-100\); got \[-1, 7\] in rows \[1, 3\]": {
        "alpha": 0.5,
        "targets_B": torch.tensor([0, -1, 2, 7]),
    },
    "targets2_B holds integers": {"alpha": 0.5, "targets2_B": torch.zeros(4, 1).long()},
    "weights_B holds real numbers": {"weights_B": torch.ones(5)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    args = {
        "student_logits_BC": logits(0),
        "labels": make_labels(),
        "targets_B": torch.zeros(4, dtype=torch.long),
        "temperature": 1.0,
        **BAD[message],
    }
    with pytest.raises((ConfigError, LabelError), match=message):
        kd_loss(**args)


def test_undeclared_temperature_names_the_declared_ones() -> None:
    with pytest.raises(LabelError, match=r"known at \[1.0, 2.0\] alone; got temperature 3"):
        kd_loss(logits(0), make_labels(), temperature=3.0)


def test_another_device_is_named() -> None:
    with pytest.raises(LabelError, match=r"device of the student's logits, cpu; got meta.*labels.to"):
        kd_loss(logits(0), make_labels().to("meta"), temperature=1.0)


@pytest.mark.parametrize(
    ("ids", "message"), [([[0, 1, 7]] * 4, "between 0 and C - 1"), ([[0, 1, 0]] * 4, "distinct in a row")]
)
def test_debug_looks_into_labels(ids: list[list[int]], message: str) -> None:
    labels = dataclasses.replace(make_labels(), ids_BK=torch.tensor(ids))
    with pytest.raises(LabelError, match=message):
        kd_loss(logits(0), labels, temperature=1.0, debug=True)


def test_linear_loss_refuses_what_does_not_fit() -> None:
    features, weight = torch.zeros(4, 5), torch.zeros(7, 5)
    with pytest.raises(ConfigError, match=r"share D, C, dtype and device; got \(4, 5\) .*\(7, 6\)"):
        kd_linear_loss(features, torch.zeros(7, 6), make_labels(), temperature=1.0)
    with pytest.raises(ConfigError, match="share D, C, dtype and device"):
        kd_linear_loss(features, weight.double(), make_labels(), temperature=1.0)
    with pytest.raises(ConfigError, match="mean or sum; got 'none'"):
        kd_linear_loss(features, weight, make_labels(), temperature=1.0, reduction="none")
    with pytest.raises(LabelError, match="rows and classes"):
        kd_linear_loss(features, torch.zeros(8, 5), make_labels(), temperature=1.0)


def test_methods_by_name() -> None:
    x, labels, y = logits(0), make_labels(), torch.tensor([0, -1, 2, 3])
    method = pickle.loads(pickle.dumps(make("kd", temperature=2, alpha=0.25, tail="renorm")))
    ours = method(x, labels, y, ignore_index=-1, reduction="sum")
    expected = kd_loss(x, labels, y, temperature=2.0, alpha=0.25, tail="renorm", ignore_index=-1, reduction="sum")
    torch.testing.assert_close(ours, expected)
    hard = pickle.loads(pickle.dumps(make("hard", label_smoothing=0.1)))
    torch.testing.assert_close(
        hard(x, None, y, ignore_index=-1), F.cross_entropy(x, y, ignore_index=-1, label_smoothing=0.1)
    )
    with pytest.raises(ConfigError, match="cross-entropy needs targets_B"):
        hard(x, labels)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("kdd", {}, "method.name is one of kd, hard, dkd.*got 'kdd'.*perhaps kd was meant"),
        ("kd", {"temprature": 4}, "got 'temprature'.*perhaps temperature was meant"),
        ("kd", {}, "method kd needs temperature"),
        ("kd", {"temperature": "4"}, "method.temperature is a number; got '4'"),
        ("kd", {"temperature": 4, "tail": "buckets"}, "tail is one of"),
        ("kd", {"temperature": 4, "alpha": -1}, "alpha is between 0"),
    ],
)
def test_unknown_methods_and_arguments(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **args)


def test_mlkd_takes_the_views_of_an_image_apart() -> None:
    """Pairs in any order: half of what the first views and the second views have by themselves."""
    torch.manual_seed(0)
    x, labels = torch.randn(6, 5), SoftLabels.from_logits(torch.randn(6, 5), k=5)
    ids = ["a", "b", "a", "c", "c", "b"]
    first, second = torch.tensor([0, 1, 3]), torch.tensor([2, 5, 4])
    alone = [mlkd_loss(x[index], labels.rows(index)) for index in (first, second)]
    paired = mlkd_loss(x, labels, image_ids=ids)
    torch.testing.assert_close(paired, (alone[0] + alone[1]) / 2)
    assert not torch.isclose(paired, mlkd_loss(x, labels))
    torch.testing.assert_close(mlkd_loss(x, labels, image_ids=list("abcdef")), mlkd_loss(x, labels))
    torch.testing.assert_close(make("mlkd", hard_weight=0)(x, labels, image_ids=ids), paired)


def test_methods_check_a_store_before_training() -> None:
    store = {"k": 5, "num_classes": 10, "temperatures": (1.0, 2.0), "has_targets": True}
    kd = make("kd", temperature=2.0, alpha=0.9)
    kd.check(**store)
    make("hard").check(**store)
    make("kd", temperature=3.0).check(**{**store, "k": 10})
    make("kd", temperature=2.0).check(**{**store, "has_targets": False})
    with pytest.raises(ConfigError, match=r"needs the tail mass at temperature 3; got it at \[1.0, 2.0\] alone"):
        make("kd", temperature=3.0).check(**store)
    for method in (kd, make("hard")):
        with pytest.raises(ConfigError, match="needs ground-truth labels of the images; got its images have none"):
            method.check(**{**store, "has_targets": False})
    with pytest.raises(ConfigError, match="needs classes drawn at random"):
        make("kd", temperature=1.0, tail="sampled").check(**store)
    with pytest.raises(ConfigError, match="needs top classes"):
        kd.check(**store, sampled=True)
