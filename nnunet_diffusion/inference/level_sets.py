"""Intervals of a volume from the level sets of the mean probabilities, corrected by cases with ground truth.

At the level u the foreground is where p > u; its volume falls as u rises. Were all voxels of a border to move together, the
volume would lie between those at u = 0.95 and u = 0.05 in nine of ten cases; were they independent, it would hardly vary.
How far apart the two levels must be is therefore not assumed but read off cases whose true volume is known (split conformal
prediction: Vovk et al. 2005; Lei et al. 2018). It serves any probabilities, those of plain nnU-Net too.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

COVERAGE = 0.9
HALF_WIDTHS = (*(step / 8 for step in range(81)), 100.0)
"""Candidates x: the levels are the probabilities of log-odds x and -x. The last means the whole image."""
UPPER = np.array([*(1 / (1 + math.exp(-each)) for each in HALF_WIDTHS[:-1]), 1.0])
"""The upper level of each candidate; the lower one is 1 - upper."""
VOXELS_AT_ONCE = 2**20


def level_sets(probabilities: Tensor) -> NDArray[np.int64]:
    """Return the number of voxels of the level sets, (K, 2, candidates): above the upper, and from the lower level on.

    Args:
        probabilities: (K, *volume), on the CPU.
    """
    count = len(HALF_WIDTHS)
    sets = np.zeros((len(probabilities), 2, count), np.int64)
    for head, values in enumerate(probabilities):
        for part in values.reshape(-1).split(VOXELS_AT_ONCE):
            found = part.numpy().astype(np.float64)
            # number of candidates whose upper level is below p, and of those whose lower level is above p
            above, below = np.searchsorted(UPPER, found), count - np.searchsorted((1 - UPPER)[::-1], found, "right")
            sets[head, 0] += found.size - np.bincount(above, minlength=count + 1).cumsum()[:count]
            sets[head, 1] += np.bincount(below, minlength=count + 1).cumsum()[:count]
    return sets


def needed(sets: NDArray, true: float) -> int:
    """Return the place of the narrowest candidate whose interval holds the true volume; the last one always does.

    Args:
        sets: volumes of one class, (2, candidates).
        true: true volume in the same unit, at most that of the image.
    """
    return int(np.argmax((sets[0] <= true) & (true <= sets[1])))


def fewest_cases(coverage: float = COVERAGE) -> int:
    """Return the number of cases from which on the coverage can be had without taking the whole image."""
    return next(cases for cases in range(1, 10_000) if _rank(cases, coverage) <= cases)


def _rank(cases: int, coverage: float) -> int:
    # rounded, because 10 x 0.9 must not become more than 9
    return math.ceil(round((cases + 1) * coverage, 9))


def conformal(places: Sequence[int], coverage: float = COVERAGE) -> int:
    """Return the place of the candidate that holds the volume of a new case with at least this probability.

    Args:
        places: what each case with ground truth needs, see `needed`.
        coverage: 0..1; it holds on average over cases of the same distribution.
    """
    # the ceil((n + 1) coverage)-th smallest of n
    rank = _rank(len(places), coverage)
    return sorted(places)[rank - 1] if rank <= len(places) else len(HALF_WIDTHS) - 1


def bounds(sets: NDArray, half_width: float) -> tuple[float, float]:
    """Return the smallest and the largest volume of one class.

    Args:
        sets: volumes of its level sets, (2, candidates).
        half_width: in log-odds; one between two candidates counts as the wider.
    """
    place = min(bisect.bisect_left(HALF_WIDTHS, half_width), len(HALF_WIDTHS) - 1)
    return float(sets[0][place]), float(sets[1][place])
