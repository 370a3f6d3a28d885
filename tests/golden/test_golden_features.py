"""Losses on features and on relations between images, and their learned parts, against public implementations."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import INDEX, NEEDS_GOLDEN, compare, family, load
from test_golden_losses import FAMILIES
from torch import Tensor, nn

from kddata import losses

pytestmark = NEEDS_GOLDEN

HYPER = {"rkd_mdistiller": ("distance_weight", "angle_weight"), "pkt": ("eps",), "ab_repdistiller": ("margin",)}
OF_EMBEDDINGS: dict[str, Callable[..., Tensor]] = {
    "rkd_distance": losses.rkd_distance_loss,
    "rkd_angle": losses.rkd_angle_loss,
    "rkd_mdistiller": losses.rkd_loss,
    "pkt": losses.pkt_loss,
    "sp_vec": lambda s, t: losses.sp_loss([s], [t]),
    "cc": losses.cc_loss,
}


def fsp(s: list[Tensor], t: list[Tensor]) -> Tensor:
    return losses.fsp_loss([losses.fsp_matrix(*s)], [losses.fsp_matrix(*t)])


OF_MAPS: dict[str, Callable[..., Tensor]] = {
    "at_mdistiller": losses.at_loss,
    "at_original": losses.at_loss,
    "at_zoo_abs_p2": lambda s, t: losses.at_loss(s, t, eps=1e-6),
    "sp_mdistiller": losses.sp_loss,
    "sp_last": lambda s, t: losses.sp_loss(s[-1:], t[-1:]),
    "nst_mdistiller": losses.nst_loss,
    "fsp_repdistiller": fsp,
    "fsp_zoo": fsp,
    "hint_mse_last": lambda s, t: losses.fitnets_loss(s[-1], t[-1]),
    "ab_repdistiller": losses.ab_loss,
    "ft_repdistiller": lambda s, t: losses.ft_loss(s[-1], t[-1]),
    "reviewkd_hcl": losses.reviewkd_loss,
    "srrl_statm": lambda s, t: losses.feature_mean_loss(s[-1], t[-1]),
}


def entries(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(e, id=e["file"]) for e in INDEX if family(e) in table]


def stated(entry: dict[str, Any], *names: str) -> dict[str, float]:
    """Hyper-parameters that an index names in the text of the reference's call."""
    found = dict(re.findall(r"(\w+)=([-+.\de]+)", entry["function"]))
    return {name: float(found[name]) for name in names if name in found}


def arrays(name: str) -> dict[str, Tensor]:
    """Those of a file that stands alone; skips where the folder has none."""
    if not any(e["file"] == f"{name}.npz" for e in INDEX):
        pytest.skip(f"this folder has no {name}.npz")
    return {key: torch.from_numpy(np.asarray(x)) for key, x in load(f"{name}.npz").items()}


def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


@pytest.mark.parametrize("entry", entries(OF_EMBEDDINGS))
def test_loss_on_embeddings(entry: dict[str, Any]) -> None:
    inputs, outputs = load(entry["inputs"]), load(entry["file"])
    x = torch.from_numpy(inputs["student_emb"]).requires_grad_()
    hyper = stated(entry, *HYPER.get(family(entry), ()))
    loss = OF_EMBEDDINGS[family(entry)](x, torch.from_numpy(inputs["teacher_emb"]), **hyper)
    compare(loss, x, outputs["loss"], outputs["grad_student"])


@pytest.mark.parametrize("entry", entries(OF_MAPS))
def test_loss_on_maps(entry: dict[str, Any]) -> None:
    inputs, outputs = load(entry["inputs"]), load(entry["file"])
    student = [torch.from_numpy(inputs[f"student_map_{i}"]).requires_grad_() for i in (0, 1)]
    teacher, hyper = ([torch.from_numpy(inputs[f"teacher_map_{i}"]) for i in (0, 1)]), HYPER.get(family(entry), ())
    loss = OF_MAPS[family(entry)](student, teacher, **stated(entry, *hyper))
    for i in (0, 1):
        if f"grad_student_{i}" in outputs:
            compare(loss + 0 * student[i].sum(), student[i], outputs["loss"], outputs[f"grad_student_{i}"])


