"""The temperature undoes over- and underconfidence, measured on cases that did not choose it."""

import numpy as np
import pytest
import torch

from nnunet_diffusion.evaluation import calibration
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase
from nnunet_diffusion.evaluation.temperature import fit, fit_sums, sums_of


def cases_of(temperature, number=4, voxels=20_000):
    """Sums of cases whose labels are drawn from their probabilities, which are then tempered."""
    sums = []
    for seed in range(number):
        generator = np.random.default_rng(seed)
        true = generator.dirichlet((1.0, 1.0), voxels).T
        labels = (generator.random(voxels) > true[0]).astype(int)
        sums.append(calibration.tempering(calibration.tempered(true, temperature), labels))
    return sums


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_fit_is_the_inverse_and_calibrates_unseen_cases(temperature):
    found = fit_sums(cases_of(temperature), list("abcd"))
    assert found.temperature * temperature == pytest.approx(1, rel=0.1)
    assert found.ece[1] < 0.02
    if temperature != 1:
        assert found.ece[1] < found.ece[0] / 3
        assert found.nll[1] < found.nll[0]
    assert "temperature of the other half" in found.table()


def test_cases_without_a_border_or_a_partner_are_refused():
    empty = calibration.tempering(np.zeros((2, 0)), np.zeros(0, int))
    with pytest.raises(ValueError, match="nothing to calibrate"):
        fit_sums([empty, empty], ["a", "b"])
    with pytest.raises(ValueError, match="got 1 cases"):
        fit({}, [("0", "a")], lambda name: None)


@pytest.mark.nnunet
def test_sums_are_those_of_the_prediction_near_borders(loaded):
    predictor, cases, load = loaded(None)
    case = load(cases[0])
    found = sums_of(predictor, case)
    logits = predictor.predict_volume(torch.from_numpy(case.image)).logits
    one = calibration.TEMPERATURES.index(1.0)
    everywhere = calibration.reliability(logits.softmax(0).numpy().reshape(3, -1), np.maximum(case.truth, 0).ravel())
    assert 0 < found.reliability[one].voxels.sum() <= everywhere.voxels.sum()
    # with nothing but borders all voxels count
    stripes = np.zeros(case.truth.shape, case.truth.dtype)
    stripes[..., ::2] = 1
    found = sums_of(predictor, PreprocessedCase(case.name, case.image, stripes))
    expected = calibration.tempering(logits.softmax(0).numpy().reshape(3, -1), stripes.ravel())
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
