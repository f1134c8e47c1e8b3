"""Intervals of a volume between level sets: counts, the rule of split conformal prediction, and their coverage."""

import math

import numpy as np
import pytest
import torch

from nnunet_diffusion.inference.level_sets import (
    HALF_WIDTHS,
    bounds,
    conformal,
    fewest_cases,
    level_sets,
    needed,
)
from nnunet_diffusion.inference.uncertainty import Uncertainty, numbers_of

WHOLE_IMAGE = len(HALF_WIDTHS) - 1


def test_sets_are_those_of_comparing_each_voxel(monkeypatch):
    monkeypatch.setattr("nnunet_diffusion.inference.level_sets.VOXELS_AT_ONCE", 100)
    random = np.random.default_rng(0)
    probabilities = random.beta(0.3, 0.3, (2, 7, 9, 11)).astype(np.float32)
    probabilities[0, 0, 0, :3] = 0, 0.5, 1
    sets = level_sets(torch.from_numpy(probabilities))
    assert sets.shape == (2, 2, len(HALF_WIDTHS))
    for head, values in enumerate(probabilities.astype(np.float64)):
        for place, width in enumerate(HALF_WIDTHS[:-1]):
            upper = 1 / (1 + math.exp(-width))
            assert sets[head, 0, place] == (values > upper).sum()
            assert sets[head, 1, place] == (values >= 1 - upper).sum()
    assert sets[:, 0, -1].tolist() == [0, 0]
    assert sets[:, 1, -1].tolist() == [7 * 9 * 11] * 2


@pytest.mark.parametrize("true", [0, 1, 40, 99, 100])
def test_needed_is_the_log_odds_of_the_voxels_at_the_true_volume(true):
    values = np.sort(np.random.default_rng(1).uniform(0.001, 0.999, 100))[::-1].astype(np.float32)
    sets = level_sets(torch.from_numpy(values.copy())[None])[0]
    # the upper level must leave out the voxel after the true volume, the lower one must take the last voxel in
    after = math.log(values[true] / (1 - values[true])) if true < 100 else 0.0
    last = -math.log(values[true - 1] / (1 - values[true - 1])) if true else 0.0
    expected = max(0.0, after, last)
    assert HALF_WIDTHS[needed(sets, true)] == next(width for width in HALF_WIDTHS if width >= expected)


def test_a_volume_that_no_level_holds_needs_the_whole_image():
    sets = level_sets(torch.zeros(1, 50))[0]
    assert needed(sets, 0) == 0
    assert needed(sets, 1) == WHOLE_IMAGE
    assert bounds(sets, HALF_WIDTHS[WHOLE_IMAGE]) == (0, 50)


def test_conformal_takes_the_rank_of_the_rule():
    assert fewest_cases() == 9
    assert conformal([1] * 8) == WHOLE_IMAGE
    assert conformal(list(range(9))) == 8
    assert conformal(list(range(10))) == 9  # the 10th of 10, ceil(11 x 0.9)
    assert conformal(list(range(19))) == 17  # the 18th of 19: 20 x 0.9 is whole
    assert conformal([5, 3, 1], coverage=0.5) == 3


def test_intervals_cover_nine_of_ten_new_cases_whatever_the_probabilities_say():
    """Overconfident probabilities of borders that move as a whole: the truth is a level set of other probabilities."""
    random = np.random.default_rng(2)
    distance = np.linspace(-4, 4, 400)

    def case():
        shift, error = random.normal(0, 0.3), random.logistic()
        overconfident = 1 / (1 + np.exp(-3 * (distance - shift)))
        true = int((distance - shift + error * 0.5 > 0).sum())
        return level_sets(torch.from_numpy(overconfident.astype(np.float32))[None])[0], true

    covered = []
    for _ in range(60):
        chosen = HALF_WIDTHS[conformal([needed(*case()) for _ in range(19)])]
        for _ in range(20):
            sets, true = case()
            low, high = bounds(sets, chosen)
            covered.append(low <= true <= high)
    # 0.9 to 0.95 by theory; the naive levels 0.05 and 0.95 hold far fewer
    assert 0.88 < np.mean(covered) < 0.97
    naive = []
    for _ in range(300):
        sets, true = case()
        low, high = bounds(sets, math.log(19))
        naive.append(low <= true <= high)
    assert np.mean(naive) < 0.8


def test_numbers_have_the_intervals_of_the_level_sets_where_they_are_fitted():
    probabilities = torch.tensor([[0.9, 0.6, 0.3, 0.1], [0.1, 0.4, 0.7, 0.9]])
    uncertainty = Uncertainty(regions=False)
    for number in range(2):
        uncertainty.add(probabilities, probabilities.argmax(0), 1.0, f"sample {number}")
    found = uncertainty.result(probabilities, (slice(None),))
    assert numbers_of(found, ["lesion"], 2.0)["volume_mm3"]["lesion"] == {
        "mean": 4.0, "low": 4.0, "high": 4.0, "interval": "range of 2 samples",
    }  # fmt: skip
    # log-odds 1: above 0.73 is one voxel, from 0.27 on are three
    assert numbers_of(found, ["lesion"], 2.0, [1.0])["volume_mm3"]["lesion"] == {
        "mean": 4.0, "low": 2.0, "high": 6.0, "interval": "90 %, fitted to validation cases",
    }  # fmt: skip
