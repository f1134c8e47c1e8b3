"""Whether a map of uncertainty finds the voxels that a segmentation has wrong."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats


def band(segmentation: NDArray, truth: NDArray, voxels: float = 5) -> NDArray[np.bool_]:
    """Return the voxels near a border of the segmentation or of the truth; elsewhere nearly all voxels are right.

    Args:
        segmentation: label map (*volume).
        truth: label map of the same shape.
        voxels: largest distance from the border in voxels, whatever the spacing.
    """
    near = np.zeros(truth.shape, bool)
    for labels in (segmentation, truth):
        border = np.zeros(truth.shape, bool)
        for axis in range(labels.ndim):
            moved, marked = np.moveaxis(labels, axis, 0), np.moveaxis(border, axis, 0)
            differs = moved[1:] != moved[:-1]
            marked[1:] |= differs
            marked[:-1] |= differs
        if border.any():
            near |= ndimage.distance_transform_edt(~border) <= voxels
    return near


def auroc(uncertainty: NDArray, wrong: NDArray[np.bool_]) -> float:
    """Return the probability that a wrong voxel is more uncertain than a right one, ties counted half.

    Args:
        uncertainty: of each voxel, (N,).
        wrong: whether each voxel has a wrong label, (N,).

    Returns:
        0.5 for a map that knows nothing; NaN if all voxels are right, or all are wrong.
    """
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        return math.nan
    # Mann-Whitney's U, divided by the number of pairs
    ranks = stats.rankdata(uncertainty)
    return float((ranks[wrong].sum() - positive * (positive + 1) / 2) / (positive * negative))
