"""Label noise and class imbalance against Co-teaching, Hendrycks et al. and LDAM-DRW."""

import os
from pathlib import Path

import numpy as np
import pytest

from kddata.corruption import ClassImbalance, LabelNoise

GOLDEN = Path(os.environ.get("KDDATA_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))
FILE = GOLDEN / "label_noise_imbalance.npz"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"no {FILE.name} in {GOLDEN}")


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


@pytest.mark.parametrize("factor", [0.1, 0.02, 0.01])
@pytest.mark.parametrize(("kind", "name"), [("exponential", "exp"), ("step", "step")])
def test_class_counts_are_those_of_ldam(data, kind, name, factor) -> None:
    counts = ClassImbalance(kind=kind, ratio=round(1 / factor)).counts_C(5000, 10)
    np.testing.assert_array_equal(counts, data[f"out_ldam_{name}_{factor}"])


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6])
def test_uniform_noise_has_the_matrix_of_hendrycks(data, rate) -> None:
    ours = LabelNoise(rate=rate, convention="uniform").transition_CC(10)
    np.testing.assert_allclose(ours, data[f"out_hendrycks_uniform_T_{rate}"], rtol=1e-12)


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6])
def test_flip_noise_is_that_of_co_teaching(data, rate) -> None:
    """Both are draws of one matrix: every share lies within five standard deviations of it."""
    noise, clean = LabelNoise(rate=rate, seed=1), data["clean"]
    ours = noise.labels([f"{i}" for i in range(len(clean))], clean, 10)
    matrix, sizes = noise.transition_CC(10), np.bincount(clean)
    slack = 5 * np.sqrt(matrix * (1 - matrix) / sizes[:, None])
    for noisy in (ours, data[f"out_coteaching_symmetric_{rate}"]):
        found = np.array([np.bincount(noisy[clean == c], minlength=10) / sizes[c] for c in range(10)])
        assert (abs(found - matrix) <= slack).all()
