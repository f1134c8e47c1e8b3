"""Calibration errors of probabilities whose errors are known."""

import numpy as np
import pytest

from nnunet_diffusion.evaluation.calibration import (
    TEMPERATURES,
    adaptive_calibration_error,
    brier,
    heads_as_classes,
    negative_log_likelihood,
    reliability,
    tempered,
    tempering,
)


def drawn(voxels=200_000, certainty=2.0, temperature=1.0, seed=0):
    """Probabilities (3, N) and labels that are drawn from them; the probabilities are then tempered."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(3, voxels)) * certainty
    true = np.exp(logits) / np.exp(logits).sum(0)
    labels = (generator.random(voxels) > true.cumsum(0)[:-1, :]).sum(0)
    return tempered(true, temperature), labels


def test_labels_drawn_from_the_probabilities_are_calibrated():
    probabilities, labels = drawn()
    # 50 bins of 4000 voxels each have a standard error of about 0.008; its mean absolute value is 0.8 of that
    assert reliability(probabilities, labels).ece() < 0.008
    assert adaptive_calibration_error(probabilities, labels) < 0.006


def test_ece_of_one_confidence_is_its_distance_from_the_share_of_right_voxels():
    probabilities = np.tile([[0.8], [0.2]], 10)
    labels = np.array([0] * 6 + [1] * 4)
    found = reliability(probabilities, labels)
    assert found.ece() == pytest.approx(0.2)
    assert found.voxels.sum() == 10
    assert found.voxels[40] == 10


def test_a_confidence_of_one_is_in_the_last_bin_and_may_be_wrong():
    found = reliability(np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([0, 1]))
    assert found.voxels[-1] == 2
    assert found.ece() == 0.5


def test_ece_agrees_with_loops():
    probabilities, labels = drawn(500)
    confidence, right = probabilities.max(0), probabilities.argmax(0) == labels
    expected = 0.0
    for number in range(50):
        inside = (confidence >= number / 50) & (confidence < (number + 1) / 50)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert reliability(probabilities, labels).ece() == pytest.approx(expected)


def test_sums_of_parts_are_those_of_the_whole():
    probabilities, labels = drawn(1000)
    halves = [reliability(probabilities[:, part], labels[part]) for part in (slice(None, 300), slice(300, None))]
    assert (halves[0] + halves[1]).ece() == pytest.approx(reliability(probabilities, labels).ece())


def test_brier_and_likelihood_by_hand():
    probabilities = np.array([[0.7, 0.1], [0.2, 0.6], [0.1, 0.3]])
    labels = np.array([0, 2])
    assert brier(probabilities, labels) == pytest.approx(((0.09 + 0.04 + 0.01) + (0.01 + 0.36 + 0.49)) / 2)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(-(np.log(0.7) + np.log(0.3)) / 2)


def test_class_wise_error_sees_what_the_most_likely_class_hides():
    """Class 2 is never the most likely one; half of its frequency is missing."""
    probabilities = np.tile([[0.6], [0.3], [0.1]], 100)
    labels = np.array([0] * 60 + [1] * 20 + [2] * 20)
    assert reliability(probabilities, labels).ece() == pytest.approx(0)
    assert adaptive_calibration_error(probabilities, labels, bins=1) == pytest.approx((0 + 0.1 + 0.1) / 3)


def test_nothing_gives_nan():
    probabilities, labels = np.zeros((2, 0)), np.zeros(0, int)
    assert np.isnan(reliability(probabilities, labels).ece())
    assert np.isnan([brier(probabilities, labels), negative_log_likelihood(probabilities, labels)]).all()
    assert np.isnan(adaptive_calibration_error(probabilities, labels))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_best_temperature_undoes_that_of_the_probabilities(temperature):
    probabilities, labels = drawn(temperature=temperature)
    found = tempering(probabilities, labels)
    # tempered twice, the temperatures multiply
    assert TEMPERATURES[found.best()] * temperature == pytest.approx(1, rel=0.1)
    assert found.reliability[found.best()].ece() < 0.01


def test_temperature_one_changes_nothing_and_zero_is_refused():
    probabilities, _ = drawn(10)
    assert tempered(probabilities, 1.0) == pytest.approx(probabilities)
    with pytest.raises(ValueError, match="temperature is 0"):
        tempered(probabilities, 0)


def test_regions_become_classes():
    probabilities, labels = heads_as_classes(
        np.array([[0.9, 0.2], [0.4, 0.3]]), np.array([[True, False], [True, True]])
    )
    assert probabilities[1].tolist() == [0.9, 0.2, 0.4, 0.3]
    assert probabilities.sum(0) == pytest.approx(1)
    assert labels.tolist() == [1, 0, 1, 1]
