"""Our losses against outputs and gradients of public reference implementations, through a table from family to call.

The folder is KDDATA_GOLDEN_DIR (default: shared/golden beside the repository); its index.json names every file, its
inputs and its hyper-parameters, so another folder of the same form runs the same tests. A new loss adds one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from golden import INDEX, NEEDS_GOLDEN, compare, family, load
from torch import Tensor

from kddata.labels import SoftLabels
from kddata.losses import (
    LearnedTemperature,
    batch_correlation_loss,
    bss_loss,
    class_correlation_loss,
    ctkd_loss,
    dense,
    dist_loss,
    dkd_loss,
    dml_loss,
    fitnets_loss,
    hard_loss,
    kd_loss,
    lskd_loss,
    nkd_loss,
    ofa_loss,
    one_loss,
    ttm_loss,
    wsld_loss,
)

pytestmark = NEEDS_GOLDEN


@dataclass(frozen=True)
class Case:
    """One input with one set of hyper-parameters."""

    x: Tensor  # student logits, with gradient
    teacher: Tensor
    target: Tensor
    hyper: dict[str, Any]

    @property
    def labels(self) -> SoftLabels:
        """All classes of the teacher's answer."""
        return all_classes(self.teacher)


def all_classes(teacher_logits: Tensor) -> SoftLabels:
    return SoftLabels.from_logits(teacher_logits, k=teacher_logits.shape[1])


def entropy(teacher_logits: Tensor) -> Tensor:
    """Mean entropy: what a cross-entropy against soft labels has over the KL divergence."""
    log_p = teacher_logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def kd(c: Case) -> Tensor:
    return kd_loss(c.x, c.labels, temperature=c.hyper["T"])


def dkd(c: Case, *, standardized: bool = False) -> Tensor:
    args = {"temperature": c.hyper["T"], "alpha": c.hyper["alpha"], "beta": c.hyper["beta"]}
    return dkd_loss(c.x, c.labels, c.target, **args, standardized=standardized)


def one_kl(c: Case) -> Tensor:
    """The student as one branch, and as the other one an ensemble that the gate gives all: no target, no cross-entropy.

    The reference adds 1e-7 to every target, which then sum to `total`: `total` times ours for those shares, and a
    constant.
    """
    t = c.hyper["T"]
    p = (c.teacher / t).softmax(1) + 1e-7
    total = p.sum(1).mean()
    gate = c.x.new_tensor([0, 1]).expand(len(c.x), 2)
    branches, none = torch.stack([c.x, t * p.log()], 1), torch.full_like(c.target, -1)
    return total * one_loss(branches, gate, none, temperature=t, ignore_index=-1) + t * t * total * total.log()


def symmetric_kl(c: Case) -> Tensor:
    t = c.hyper["T"]
    p, q = (c.teacher / t).log_softmax(1), (c.x / t).log_softmax(1)
    return dense.kl(p, q).mean() + dense.kl(q, p).mean()


def reverse_cross_entropy(c: Case) -> Tensor:
    t = c.hyper["T"]
    return t * t * dense.cross_entropy((c.x / t).log_softmax(1), (c.teacher / t).log_softmax(1)).mean()


