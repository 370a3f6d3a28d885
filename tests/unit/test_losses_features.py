"""Losses on features and relations at the edges, and what their learned parts keep."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kddata import losses
from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses import dense


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fsp(s: Tensor, t: Tensor) -> Tensor:
    return losses.fsp_loss([losses.fsp_matrix(s, s)], [losses.fsp_matrix(t, t)])


OF_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ab": lambda s, t: losses.ab_loss([s], [t]),
    "at": lambda s, t: losses.at_loss([s], [t]),
    "fitnets": losses.fitnets_loss,
    "fsp": fsp,
    "ft": losses.ft_loss,
    "nst": lambda s, t: losses.nst_loss([s], [t]),
    "ofd": lambda s, t: losses.ofd_loss(s, t, losses.ofd_margin(t)),
    "reviewkd": lambda s, t: losses.reviewkd_loss([s], [t]),
    "feature_mean": losses.feature_mean_loss,
    "sp": lambda s, t: losses.sp_loss([s], [t]),
    "rkd": losses.rkd_loss,
    "pkt": losses.pkt_loss,
    "cc": losses.cc_loss,
}
OF_RELATIONS = ("sp", "rkd", "pkt", "cc")


def value_and_grad(name: str, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    s = s.clone().requires_grad_()
    loss = OF_MAPS[name](s, t)
    return loss, torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("name", OF_MAPS)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    """The loss of bfloat16 tensors is that of their values in float32; its gradient comes back in bfloat16."""
    s, t = normal(0, 3, 4, 4, 4).bfloat16(), normal(1, 3, 4, 4, 4).half()
    loss, grad = value_and_grad(name, s, t)
    expected, expected_grad = value_and_grad(name, s.float(), t.float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grad, expected_grad.bfloat16(), rtol=2**-6, atol=0.0)  # summed in bfloat16 where shared


@pytest.mark.parametrize("name", OF_MAPS)
def test_a_teacher_may_answer_in_inference_mode(name: str) -> None:
    s = normal(0, 3, 4, 4, 4)
    with torch.inference_mode():
        t = normal(1, 3, 4, 4, 4)
    loss, grad = value_and_grad(name, s, t)
    expected, expected_grad = value_and_grad(name, s, normal(1, 3, 4, 4, 4))
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("name", OF_RELATIONS)
def test_one_image_has_no_relations(name: str) -> None:
    loss, grad = value_and_grad(name, normal(0, 1, 8), normal(1, 1, 8))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert not grad.abs().gt(1e-12).any()


@pytest.mark.parametrize("name", OF_MAPS)
def test_dead_maps_have_a_finite_loss_and_gradient(name: str) -> None:
    """A student whose ReLUs are all off, and images that are all alike."""
    for t in (torch.zeros(3, 4, 4, 4), normal(1, 1, 4, 4, 4).float().expand(3, 4, 4, 4)):
        for s in (torch.zeros(3, 4, 4, 4), torch.ones(3, 4, 4, 4)):
            loss, grad = value_and_grad(name, s, t)
            assert torch.isfinite(loss)
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", OF_MAPS)
def test_a_student_that_equals_its_teacher(name: str) -> None:
    if name in ("ab", "ofd"):
        pytest.skip("a margin is asked for beyond the teacher")
    t = normal(1, 3, 4, 4, 4)
    loss, grad = value_and_grad(name, t, t)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    if name != "ft":  # |x| has no gradient at 0
        assert grad.abs().max() < 1e-9


def test_attention_maps_serve_as_well_as_features() -> None:
    s, t = normal(0, 3, 4, 8, 8), normal(1, 3, 6, 8, 8)
    of_features = losses.at_loss([s], [t])
    torch.testing.assert_close(losses.at_loss([s], [losses.attention_map(t)]), of_features)
    torch.testing.assert_close(losses.at_loss([losses.attention_map(s)], [losses.attention_map(t)]), of_features)


def test_shapes_that_do_not_fit_are_refused() -> None:
    s = normal(0, 3, 4, 4, 4)
    with pytest.raises(ConfigError, match="HintRegressor"):
        losses.fitnets_loss(s, normal(1, 3, 8, 4, 4))
    with pytest.raises(ConfigError, match="one row for each image"):
        losses.rkd_loss(s, s[:2])
    with pytest.raises(ConfigError, match="of one length"):
        losses.at_loss([s, s], [s])
    with pytest.raises(ConfigError, match="of one length"):
        losses.sp_loss(s, s)  # type: ignore[arg-type]


def test_rkd_distances_of_far_embeddings_survive_float32() -> None:
    """Distances do not depend on a common shift; a plain |a|^2 + |b|^2 - 2ab would lose them to rounding."""
    s, t = normal(0, 6, 16), normal(1, 6, 16)
    near = losses.rkd_distance_loss(s, t)
    far = losses.rkd_distance_loss((s + 100).float(), t.float())
    torch.testing.assert_close(far.double(), near, rtol=1e-3, atol=0.0)


def test_fsp_averages_the_larger_map() -> None:
    small, large = normal(0, 2, 3, 4, 4), normal(1, 2, 5, 8, 8)
    wanted = losses.fsp_matrix(small, torch.nn.functional.avg_pool2d(large, 2))
    torch.testing.assert_close(losses.fsp_matrix(small, large), wanted)
    torch.testing.assert_close(losses.fsp_matrix(large, small), wanted.transpose(1, 2))


def test_a_batchnorm_tells_the_margin_that_normal_data_have() -> None:
    bn = torch.nn.BatchNorm2d(4).double()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 0.5, -2.0, 0.25]))
        bn.bias.copy_(torch.tensor([0.0, 0.5, 1.0, -0.25]))
    measured = losses.ofd_margin(bn(normal(0, 64, 4, 32, 32)))
    margin = losses.batchnorm_margin(bn.weight, bn.bias)
    # the mean of 10,000 negative values or more of a standard deviation below 2
    torch.testing.assert_close(margin, measured, rtol=0, atol=5 * 2 / 100)
    assert margin[0, 0].item() == pytest.approx(-((2 / torch.pi) ** 0.5))
    seldom = losses.batchnorm_margin(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, 3.2, 1.0, -1.0]))
    assert seldom.flatten().tolist() == [pytest.approx(-0.2835, abs=1e-3), -3.0, 0.0, -1.0]


def test_ofd_margin_is_the_mean_of_negative_responses() -> None:
    t = normal(0, 4, 3, 5, 5)
    t[:, 1] = t[:, 1].abs()
    margin = losses.ofd_margin(t)
    assert margin.shape == (1, 3, 1, 1)
    torch.testing.assert_close(margin[0, 0, 0, 0], t[:, 0][t[:, 0] < 0].mean())
    assert margin[0, 1, 0, 0] == 0


def logits_and_labels(num_classes: int = 7) -> tuple[Tensor, SoftLabels, Tensor]:
    x, teacher = 3 * normal(0, 5, num_classes), 3 * normal(1, 5, num_classes)
    return x.requires_grad_(), SoftLabels.from_logits(teacher, k=num_classes), torch.tensor([0, 6, 2, 3, 3])


def test_kd_is_the_target_term_and_the_share_of_the_others_times_theirs() -> None:
    x, labels, y = logits_and_labels()
    t = 4.0
    terms = {"max_ratio": 1e9, "temperature": t, "reduction": "none"}
    nckd = losses.aekt_loss(x, labels, y, explicit=0.0, **terms)
    log_p = dense.teacher_log_p(dense.batch(x, labels), temperature=t).gather(1, y[:, None])[:, 0]
    log_q = (x / t).log_softmax(1).gather(1, y[:, None])[:, 0]
    ratio = (log_p - log_q).exp()
    tckd = losses.aekt_loss(x, labels, y, implicit=0.0, **terms) / ratio
    kd = losses.kd_loss(x, labels, temperature=t, reduction="none")
    torch.testing.assert_close(tckd + (1 - log_p.exp()) * nckd, kd, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_non_target_term() -> None:
    """T (q_j / (1 - q_y) - p_j / (1 - p_y)) off target, 0 on target."""
    x, labels, y = logits_and_labels()
    t = 4.0
    loss = losses.aekt_loss(x, labels, y, explicit=0.0, temperature=t, reduction="sum")
    p = dense.teacher_log_p(dense.batch(x, labels), temperature=t).exp()
    q = (x / t).softmax(1)
    others_p, others_q = (v.scatter(1, y[:, None], 0.0) for v in (p, q))
    expected = t * (others_q / others_q.sum(1, keepdim=True) - others_p / others_p.sum(1, keepdim=True))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected.detach(), rtol=1e-9, atol=1e-12)


def test_the_explicit_term_adapts_up_to_its_bound() -> None:
    """A student surer of the target than its teacher hears less of it; one far less sure, `max_ratio` times as much."""
    teacher = torch.tensor([[2.0, 0.0, 0.0]]).double()
    labels, y = SoftLabels.from_logits(teacher, k=3), torch.tensor([0])

    def share(x: Tensor, max_ratio: float) -> float:
        args = {"temperature": 1.0, "implicit": 0.0}
        plain = losses.dkd_loss(x, labels, y, temperature=1.0, alpha=1.0, beta=0.0)
        return (losses.aekt_loss(x, labels, y, max_ratio=max_ratio, **args) / plain).item()

    sure, unsure = torch.tensor([[6.0, 0.0, 0.0]]).double(), torch.tensor([[-3.0, 0.0, 0.0]]).double()
    ratio = (teacher.softmax(1)[0, 0] / sure.softmax(1)[0, 0]).item()
    assert share(sure, 2.0) == pytest.approx(ratio)
    assert ratio < 1
    assert share(unsure, 2.0) == pytest.approx(2.0)


def test_the_class_head_starts_as_the_identity() -> None:
    x = normal(0, 3, 7).float()
    assert torch.equal(losses.ClassHead(7)(x), x)


@pytest.mark.parametrize("name", ["aekt", "ctkd"])
def test_logits_hundreds_apart_have_a_finite_loss_and_gradient(name: str) -> None:
    x = torch.tensor([[300.0, -300, 0, 1], [-300, 300, 0, 1]]).requires_grad_()
    labels = SoftLabels.from_logits(torch.tensor([[-300.0, 300, 0, 1], [300, -300, 0, 1]]), k=4)
    if name == "aekt":
        loss = losses.aekt_loss(x, labels, torch.tensor([0, 3]), temperature=1.0)
    else:
        loss = losses.ctkd_loss(x, labels, temperature=losses.LearnedTemperature(span=0.0)())
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_a_learned_temperature_climbs_the_loss_ever_more() -> None:
    x, labels, _ = logits_and_labels()
    temperature = losses.LearnedTemperature(ramp_steps=2).double()
    grads = []
    for _ in range(4):
        loss = losses.ctkd_loss(x, labels, temperature=temperature())
        grads.append(torch.autograd.grad(loss, temperature.x)[0].item())
    plain = temperature.x.detach().clone().requires_grad_()
    loss = losses.ctkd_loss(x, labels, temperature=temperature.start + temperature.span * plain.sigmoid())
    full = -torch.autograd.grad(loss, plain)[0].item()
    assert grads == pytest.approx([0.0, full / 2, full, full])
    assert int(temperature.calls) == 4
    temperature.eval()()
    assert int(temperature.calls) == 4


def test_a_bank_knows_its_images_again_after_loading() -> None:
    bank = losses.ContrastiveBank(8, 6, num_rows=4, width=5, negatives=3)
    assert bank.rows_of(["a", "b", "a"]).tolist() == [0, 1, 0]
    rows = bank.rows_of(["a", "b"])
    loss = bank(normal(0, 2, 8).float(), normal(1, 2, 6).float(), rows, bank.others(rows))
    assert torch.isfinite(loss)
    again = losses.ContrastiveBank(8, 6, num_rows=4, width=5, negatives=3)
    again.load_state_dict(bank.state_dict())
    assert again.rows_of(["b", "c", "a"]).tolist() == [1, 2, 0]
    with pytest.raises(ConfigError, match="a row for each image"):
        again.rows_of(["d", "e"])


def test_boundary_samples_stop_where_the_teacher_changes_its_mind() -> None:
    weight = normal(0, 3, 12)

    def teacher(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    images = normal(1, 8, 3, 2, 2)
    base = teacher(images).argmax(1)
    moved = losses.boundary_samples(teacher, images, (base + 1) % 3, step_size=0.5, num_steps=50)
    assert (teacher(moved).argmax(1) != base).float().mean() > 0.5
    same = losses.boundary_samples(teacher, images, base, num_steps=5)
    torch.testing.assert_close(same, images.clamp(-2.5, 2.5))