@pytest.mark.parametrize("entry", entries({"fsp_matrices": None}))
def test_fsp_matrices(entry: dict[str, Any]) -> None:
    """Ours is [first, second]; one reference has the transpose."""
    inputs, outputs = load(entry["inputs"]), load(entry["file"])
    ours = losses.fsp_matrix(*(torch.from_numpy(inputs[f"teacher_map_{i}"]) for i in (0, 1))).numpy()
    np.testing.assert_allclose(ours.transpose(0, 2, 1), outputs["out_repdistiller_teacher_0"], rtol=1e-9)
    if len(outputs["out_zoo_teacher_01"]):  # it has none for maps of two sizes
        np.testing.assert_allclose(ours, outputs["out_zoo_teacher_01"], rtol=1e-9)


def test_fitnets_regressor() -> None:
    data = arrays("fitnet_convreg")
    x = data["student_map"].requires_grad_()
    regressor = losses.HintRegressor(x.shape[1], data["teacher_map"].shape[1]).double()
    values = {name.removeprefix("param_"): value for name, value in data.items() if name.startswith("param_")}
    fill(regressor, values)
    found, teacher = regressor(x, data["teacher_map"])
    np.testing.assert_allclose(found.detach().numpy(), data["out_regressed"], rtol=1e-9, atol=1e-12)
    loss = losses.fitnets_loss(found, teacher)
    compare(loss, x, data["loss"], data["grad_student"])
    for name, parameter in regressor.named_parameters():
        (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        np.testing.assert_allclose(grad.numpy(), data[f"grad_param_{name}"], rtol=1e-7, atol=1e-10)


def test_vid() -> None:
    data = arrays("vid")
    x = data["student_map"].requires_grad_()
    regressor = losses.VariationalRegressor(x.shape[1], data["teacher_map"].shape[1]).double()
    layers = {f"mean.{2 * i}.weight": data[f"w{i}"] for i in range(3)}
    fill(regressor, layers | {"log_scale": data["log_scale"]})
    loss = regressor(x, data["teacher_map"])
    compare(loss, x, data["loss"], data["grad_student"])
    (grad,) = torch.autograd.grad(loss, regressor.log_scale)
    np.testing.assert_allclose(grad.numpy(), data["grad_log_scale"], rtol=1e-7, atol=1e-10)


def test_ofd() -> None:
    data = arrays("ofd_feat")
    x = data["student_map"].requires_grad_()
    loss = losses.ofd_loss(x, data["teacher_preact"], data["margin"])
    compare(loss, x, data["loss"], data["grad_student"])


def test_reviewkd_fusion() -> None:
    data = arrays("reviewkd_abf")
    x, teacher = data["student_map"].requires_grad_(), data["teacher_map"]
    stage = losses.Fusion(x.shape[1], data["residual"].shape[1], teacher.shape[1], fuse=True).double()
    names = {"narrow": "conv1", "widen": "conv2", "attention": "att_conv"}
    values = {}
    for name, _ in stage.named_parameters():
        ours, _, rest = name.partition(".")
        values[name] = data[f"param_{names[ours]}.{rest}"]
    fill(stage, values)
    y, residual = stage(x, data["residual"], teacher.shape[-2:])
    np.testing.assert_allclose(y.detach().numpy(), data["out_y"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(residual.detach().numpy(), data["out_x"], rtol=1e-9, atol=1e-12)
    compare(losses.reviewkd_loss([y], [teacher]), x, data["loss"], data["grad_student"])


def test_srrl() -> None:
    data = arrays("srrl_cls_kd")
    x, z = data["student_map_connected"].requires_grad_(), data["logits_student_through_teacher_head"].requires_grad_()
    hyper = stated(next(e for e in INDEX if family(e) == "srrl_cls_kd"), "alpha", "beta")
    loss = losses.srrl_loss(x, data["teacher_map"], z, data["teacher_logits"], **hyper)
    compare(loss, x, data["loss"], data["grad_student_map"])
    compare(loss, z, data["loss"], data["grad_logits"])


def test_crd() -> None:
    """The reference rounds its temperature, momentum and scale of scores to float32."""
    data = arrays("crd")
    x, num_rows, width = data["student_emb"].requires_grad_(), int(data["n_data"]), len(data["ws"])
    bank = losses.ContrastiveBank(
        x.shape[1],
        data["teacher_emb"].shape[1],
        num_rows=num_rows,
        width=width,
        negatives=int(data["K"]),
        temperature=float(data["temperature"].float()),
        momentum=float(data["momentum"].float()),
    ).double()
    embeds = {"embed_student.weight": "ws", "embed_student.bias": "bs"}
    embeds |= {"embed_teacher.weight": "wt", "embed_teacher.bias": "bt"}
    fill(bank, {ours: data[theirs] for ours, theirs in embeds.items()})
    bank.student_bank_ND.copy_(data["memory_v1_before"])
    bank.teacher_bank_ND.copy_(data["memory_v2_before"])
    rows = data["index"]
    others = data["contrast_index"]
    assert torch.equal(others[:, 0], rows)
    bank.eval()  # finds the scale of scores, and leaves the bank as it was
    bank(x, data["teacher_emb"], rows, others[:, 1:])
    own_scale = bank.normaliser_2.float().numpy()
    bank.normaliser_2.copy_(data["out_Z"])
    bank.train()
    loss = bank(x, data["teacher_emb"], rows, others[:, 1:])
    compare(loss, x, data["loss"], data["grad_student"])
    np.testing.assert_allclose(own_scale, data["out_Z"], rtol=1e-6)
    for parameter, name in ((bank.embed_student.weight, "grad_ws"), (bank.embed_teacher.weight, "grad_wt")):
        (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        np.testing.assert_allclose(grad.numpy(), data[name], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(bank.student_bank_ND.numpy(), data["out_memory_v1_after"], rtol=1e-9)
    np.testing.assert_allclose(bank.teacher_bank_ND.numpy(), data["out_memory_v2_after"], rtol=1e-9)


def test_boundary_samples() -> None:
    data = arrays("bss_attack")

    def teacher(x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, data["conv_w"], data["conv_b"], padding=1).tanh()
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ data["fc_w"].T + data["fc_b"]

    np.testing.assert_allclose(teacher(data["images"]).numpy(), data["out_clean_logits"], rtol=1e-9)
    steps = {"step_size": float(data["step_alpha"]), "num_steps": int(data["num_steps"])}
    moved = losses.boundary_samples(teacher, data["images"], data["attack_class"], **steps)
    np.testing.assert_allclose(moved.numpy(), data["out_adversarial"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(teacher(moved).numpy(), data["out_adversarial_logits"], rtol=1e-7, atol=1e-10)


ALONE = {  # families that a test of their own holds
    "bss_attack",
    "crd",
    "ctkd_global_T",
    "fitnet_convreg",
    "fsp_matrices",
    "gnosis_ensemble",
    "label_noise_imbalance",  # test_golden_corruption.py
    "metrics",  # test_golden_metrics.py
    "ofd_feat",
    "reviewkd_abf",
    "sparse_kl_distillkit",
    "srrl_cls_kd",
    "stress_reference_numerics",
    "vid",
}
NOT_MAPPED: dict[str, str] = {}  # family: why our losses cannot give its numbers


def test_every_family_is_mapped(capsys: pytest.CaptureFixture[str]) -> None:
    families = {family(e) for e in INDEX if e["kind"] != "inputs"}
    mapped = FAMILIES.keys() | OF_EMBEDDINGS.keys() | OF_MAPS.keys() | ALONE
    counts = f"{len(families & mapped)} of {len(families)} families, {len(INDEX)} files"
    with capsys.disabled():
        sys.stdout.write(f"\ngolden vectors: {counts}\n")
        for name, reason in NOT_MAPPED.items():
            sys.stdout.write(f"  not mapped: {name}: {reason}\n")
    assert families <= mapped | NOT_MAPPED.keys()


def test_the_table_of_methods_says_which_are_held_to_golden_vectors() -> None:
    """A method whose row says so has a family of its name here; one that says no has none."""
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    mapped = FAMILIES.keys() | OF_EMBEDDINGS.keys() | OF_MAPS.keys() | ALONE
    families = mapped & {family(e) for e in INDEX}
    named = {"hard": "gnosis_hard_ce", "fitnets": "fitnet_convreg"}
    for row in rows:
        method, golden = row[0].strip("`"), row[8]
        own = any(name.partition("_")[0] == method for name in families) or named.get(method) in families
        assert (golden in ("yes", "terms")) == own, method
