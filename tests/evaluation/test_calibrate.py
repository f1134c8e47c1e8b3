"""Temperature and intervals of volumes, fitted to cases whose truth is known."""

import numpy as np
import pytest
import torch

from nnunet_diffusion.evaluation import calibration
from nnunet_diffusion.evaluation.calibrate import CaseSums, fit, fit_sums, sums_of
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase
from nnunet_diffusion.inference.level_sets import HALF_WIDTHS


def cases_of(temperature, number=4, voxels=20_000):
    """Sums of cases whose labels are drawn from their probabilities, which are then tempered."""
    sums = []
    for seed in range(number):
        generator = np.random.default_rng(seed)
        true = generator.dirichlet((1.0, 1.0), voxels).T
        labels = (generator.random(voxels) > true[0]).astype(int)
        sums.append(CaseSums(calibration.tempering(calibration.tempered(true, temperature), labels), [seed]))
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
    empty = CaseSums(calibration.tempering(np.zeros((2, 0)), np.zeros(0, int)), [0])
    with pytest.raises(ValueError, match="nothing to calibrate"):
        fit_sums([empty, empty], ["a", "b"])
    with pytest.raises(ValueError, match="got 1 cases"):
        fit({}, [("0", "a")], lambda name: None)


def test_half_widths_need_nine_cases_and_are_each_class_its_own():
    few = fit_sums(cases_of(1.0, 8, 100), list("abcdefgh"))
    assert few.half_widths == ()
    assert "need 9 cases, and there are 8" in few.about_volumes(["lesion"])
    cases = [CaseSums(each.tempering, [place, 8 - place // 2, 81]) for place, each in enumerate(cases_of(1.0, 9, 100))]
    found = fit_sums(cases, list("abcdefghi"))
    # the ninth of nine, in steps of 1/8
    assert found.half_widths == (1.0, 1.0, 100.0)
    text = found.about_volumes(["lesion", "organ", "vessel"])
    assert "lesion 0.731 and 0.269, organ 0.731 and 0.269, vessel the whole image" in text


@pytest.mark.nnunet
def test_sums_are_those_of_the_prediction_near_borders(loaded):
    predictor, cases, load = loaded(None)
    case = load(cases[0])
    found = sums_of(predictor, case)
    logits = predictor.predict_volume(torch.from_numpy(case.image)).logits
    one = calibration.TEMPERATURES.index(1.0)
    everywhere = calibration.reliability(logits.softmax(0).numpy().reshape(3, -1), np.maximum(case.truth, 0).ravel())
    assert 0 < found.tempering.reliability[one].voxels.sum() <= everywhere.voxels.sum()
    for head, place in enumerate(found.half_widths, 1):
        upper, true = 1 / (1 + np.exp(-HALF_WIDTHS[place])), (case.truth == head).sum()
        probability = logits.softmax(0)[head].numpy()
        assert (probability > upper).sum() <= true <= (probability >= 1 - upper).sum() or place == len(HALF_WIDTHS) - 1
    # with nothing but borders all voxels count
    stripes = np.zeros(case.truth.shape, case.truth.dtype)
    stripes[..., ::2] = 1
    found = sums_of(predictor, PreprocessedCase(case.name, case.image, stripes))
    expected = calibration.tempering(logits.softmax(0).numpy().reshape(3, -1), stripes.ravel())
    assert found.tempering.loss == pytest.approx(expected.loss, rel=1e-4)
