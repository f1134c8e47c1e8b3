"""Failure detection: does a score of each case, known without the truth, tell which segmentations are poor?

The score is any number that is high where the segmentation is trusted; the risk is what is to be avoided, such as 1 - Dice.
Source: Zenk et al., Comparative benchmarking of failure detection methods in medical image segmentation (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


@dataclass(frozen=True)
class FailureDetection:
    """How well a score ranks the cases by their risk.

    Attributes:
        cases: number of cases, N.
        aurc: area under the risk-coverage curve; small is good.
        random: that of a score that knows nothing, the mean risk.
        optimal: that of a score that knows the risk.
        normalised: (random - aurc) / (random - optimal): 1 is optimal, 0 knows nothing. NaN if all risks are equal.
        spearman: rank correlation of score and -risk. NaN if one of them is constant, or with fewer than three cases.
        pearson: linear correlation of score and -risk, NaN likewise.
    """

    cases: int
    aurc: float
    random: float
    optimal: float
    normalised: float
    spearman: float
    pearson: float


def risk_coverage(score: ArrayLike, risk: ArrayLike) -> NDArray[np.float64]:
    """Return the mean risk of the 1, 2, ..., N cases of highest score, (N,).

    Cases of one score are in random order: each counts as their mean risk.

    Args:
        score: of each case, (N,).
        risk: of each case, (N,).

    Raises:
        ValueError: the shapes differ, there is no case, or a value is not finite.
    """
    scores, risks = np.asarray(score, np.float64), np.asarray(risk, np.float64)
    if scores.shape != risks.shape or scores.ndim != 1 or not scores.size:
        raise ValueError(f"score {scores.shape} and risk {risks.shape} must both be (cases,), with at least one case")
    if not (np.isfinite(scores).all() and np.isfinite(risks).all()):
        raise ValueError("score and risk must be finite: leave out the cases where one is not defined")
    _, group = np.unique(-scores, return_inverse=True)
    mean_of_group = np.bincount(group, weights=risks) / np.bincount(group)
    ordered = np.sort(group)
    return np.cumsum(mean_of_group[ordered]) / np.arange(1, len(risks) + 1)


def area_under(curve: NDArray[np.float64]) -> float:
    """Return the area under a risk-coverage curve by trapezoids; from coverage 0 to 1/N it is flat."""
    return float((curve[0] + np.sum((curve[1:] + curve[:-1]) / 2)) / len(curve))


def failure_detection(score: ArrayLike, risk: ArrayLike) -> FailureDetection:
    """Measure how well a score ranks the cases by their risk.

    Args:
        score: of each case, (N,).
        risk: of each case, (N,).

    Raises:
        ValueError: as for `risk_coverage`.
    """
    scores, risks = np.asarray(score, np.float64), np.asarray(risk, np.float64)
    aurc, optimal = area_under(risk_coverage(scores, risks)), area_under(risk_coverage(-risks, risks))
    chance = float(risks.mean())
    varies = len(risks) > 2 and np.ptp(risks) > 0 and np.ptp(scores) > 0
    return FailureDetection(
        cases=len(risks),
        aurc=aurc,
        random=chance,
        optimal=optimal,
        normalised=(chance - aurc) / (chance - optimal) if np.ptp(risks) > 0 else float("nan"),
        spearman=float(stats.spearmanr(scores, -risks).statistic) if varies else float("nan"),
        pearson=float(stats.pearsonr(scores, -risks).statistic) if varies else float("nan"),
    )
