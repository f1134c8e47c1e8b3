"""Paired comparison of two models over the same cases, and the markdown tables that report it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BOOTSTRAP_CHUNK = 1000
"""Resamples drawn at once. It limits memory to 1000 x cases indices."""


@dataclass(frozen=True)
class PairedComparison:
    """A candidate against a baseline over the cases where both have a finite value.

    Attributes:
        cases: pairs compared.
        undefined: pairs left out because a value is NaN (such as Dice where the reference is empty).
        infinite: pairs left out of means and interval because a value is infinite (such as HD95 where one segmentation is
            empty). In the test they count as the largest differences, so that a missed structure is never an advantage.
        candidate_infinite: infinite values of the candidate.
        baseline_infinite: infinite values of the baseline.
        baseline_mean: mean of the baseline.
        baseline_median: median of the baseline.
        candidate_mean: mean of the candidate.
        candidate_median: median of the candidate.
        mean_difference: mean of candidate - baseline.
        interval: percentile bootstrap interval of that mean (lower, upper).
        p_value: two-sided Wilcoxon signed-rank test; 1.0 where no pair differs.

    Without any pair all statistics are NaN.
    """

    cases: int
    undefined: int
    infinite: int
    baseline_mean: float
    baseline_median: float
    candidate_mean: float
    candidate_median: float
    mean_difference: float
    interval: tuple[float, float]
    p_value: float
    candidate_infinite: int = 0
    baseline_infinite: int = 0


def compare_paired(
    candidate: ArrayLike, baseline: ArrayLike, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> PairedComparison:
    """Compare two models case by case.

    Args:
        candidate: one value per case, (N,); NaN and infinite values allowed.
        baseline: one value per case, (N,), in the same order.
        seed: seed of the bootstrap; the same seed gives the same interval.
        resamples: bootstrap resamples of the cases.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Means, medians, mean difference with its interval, and the Wilcoxon p.

    Raises:
        ValueError: the two arrays do not have the same number of cases, or `resamples` or `confidence` is out of range.
    """
    first, second = np.asarray(candidate, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"candidate {first.shape} and baseline {second.shape} must both be (cases,), in one order")
    undefined = np.isnan(first) | np.isnan(second)
    infinite = ~undefined & (np.isinf(first) | np.isinf(second))
    misses = [int(np.isinf(each[~undefined]).sum()) for each in (first, second)]
    # pairs that are both infinite do not differ
    worst = np.where(
        first[infinite] == second[infinite], 0, np.where(np.isinf(first[infinite]), first[infinite], -second[infinite])
    )
    first, second = first[~(undefined | infinite)], second[~(undefined | infinite)]
    difference = first - second
    return PairedComparison(
        cases=len(difference),
        undefined=int(undefined.sum()),
        infinite=int(infinite.sum()),
        baseline_mean=_mean(second),
        baseline_median=_median(second),
        candidate_mean=_mean(first),
        candidate_median=_median(first),
        mean_difference=_mean(difference),
        interval=bootstrap_interval(difference, seed=seed, resamples=resamples, confidence=confidence),
        p_value=wilcoxon_p(np.concatenate((difference, worst))),
        candidate_infinite=misses[0],
        baseline_infinite=misses[1],
    )


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: finite values, (N,).
        seed: seed of the resampling.
        resamples: number of resamples, at least 1.
        confidence: coverage, in (0, 1).

    Returns:
        (lower, upper). Both are NaN without values; with one value both are that value.

    Raises:
        ValueError: `resamples` or `confidence` is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples must be >= 1 and confidence in (0, 1), got {resamples} and {confidence}")
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    chunks = [min(BOOTSTRAP_CHUNK, resamples - done) for done in range(0, resamples, BOOTSTRAP_CHUNK)]
    means = [sample[generator.integers(sample.size, size=(chunk, sample.size))].mean(axis=1) for chunk in chunks]
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(lower), float(upper)


def wilcoxon_p(difference: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank p of paired differences.

    Args:
        difference: differences, (N,); infinite ones count as the largest.

    Returns:
        p in (0, 1]. Zero differences are dropped (Wilcoxon's rule); if none is left, p is 1.0. NaN without pairs.
    """
    pairs = np.asarray(difference, dtype=np.float64)
    if pairs.size == 0:
        return float("nan")
    nonzero = pairs[pairs != 0]
    return float(stats.wilcoxon(nonzero).pvalue) if nonzero.size else 1.0


def comparison_table(comparisons: Mapping[str, PairedComparison], digits: int = 4) -> str:
    """Markdown table of candidates against one baseline.

    Args:
        comparisons: name of the candidate -> comparison.
        digits: digits after the point.

    Returns:
        One row per candidate, ending with a newline. NaN reads "-".
    """
    header = ["model", "cases", "left out", "mean", "median", "difference", "95 % interval", "Wilcoxon p"]
    return markdown_table(header, [[name, *comparison_cells(entry, digits)] for name, entry in comparisons.items()])


def comparison_cells(comparison: PairedComparison, digits: int = 4) -> list[str]:
    """Cells of one comparison: cases, left out, mean, median, difference, interval, p.

    Args:
        comparison: what to write.
        digits: digits after the point.

    Returns:
        Seven strings.
    """
    lower, upper = comparison.interval
    interval = "-" if math.isnan(lower) else f"{lower:+.{digits}f} to {upper:+.{digits}f}"
    return [
        str(comparison.cases),
        str(comparison.undefined + comparison.infinite),
        number(comparison.candidate_mean, digits),
        number(comparison.candidate_median, digits),
        "-" if math.isnan(comparison.mean_difference) else f"{comparison.mean_difference:+.{digits}f}",
        interval,
        "-" if math.isnan(comparison.p_value) else f"{comparison.p_value:.2g}",
    ]


def number(value: float, digits: int = 4) -> str:
    """Write a number with fixed digits; NaN reads "-"."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a markdown table, first column left, the others right aligned.

    Args:
        header: column titles.
        rows: cells as text, each row as long as the header.

    Returns:
        The table, ending with a newline.

    Raises:
        ValueError: a row's length differs from the header's.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header has {len(header)}")
    alignment = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, alignment, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if values.size else float("nan")
