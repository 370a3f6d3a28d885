"""Our metrics against gnosis, temperature_scaling, torchmetrics, scikit-learn and netcal on the same logits."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kddata.evaluation import calibration_error, score

GOLDEN = Path(os.environ.get("KDDATA_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))
INDEX = json.loads((GOLDEN / "index.json").read_text()) if (GOLDEN / "index.json").is_file() else []
FILES = [entry["file"] for entry in INDEX if entry["kind"] == "metrics"]

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden metrics in {GOLDEN}")

# name of a reference's output: (ours, rtol). References that accumulate in float32 agree to 1e-5.
OUTPUTS = {
    "out_gnosis_top1_agreement": ("agreement", 1e-5),
    "out_torchmetrics_agreement_micro": ("agreement", 1e-5),
    "out_gnosis_predictive_kl": ("kl", 1e-9),
    "out_gnosis_ece_15bins": ("ece", 1e-5),
    "out_tempscale_ece_15bins": ("ece", 1e-5),
    "out_torchmetrics_calibration_l1_15bins": ("ece", 1e-5),
    "out_netcal_ece_15bins": ("ece", 1e-9),
    "out_torchmetrics_top1_micro": ("top1", 1e-5),
    "out_torchmetrics_top5_micro": ("top5", 1e-5),
    "out_sklearn_brier_sum": ("brier", 1e-9),
    "out_torch_nll": ("nll", 1e-9),
    "out_gnosis_ece_10bins": ("ece10", 1e-5),
    "out_tempscale_ece_teacher_15bins": ("teacher_ece", 1e-5),
}


@pytest.mark.parametrize("file", FILES)
def test_metrics(file: str) -> None:
    with np.load(GOLDEN / file) as data:
        data = dict(data)
    student, teacher = torch.from_numpy(data["student_logits"]), torch.from_numpy(data["teacher_logits"])
    target = torch.from_numpy(data["target"])
    scores = score(student, target, teacher)
    ours = scores.summary()
    ours["ece10"] = calibration_error(scores.confidence, scores.top1, bins=10)
    ours["teacher_ece"] = score(teacher, target).summary()["ece"]
    compared = [name for name in OUTPUTS if name in data and np.isfinite(data[name])]
    assert len(compared) >= 7
    for name in compared:
        key, rtol = OUTPUTS[name]
        np.testing.assert_allclose(ours[key], float(data[name]), rtol=rtol, atol=1e-12, err_msg=name)