# Factors are spelt out: ours carries T^2 once, and is a KL divergence averaged over the batch.
FAMILIES: dict[str, Callable[[Case], Tensor]] = {
    "kd_mdistiller": kd,
    "kd_repdistiller": kd,
    "mlkd_kd": kd,
    "kd_hinton_ce_mix": lambda c: kd_loss(c.x, c.labels, c.target, temperature=c.hyper["T"], alpha=c.hyper["alpha"]),
    "dml_kl": lambda c: dml_loss(c.x, c.teacher[:, None]),
    "bss_kl": lambda c: bss_loss(c.x, c.labels, temperature=c.hyper["T"]),
    "gnosis_fwd_ce": lambda c: kd(c) + c.hyper["T"] ** 2 * entropy(c.teacher / c.hyper["T"]),
    "dkd": dkd,
    "dkd_tckd_only": dkd,
    "dkd_nckd_only": dkd,
    "lskd_kd": lambda c: lskd_loss(c.x, c.labels, temperature=c.hyper["T"]),
    "lskd_dkd": lambda c: dkd(c, standardized=True),
    "nkd": lambda c: nkd_loss(c.x, c.labels, c.target, temperature=c.hyper["temp"], gamma=c.hyper["gamma"]),
    "wsld": lambda c: wsld_loss(c.x, c.labels, c.target, temperature=c.hyper["temp"], alpha=c.hyper["alpha"]),
    "ttm": lambda c: ttm_loss(c.x, c.labels, temperature=1 / c.hyper["l"]),
    "wttm": lambda c: ttm_loss(c.x, c.labels, temperature=1 / c.hyper["l"], weighted=True),
    "ofa": lambda c: ofa_loss(c.x, c.labels, c.target, temperature=c.hyper["T"], eps=c.hyper["eps"]),
    "dist_seg": lambda c: dist_loss(c.x, c.labels, beta=c.hyper["beta"], gamma=c.hyper["gamma"]),
    "dist_tau": lambda c: dist_loss(
        c.x, c.labels, temperature=c.hyper["tau"], beta=c.hyper["beta"], gamma=c.hyper["gamma"]
    ),
    "mlkd_bc": lambda c: batch_correlation_loss(c.x, c.labels, temperature=c.hyper["T"]),
    "mlkd_cc": lambda c: class_correlation_loss(c.x, c.labels, temperature=c.hyper["T"]),
    "gnosis_kl": lambda c: kd(c) / c.hyper["T"] ** 2,  # no T^2
    "gnosis_rev_ce": lambda c: reverse_cross_entropy(c),
    "gnosis_sym_kl": lambda c: symmetric_kl(c),
    "gnosis_brier_ts": lambda c: fitnets_loss((c.x / c.hyper["T"]).softmax(1), (c.teacher / c.hyper["T"]).softmax(1)),
    "logits_mse": lambda c: fitnets_loss(c.x, c.teacher),
    "one_kl": one_kl,
    "gnosis_hard_ce": lambda c: c.hyper["T"] ** 2 * hard_loss(c.x / c.hyper["T"], c.teacher.argmax(1)),
}


def mapped(kind: str) -> list[Any]:
    return [pytest.param(e, id=e["file"]) for e in INDEX if e["kind"] == kind and family(e) in FAMILIES]


@pytest.mark.parametrize("entry", mapped("logit-loss"))
def test_logit_loss(entry: dict[str, Any]) -> None:
    inputs, outputs = load(entry["inputs"]), load(entry["file"])
    for i, hyper in enumerate(entry["hyper"]):
        x = torch.from_numpy(inputs["student_logits"]).requires_grad_()
        case = Case(x, torch.from_numpy(inputs["teacher_logits"]), torch.from_numpy(inputs["target"]), hyper)
        compare(FAMILIES[family(entry)](case), x, outputs[f"loss_{i}"], outputs[f"grad_student_{i}"])


