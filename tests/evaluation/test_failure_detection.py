"""Risk and coverage of scores that know all, nothing, or the opposite."""

import itertools

import numpy as np
import pytest

from nnunet_diffusion.evaluation.failure_detection import area_under, failure_detection, risk_coverage

RISKS = np.array([0.1, 0.4, 0.2, 0.9, 0.3])


def test_a_score_that_knows_the_risk_is_optimal():
    found = failure_detection(-RISKS, RISKS)
    assert found.aurc == found.optimal
    assert found.normalised == 1
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(1)


def test_a_constant_score_is_as_good_as_chance():
    found = failure_detection(np.ones(5), RISKS)
    assert found.aurc == pytest.approx(RISKS.mean())
    assert found.normalised == pytest.approx(0)
    assert np.isnan(found.spearman)


def test_the_opposite_of_the_risk_is_worse_than_chance():
    assert failure_detection(RISKS, RISKS).normalised < 0


def test_ties_count_as_the_mean_over_their_orders():
    scores, risks = np.array([3.0, 2.0, 2.0, 1.0]), np.array([0.1, 0.2, 0.6, 0.3])
    orders = [[0, *middle, 3] for middle in itertools.permutations((1, 2))]
    expected = np.mean([risks[order].cumsum() / np.arange(1, 5) for order in orders], axis=0)
    assert risk_coverage(scores, risks) == pytest.approx(expected)


def test_area_by_hand():
    # flat up to the first case, then trapezoids
    assert area_under(np.array([0.2, 0.4])) == pytest.approx(0.5 * 0.2 + 0.5 * 0.3)
    assert area_under(np.array([0.7])) == pytest.approx(0.7)


def test_equal_risks_leave_nothing_to_find():
    assert np.isnan(failure_detection(RISKS, np.full(5, 0.3)).normalised)


@pytest.mark.parametrize(("score", "risk"), [([1.0], [1.0, 2.0]), ([], []), ([np.nan, 1.0], [0.0, 1.0])])
def test_bad_input_is_refused(score, risk):
    with pytest.raises(ValueError, match="score"):
        failure_detection(score, risk)
