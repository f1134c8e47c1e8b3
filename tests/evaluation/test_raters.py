"""Metrics against several raters, by hand, by brute force and by numeric integration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from nnunet_diffusion.evaluation import raters
from nnunet_diffusion.evaluation.metrics import dice


def random_masks(number, seed, shape=(3, 4, 5), share=0.4):
    return np.random.default_rng(seed).random((number, *shape)) < share


def brute_iou(first, second):
    a, b = set(np.flatnonzero(first)), set(np.flatnonzero(second))
    return len(a & b) / len(a | b) if a | b else 1.0


EMPTY = np.zeros((4, 4), bool)
LEFT, RIGHT = np.arange(4)[None].repeat(4, 0) < 2, np.arange(4)[None].repeat(4, 0) >= 2


@pytest.mark.parametrize("metric", [raters.consensus_dice, raters.staple_dice])
def test_one_rater_gives_plain_dice(metric):
    prediction, rater = random_masks(2, seed=0)
    assert metric(prediction, [rater]) == dice(prediction, rater)


@pytest.mark.parametrize(
    "metric", [raters.consensus_dice, raters.staple_dice, raters.soft_dice_over_thresholds],
)  # fmt: skip
def test_prediction_that_equals_every_rater_scores_one_and_one_beside_them_zero(metric):
    assert metric(LEFT, [LEFT, LEFT, LEFT]) == 1
    assert metric(RIGHT, [LEFT, LEFT, LEFT]) == 0


def test_consensus_dice_ignores_the_voxels_that_raters_dispute():
    narrow, wide = LEFT & (np.arange(4) < 1), LEFT
    for prediction in (narrow, wide):
        assert raters.consensus_dice(prediction, [narrow, wide]) == 1
    # 4 voxels agreed inside, 8 agreed outside of which 4 are predicted: 2 * 4 / (4 + 8)
    assert raters.consensus_dice(np.arange(4)[None].repeat(4, 0) < 3, [narrow, wide]) == pytest.approx(2 / 3)


def test_consensus_dice_of_raters_who_agree_nowhere_is_undefined():
    assert math.isnan(raters.consensus_dice(LEFT, [LEFT, RIGHT]))
    assert math.isnan(raters.consensus_dice(EMPTY, [EMPTY, EMPTY]))


def test_soft_dice_by_hand():
    """Shares of the raters 1, 2/3, 1/3, 0; a voxel is inside above the threshold only, and two empty masks agree."""
    masks = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    probability = np.array([0.9, 0.6, 0.5, 0.2])
    # inside, prediction: 4, 2, 0; raters: 3, 2, 0
    assert raters.soft_dice_over_thresholds(probability, masks, (0.1, 0.55, 1.0)) == pytest.approx((6 / 7 + 1 + 1) / 3)
    assert raters.soft_dice_over_thresholds(probability, masks, (0.6,)) == pytest.approx(2 / 3)


def test_the_mean_of_the_raters_is_a_perfect_probability_and_equal_to_a_threshold_is_outside():
    masks = random_masks(5, seed=1)
    share = masks.mean(0)
    assert raters.soft_dice_over_thresholds(share, masks) == 1
    assert raters.soft_dice_over_thresholds(share, masks, (0.8,)) == raters.soft_dice_over_thresholds(
        share == 1, masks, (0.8,)
    )
    assert raters.soft_dice_over_thresholds(np.zeros((4, 4)), [EMPTY, EMPTY]) == 1


def test_staple_follows_the_raters_who_agree():
    square, shifted = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    square[5:15, 5:15], shifted[8:18, 5:15] = True, True
    assert raters.staple_dice(square, [square, square, shifted]) == 1
    assert raters.staple_dice(shifted, [square, square, shifted]) == dice(shifted, square)


def test_the_curvas_score_of_a_volume_saturates():
    volumes = [90, 110]  # mean 100, standard deviation 10
    assert raters.crps(1000, volumes, "curvas") == pytest.approx(24.4, abs=0.05)
    assert raters.crps(1e6, volumes, "curvas") == pytest.approx(raters.crps(1000, volumes, "curvas"))
    assert raters.crps(1000, volumes, "exact") == pytest.approx(894, abs=0.5)


@pytest.mark.parametrize("predicted", [-5.0, 20.0, 31.0, 33.0, 47.5, 90.0])
@pytest.mark.parametrize("kind", raters.CRPS_KINDS)
def test_crps_is_the_integral_of_the_squared_difference(kind, predicted):
    volumes = [30.0, 31.0, 38.0]
    mean, deviation = np.mean(volumes), np.sqrt(np.mean((volumes - np.mean(volumes)) ** 2))
    reach = 3 if kind == "curvas" else 40
    low, high = mean - reach * deviation, mean + reach * deviation
    middle = min(max(predicted, low), high)
    expected = quad(lambda v: norm.cdf(v, mean, deviation) ** 2, low, middle, points=[mean - deviation])[0]
    expected += quad(lambda v: norm.sf(v, mean, deviation) ** 2, middle, high, points=[mean + deviation])[0]
    assert raters.crps(predicted, volumes, kind) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("kind", raters.CRPS_KINDS)
def test_crps_of_raters_of_one_volume_is_the_absolute_difference(kind):
    assert raters.crps(70.0, [0.1 * 3] * 3, kind) == pytest.approx(69.7)
    assert raters.crps(70.0, [100.0], kind) == 30


def test_iou_matrix_agrees_with_loops_over_several_chunks(monkeypatch):
    monkeypatch.setattr(raters, "CHUNK_VOXELS", 7)
    first, second = random_masks(3, seed=2), random_masks(4, seed=3)
    first[0] = second[1] = False
    expected = [[brute_iou(one, other) for other in second] for one in first]
    assert np.allclose(raters.iou_matrix(first, second), expected, rtol=1e-12)


def test_energy_distance_agrees_with_a_double_loop():
    samples, masks = random_masks(5, seed=4), random_masks(3, seed=5)
    samples[2] = masks[0] = False

    def expected_distance(one, other):
        return np.mean([1 - brute_iou(a, b) for a in one for b in other])

    expected = 2 * expected_distance(samples, masks) - expected_distance(samples, samples)
    expected -= expected_distance(masks, masks)
    assert raters.generalized_energy_distance(samples, masks) == pytest.approx(expected)


def test_energy_distance_is_zero_for_equal_frequencies_and_two_for_disjoint_certainties():
    masks = random_masks(2, seed=6)
    assert raters.generalized_energy_distance(masks[[0, 1, 0, 0, 1, 0]], masks[[0, 0, 1]]) == pytest.approx(0)
    assert raters.generalized_energy_distance(masks[[0, 1]], masks[[0, 0, 1]]) > 0
    assert raters.generalized_energy_distance([LEFT], [RIGHT]) == 2
    assert raters.generalized_energy_distance([EMPTY, EMPTY], [EMPTY]) == 0


@pytest.mark.parametrize(("samples", "number"), [(3, 3), (2, 4), (2, 3), (1, 4)])
def test_hungarian_iou_is_the_best_of_all_matchings(samples, number):
    first, second = random_masks(samples, seed=7), random_masks(number, seed=8)
    first[0] = second[0] = False
    common = math.lcm(samples, number)
    repeated = [mask for mask in first for _ in range(common // samples)]
    others = [mask for mask in second for _ in range(common // number)]
    pairs = [[brute_iou(one, other) for other in others] for one in repeated]
    best = max(
        np.mean([pairs[row][column] for row, column in enumerate(order)])
        for order in itertools.permutations(range(common))
    )
    assert raters.hungarian_iou(first, second) == pytest.approx(best)


def test_interrater_dice_is_the_mean_over_pairs_without_those_of_empty_masks():
    one, two, three = random_masks(3, seed=9)
    expected = np.mean([dice(one, two), dice(one, three), dice(two, three)])
    assert raters.interrater_dice([one, two, three]) == pytest.approx(expected)
    assert raters.interrater_dice([EMPTY, EMPTY, LEFT]) == 0
    assert math.isnan(raters.interrater_dice([EMPTY, EMPTY]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: raters.interrater_dice([LEFT]), "two or more raters"),
        (lambda: raters.consensus_dice(LEFT, []), "rater_masks has no mask"),
        (lambda: raters.consensus_dice(LEFT[:2], [LEFT]), r"\(2, 4\).*\(4, 4\)"),
        (lambda: raters.staple_dice(LEFT[:2], [LEFT]), r"\(2, 4\).*\(4, 4\)"),
        (lambda: raters.soft_dice_over_thresholds(LEFT[:2], [LEFT]), r"\(2, 4\).*\(4, 4\)"),
        (lambda: raters.soft_dice_over_thresholds(LEFT, [LEFT], ()), "thresholds is empty"),
        (lambda: raters.hungarian_iou([LEFT], [LEFT, LEFT[:2]]), r"rater_masks.*\(2, 4\), \(4, 4\).*one grid"),
        (lambda: raters.generalized_energy_distance([LEFT[:2]], [LEFT]), r"\(2, 4\).*\(4, 4\)"),
        (lambda: raters.crps(1.0, []), "at least one"),
        (lambda: raters.crps(1.0, [2.0], "wide"), "kind is 'wide'; known: exact, curvas"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