@pytest.mark.parametrize("entry", [pytest.param(e, id=e["file"]) for e in INDEX if family(e) == "sparse_kl_distillkit"])
def test_sparse_kl_distillkit(entry: dict[str, Any]) -> None:
    """A sum over rows. The reference rounds to float32 on its way: 1e-6, for gradients of the largest one."""
    data = load(entry["file"])
    teacher, num_kept = torch.from_numpy(data["teacher_logits"]), data["topk_ids"].shape[1]
    labels = SoftLabels.from_logits(teacher, k=num_kept)
    np.testing.assert_array_equal(np.sort(labels.ids_BK.numpy()), np.sort(data["topk_ids"]))
    for tail in ("bucket", "renorm"):
        x = torch.from_numpy(data["student_logits"]).requires_grad_()
        loss = kd_loss(x, labels, temperature=1.0, tail=tail, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x)
        np.testing.assert_allclose(loss.item(), data[f"loss_{tail}"], rtol=1e-6)
        theirs = data[f"grad_student_{tail}"]
        np.testing.assert_allclose(grad.numpy(), theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


def test_ensemble_of_teachers() -> None:
    """The mixture of an ensemble's probabilities is one teacher; gnosis takes its cross-entropy at T."""
    entry = next((e for e in INDEX if family(e) == "gnosis_ensemble"), None)
    if entry is None:
        pytest.skip("this folder has no gnosis_ensemble")
    data = load(entry["file"])
    x, t = torch.from_numpy(data["student_logits"]).requires_grad_(), float(data["T"])
    teacher = torch.from_numpy(data["out_reduced_logits"])
    loss = kd_loss(x, all_classes(teacher), temperature=t) + t * t * entropy(teacher / t)
    compare(loss, x, data["loss_fwd_ce"], data["grad_student"])


# Logits hundreds apart. In float32 three references give NaN; their float64 values are what ours gives in float32.
STRESS: dict[str, Callable[[Tensor, SoftLabels, Tensor], Tensor]] = {
    "kd": lambda x, labels, y: kd_loss(x, labels, temperature=1.0),
    "dml": lambda x, labels, y: dml_loss(x, labels.log_p_BK.gather(1, labels.ids_BK.argsort(1))[:, None]),
    "kd_cls": lambda x, labels, y: 0.5 * kd_loss(x, labels, temperature=1.0),
    "dkd": lambda x, labels, y: dkd_loss(x, labels, y, temperature=1.0, alpha=1.0, beta=8.0),
    "ofa": lambda x, labels, y: ofa_loss(x, labels, y, temperature=1.0, eps=1.5),
    "nkd": lambda x, labels, y: nkd_loss(x, labels, y),
    "wsld": lambda x, labels, y: wsld_loss(x, labels, y, temperature=1.0),
    "ttm": lambda x, labels, y: ttm_loss(x, labels, temperature=4.0),
}


def stress() -> dict[str, np.ndarray]:
    if not any(family(entry) == "stress_reference_numerics" for entry in INDEX):
        pytest.skip("this folder has no stress_reference_numerics")
    return load("stress_reference_numerics.npz")


@pytest.mark.parametrize("name", STRESS)
def test_logits_hundreds_apart_in_float32(name: str) -> None:
    data = stress()
    x = torch.from_numpy(data["student_logits"]).requires_grad_()
    loss = STRESS[name](x, all_classes(torch.from_numpy(data["teacher_logits"])), torch.from_numpy(data["target"]))
    (grad,) = torch.autograd.grad(loss, x)
    assert x.dtype == grad.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), data[f"loss_{name}_f8"], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(grad.numpy(), data[f"grad_{name}_f8"], rtol=2e-4, atol=1e-5)


def test_standardised_constant_student_row() -> None:
    """The reference's value, and a gradient like any other row's where its own is 858149."""
    data = stress()
    x = torch.from_numpy(data["constant_logits"]).requires_grad_()
    labels = all_classes(torch.from_numpy(data["teacher_logits"]))
    loss = lskd_loss(x, labels, temperature=2.0)
    np.testing.assert_allclose(loss.item(), data["loss_lskd_constant_student_f8"], rtol=2e-4)
    assert float(torch.autograd.grad(loss, x)[0].abs().max()) < 50


def test_ctkd() -> None:
    """The temperature climbs the loss: its gradient is reversed. The reference hands lambda in with its sign."""
    entry = next((e for e in INDEX if family(e) == "ctkd_global_T"), None)
    if entry is None:
        pytest.skip("this folder has no ctkd_global_T")
    data = load(entry["file"])
    x = torch.from_numpy(data["student_logits"]).requires_grad_()
    temperature = LearnedTemperature(start=float(data["t_start"]), span=float(data["t_end"])).double()
    with torch.no_grad():
        temperature.x.copy_(torch.from_numpy(data["global_T"]))
    t = temperature()
    np.testing.assert_allclose(t.detach().numpy(), data["out_T"], rtol=1e-9)
    loss = ctkd_loss(x, all_classes(torch.from_numpy(data["teacher_logits"])), temperature=t)
    (of_t,) = torch.autograd.grad(loss, temperature.x, retain_graph=True)
    np.testing.assert_allclose(of_t.numpy() * -float(data["lambda_"]), data["grad_global_T"], rtol=1e-7, atol=1e-10)
    compare(loss, x, data["loss"], data["grad_student"])
