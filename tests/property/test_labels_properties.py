"""Soft labels against a dense float64 oracle, at every temperature, with ties, -inf and k = C.

Tolerance: scaling a float32 logit x by 1/t rounds by |x|/t * 2^-24 at most, a log-sum over C terms adds a few units
in the last place of its own size, and a log-probability is the difference of two such numbers. Hence the bound
`_slack`, which grows with the logits and is not tuned.
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kddata.errors import LabelError
from kddata.labels import SoftLabels, declare, top_k_ids
from kddata.testing import logits, soft_labels

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 20.0)
EPS = 2.0**-22


def _slack(logits_BC, t):
    finite = logits_BC.double().abs().nan_to_num(posinf=0.0)
    return EPS * (finite.amax(1) / min(t, 1.0) + math.log(logits_BC.shape[1]) + 4)


def _ids(row, k):
    return sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]


@given(x=logits(), data=st.data())
def test_ids_fall_by_logit_and_ties_go_to_the_lower_id(x, data):
    k = data.draw(st.integers(1, x.shape[1]))
    expected = [_ids(row, k) for row in x.tolist()]
    assert top_k_ids(x, k).tolist() == expected
    assert top_k_ids(x.double(), k).tolist() == expected
    labels = SoftLabels.from_logits(x, k=k)
    assert labels.ids_BK.tolist() == expected
    labels.validate()


@given(x=logits(), data=st.data(), t=st.sampled_from(TEMPERATURES))
def test_log_p_and_tails_equal_the_dense_oracle(x, data, t):
    before = x.clone()
    k = data.draw(st.integers(1, x.shape[1]))
    labels = SoftLabels.from_logits(x, k=k, temperatures=TEMPERATURES)
    assert torch.equal(x, before)
    assert labels.temperatures == TEMPERATURES
    log_q = torch.log_softmax(x.double() / t, dim=1)
    outside = log_q.scatter(1, labels.ids_BK.long(), -math.inf)
    tail = torch.logsumexp(outside, 1)
    found = labels.log_tail_BT[:, TEMPERATURES.index(t)].double()
    assert torch.equal(torch.isinf(found), torch.isinf(tail))
    assert bool(((found - tail).nan_to_num(0.0, 0.0, 0.0).abs() <= _slack(x, t)).all())
    if k == x.shape[1]:
        assert bool((labels.log_tail_BT == -math.inf).all())
    log_p = torch.log_softmax(x.double(), 1).gather(1, labels.ids_BK.long())
    assert bool(((labels.log_p_BK - log_p).nan_to_num(0.0, 0.0, 0.0).abs() <= _slack(x, 1.0)[:, None]).all())


@given(x=logits(dtype=torch.float64), data=st.data(), t=st.sampled_from(TEMPERATURES))
def test_float64_logits_stay_float64(x, data, t):
    k = data.draw(st.integers(1, x.shape[1]))
    labels = SoftLabels.from_logits(x, k=k, temperatures=TEMPERATURES)
    assert labels.log_p_BK.dtype == labels.log_tail_BT.dtype == torch.float64
    outside = torch.log_softmax(x / t, 1).scatter(1, labels.ids_BK.long(), -math.inf).logsumexp(1)
    found = labels.log_tail_BT[:, TEMPERATURES.index(t)]
    assert bool(((found - outside).nan_to_num(0.0, 0.0, 0.0).abs() <= _slack(x, t) * 2.0**-29).all())


@given(x=logits(), data=st.data(), t=st.sampled_from(TEMPERATURES))
def test_labels_at_a_declared_temperature_sum_to_1_and_equal_the_oracle(x, data, t):
    k = data.draw(st.integers(1, x.shape[1]))
    labels = SoftLabels.from_logits(x, k=k, temperatures=TEMPERATURES)
    log_p, log_tail = labels.at(t)
    assert bool((log_p.double().exp().sum(1) + log_tail.double().exp() - 1).abs().max() < 1e-5)
    log_q = torch.log_softmax(x.double() / t, dim=1).gather(1, labels.ids_BK.long())
    # A relative error of the tail becomes one of the kept mass times tail / kept.
    kept = log_q.exp().sum(1)
    bound = 4 * _slack(x, t) * (1 + (1 - kept) / kept)
    assert bool(((log_p - log_q).nan_to_num(0.0, 0.0, 0.0).abs() <= bound[:, None]).all())


@given(x=logits(), t=st.floats(0.1, 50))
def test_all_classes_kept_are_exact_at_any_temperature(x, t):
    labels = SoftLabels.from_logits(x, k=x.shape[1])
    log_p, log_tail = labels.at(t)
    log_q = torch.log_softmax(x.double() / t, 1).gather(1, labels.ids_BK.long())
    assert bool((log_tail == -math.inf).all())
    assert bool(((log_p - log_q).nan_to_num(0.0, 0.0, 0.0).abs() <= 2 * _slack(x, t)[:, None]).all())
    for tail in ("renorm", "uniform"):
        dense = labels.dense(tail, temperature=t).double()
        assert bool(((dense - torch.softmax(x.double() / t, 1)).abs() <= 2 * _slack(x, t)[:, None]).all())


@given(labels=soft_labels(), tail=st.sampled_from(["renorm", "uniform"]), t=st.sampled_from([1.0, 2.0]))
def test_dense_rows_sum_to_1(labels, tail, t):
    dense = labels.dense(tail, temperature=t)
    assert dense.shape == (len(labels), labels.num_classes)
    assert bool((dense >= 0).all())
    assert bool((dense.double().sum(1) - 1).abs().max() < 1e-5)
    log_p, log_tail = labels.at(t)
    kept = dense.gather(1, labels.ids_BK.long())
    if tail == "renorm":
        assert torch.allclose(kept, torch.softmax(log_p, 1))
        assert torch.count_nonzero(dense) <= labels.ids_BK.numel()
    elif labels.k < labels.num_classes:
        assert torch.allclose(kept, log_p.exp())
        assert torch.allclose(dense.sum(1) - kept.sum(1), log_tail.exp(), atol=1e-6)


@given(labels=soft_labels())
def test_cat_and_rows_are_inverse(labels):
    parts = [labels.rows(slice(i, i + 1)) for i in range(len(labels))]
    joined = SoftLabels.cat(parts)
    for name in ("ids_BK", "log_p_BK", "log_tail_BT"):
        assert torch.equal(getattr(joined, name), getattr(labels, name))


@given(labels=soft_labels(), t=st.floats(0.1, 9))
def test_an_undeclared_temperature_names_the_declared_ones(labels, t):
    assume(labels.k < labels.num_classes and t not in labels.temperatures)
    with pytest.raises(LabelError, match=r"known at \[1.0, 2.0\] alone; got temperature .* Next: use one of these"):
        labels.at(t)


def test_a_small_tail_is_summed_and_not_subtracted():
    x = torch.tensor([[40.0, 0.0, 0.0, -3.0]])
    labels = SoftLabels.from_logits(x, k=1, temperatures=(1.0,))
    assert labels.log_tail_BT.item() == pytest.approx(
        math.log(2 + math.exp(-3)) - 40, abs=1e-5
    )  # 1 - p is 0 in float32


def test_a_tail_at_2_is_that_of_all_classes():
    """Of 21841 classes, 50 are kept: the tail at 2 cannot be rebuilt from values at 1."""
    x = torch.randn(2, 21841, generator=torch.Generator().manual_seed(0)) * 3
    labels = SoftLabels.from_logits(x, k=50, temperatures=(2.0,))
    assert labels.temperatures == (1.0, 2.0)
    true = 1 - torch.softmax(x.double() / 2, 1).gather(1, labels.ids_BK.long()).sum(1)
    assert torch.allclose(labels.log_tail_BT[:, 1].double().exp(), true, rtol=1e-5)
    assert float(true.min()) > 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_their_rows(value):
    x = torch.zeros(4, 3)
    x[1, 2] = x[3, 0] = value
    with pytest.raises(LabelError, match=r"logits are finite, or -inf in some classes; got otherwise in rows \[1, 3\]"):
        SoftLabels.from_logits(x, k=2)


def test_a_row_of_minus_infinity_says_nothing():
    with pytest.raises(LabelError, match=r"rows \[0\]"):
        SoftLabels.from_logits(torch.full((1, 3), -math.inf), k=1)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_is_between_1_and_c(k):
    with pytest.raises(LabelError, match=f"k is between 1 and the number of classes, 4; got k = {k}"):
        SoftLabels.from_logits(torch.zeros(2, 4), k=k)


def test_logits_have_two_dimensions():
    with pytest.raises(LabelError, match=r"logits are \[B, C\]; got \(4,\)"):
        SoftLabels.from_logits(torch.zeros(4), k=1)


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_positive(t):
    with pytest.raises(LabelError, match="a temperature is a positive number"):
        declare((t,))
    with pytest.raises(LabelError, match="a temperature is a positive number"):
        SoftLabels.from_logits(torch.zeros(1, 2), k=2).at(t)


def test_declared_temperatures_rise_and_hold_1():
    assert declare((4, 2, 2.0)) == (1.0, 2.0, 4.0)
    assert declare(()) == (1.0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_worked_on_in_float32(dtype):
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0]], dtype=dtype)
    labels = SoftLabels.from_logits(x, k=2)
    assert labels.log_p_BK.dtype == torch.float32
    assert torch.equal(labels.log_p_BK, SoftLabels.from_logits(x.float(), k=2).log_p_BK)
    assert labels.ids_BK.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ids_BK": torch.tensor([[0, 5]])}, r"class ids are between 0 and C - 1; got otherwise in rows \[0\]"),
        ({"ids_BK": torch.tensor([[2, 2]])}, "class ids are distinct in a row"),
        ({"log_p_BK": torch.tensor([[-2.0, -1.0]])}, "log-probabilities fall in a row"),
        ({"log_p_BK": torch.tensor([[0.5, -1.0]])}, "log-probabilities are at most 0"),
        ({"log_p_BK": torch.tensor([[math.nan, -1.0]])}, "log-probabilities are at most 0"),
        ({"log_tail_BT": torch.tensor([[0.5]])}, "log tail masses are at most 0"),
        ({"log_tail_BT": torch.tensor([[-1.0, -1.0]])}, r"ids and log_p are \[B, K\] and log_tail is \[B, T\]"),
        ({"temperatures": (2.0,)}, "temperatures rise and hold 1.0"),
        ({"num_classes": 1}, "k is between 1 and the number of classes; got 2 of 1"),
        ({"num_classes": 2, "ids_BK": torch.tensor([[0, 1]])}, "the tail is empty when k = C"),
    ],
)
def test_validate_names_the_broken_rule(change, match):
    good = {
        "ids_BK": torch.tensor([[2, 0]]),
        "log_p_BK": torch.tensor([[-0.5, -1.5]]),
        "log_tail_BT": torch.tensor([[-1.8]]),
        "temperatures": (1.0,),
        "num_classes": 4,
    }
    SoftLabels(**good).validate()
    with pytest.raises(LabelError, match=match):
        SoftLabels(**{**good, **change}).validate()


def test_only_labels_of_one_form_are_joined():
    one, two = (SoftLabels.from_logits(torch.zeros(1, 4), k=k) for k in (1, 2))
    with pytest.raises(LabelError, match="share classes, k and temperatures"):
        SoftLabels.cat([one, two])


def test_a_bucket_has_no_dense_form():
    with pytest.raises(LabelError, match="a dense tail is renorm or uniform; got 'bucket'"):
        SoftLabels.from_logits(torch.zeros(1, 4), k=1).dense("bucket")
