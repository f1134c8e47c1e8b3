from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nnunet_diffusion.evaluation.comparison import (
    bootstrap_interval,
    compare_paired,
    comparison_table,
    markdown_table,
    wilcoxon_p,
)


def exact_wilcoxon_p(difference: list[float]) -> float:
    """Two-sided p by enumerating every sign of distinct ranks."""
    ranks = np.argsort(np.argsort(np.abs(difference))) + 1
    observed = sum(rank for rank, value in zip(ranks, difference, strict=True) if value > 0)
    sums = [sum(np.compress(signs, ranks)) for signs in itertools.product([0, 1], repeat=len(ranks))]
    tail = min(np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed))
    return min(1.0, 2 * float(tail))


def test_statistics_of_four_known_pairs() -> None:
    comparison = compare_paired([0.9, 0.8, 0.7, 0.4], [0.8, 0.8, 0.5, 0.5])
    assert comparison.cases == 4
    assert comparison.candidate_mean == pytest.approx(0.7)
    assert comparison.baseline_mean == pytest.approx(0.65)
    assert (comparison.candidate_median, comparison.baseline_median) == (0.75, 0.65)
    assert comparison.mean_difference == pytest.approx(0.05)
    assert comparison.interval[0] < comparison.mean_difference < comparison.interval[1]


def test_undefined_and_infinite_pairs_are_dropped_and_counted() -> None:
    comparison = compare_paired([1.0, math.nan, 3.0, math.inf, 5.0], [0.5, 1.0, math.nan, 2.0, 4.0])
    assert (comparison.cases, comparison.undefined, comparison.infinite) == (2, 2, 1)
    assert comparison.candidate_mean == 3.0
    assert comparison.mean_difference == 0.75


def test_no_pairs_gives_nan() -> None:
    comparison = compare_paired([math.nan], [1.0])
    assert comparison.cases == 0
    values = (comparison.mean_difference, comparison.p_value, *comparison.interval, comparison.baseline_median)
    assert all(math.isnan(value) for value in values)


def test_equal_models_do_not_differ() -> None:
    comparison = compare_paired([0.3, 0.6, 0.9], [0.3, 0.6, 0.9])
    assert (comparison.mean_difference, comparison.interval, comparison.p_value) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_wilcoxon_equals_enumeration(seed: int) -> None:
    difference = list(np.random.default_rng(seed).normal(0.4, 1, size=9))
    assert wilcoxon_p(difference) == pytest.approx(exact_wilcoxon_p(difference), abs=1e-12)


def test_wilcoxon_drops_zero_differences() -> None:
    difference = np.random.default_rng(5).normal(size=30)
    with_zeros = np.concatenate([difference, np.zeros(7)])
    assert wilcoxon_p(with_zeros) == wilcoxon_p(difference) == stats.wilcoxon(difference).pvalue


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=40)
    mine = bootstrap_interval(values, seed=3)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    # The standard error of a 2.5 % quantile of 10 000 normal means is about 0.027 of their standard deviation.
    tolerance = 6 * 0.027 * values.std() / math.sqrt(values.size)
    assert mine == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_bootstrap_of_two_values_is_their_range() -> None:
    # Resamples of {0, 1} have means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval([2.0]) == (2.0, 2.0)


def test_bootstrap_is_set_by_its_seed_and_covers() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=25)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    hits = [
        low <= 0 <= high
        for low, high in (bootstrap_interval(generator.normal(size=50), resamples=500) for _ in range(200))
    ]
    # Nominal 0.95 (a little less for 50 cases); four standard errors of 200 draws are 0.06.
    assert np.mean(hits) == pytest.approx(0.94, abs=0.065)


def test_tables_have_one_row_each_and_dashes_for_nan() -> None:
    table = comparison_table({"PD-DDPM": compare_paired([1.0, 2.0], [0.5, 1.0]), "none": compare_paired([], [])})
    lines = table.splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert lines[2].startswith("| PD-DDPM | 2 | 0 | 1.5000 | 1.5000 | +0.7500 | +0.5000 to +1.0000 |")
    assert lines[3] == "| none | 0 | 0 | - | - | - | - | - |"


def test_markdown_table_escapes_and_checks() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
    with pytest.raises(ValueError, match="has 1 cells, the header has 2"):
        markdown_table(["a", "b"], [["x"]])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"candidate \(2,\) and baseline \(3,\)"):
        compare_paired([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="resamples must be >= 1"):
        bootstrap_interval([1.0], resamples=0)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0], confidence=1.0)


def test_a_missed_structure_is_no_advantage() -> None:
    """The candidate halves seven distances and misses two structures that the baseline finds; one both miss."""
    baseline = np.array([8.0] * 9 + [np.inf])
    candidate = np.array([4.0 - 0.1 * n for n in range(7)] + [np.inf, np.inf, np.inf])
    found = compare_paired(candidate, baseline)
    assert (found.cases, found.infinite, found.candidate_infinite, found.baseline_infinite) == (7, 3, 3, 1)
    assert found.mean_difference < 0
    dropped = compare_paired(candidate[:7], baseline[:7])
    assert dropped.mean_difference == found.mean_difference
    assert dropped.p_value < 0.05 < found.p_value
    # the same ranks with finite distances, larger than all others
    finite = np.where(np.isinf(candidate[:9]), 1000.0, candidate[:9])
    assert found.p_value == pytest.approx(compare_paired(finite, baseline[:9]).p_value)
