"""Error ranking: perfect, reversed and ignorant maps, and pairs counted one by one."""

import numpy as np
import pytest

from nnunet_diffusion.evaluation.uncertainty import auroc, band


def test_auroc_counts_pairs():
    random = np.random.default_rng(0)
    wrong = random.random(60) < 0.3
    scores = random.integers(0, 8, 60) / 8 + 0.2 * wrong
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[wrong] for b in scores[~wrong]]
    assert auroc(scores, wrong) == pytest.approx(np.mean(pairs))
    assert auroc(wrong.astype(float), wrong) == 1
    assert auroc(-wrong.astype(float), wrong) == 0
    assert auroc(np.ones(60), wrong) == 0.5
    assert np.isnan(auroc(scores, np.zeros(60, bool)))


def test_the_band_lies_on_both_sides_of_both_borders():
    truth, found = np.zeros((40,), int), np.zeros((40,), int)
    truth[10:20] = 1
    found[28:30] = 2
    near = band(found, truth, voxels=2)
    # the voxels on both sides of each border, and two more
    wanted = [*range(7, 13), *range(17, 23), *range(25, 33)]
    assert np.flatnonzero(near).tolist() == wanted
    assert not band(np.zeros(40, int), np.zeros(40, int)).any()
