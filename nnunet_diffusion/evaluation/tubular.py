"""Metrics of tubular structures, such as vessels, for which Dice counts little what is thin."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage.morphology import skeletonize

from nnunet_diffusion.evaluation.metrics import masks_of_one_shape


def centreline_dice(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Centreline Dice, clDice, of two masks (Shit et al. 2021, section 2): does each contain the other's centreline?

    Args:
        prediction: boolean mask, (*spatial), 2D or 3D.
        reference: boolean mask of the same shape.

    Returns:
        The harmonic mean of topology precision, the share of the prediction's centreline in the reference, and topology
        sensitivity, the reverse: 0..1. NaN if both masks are empty, 0 if one is.

    Raises:
        ValueError: the shapes differ, or the masks have neither two nor three axes.
    """
    predicted, true = masks_of_one_shape(prediction, reference)
    if not predicted.any() or not true.any():
        return 0.0 if predicted.any() or true.any() else float("nan")
    precision, sensitivity = _share(centreline(predicted), true), _share(centreline(true), predicted)
    total = precision + sensitivity
    # clDice = 2 Tprec Tsens / (Tprec + Tsens)
    return 2 * precision * sensitivity / total if total else 0.0


def thin_vessel_recall(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Share of the centreline of the reference's thin vessels that lies in the prediction.

    Thin is where no cross of three voxels (a voxel and its face neighbours) fits into the vessel: it is at most two voxels
    wide.

    Args:
        prediction: boolean mask, (*spatial), 2D or 3D.
        reference: boolean mask of the same shape.

    Returns:
        0..1; NaN if the reference has no thin vessel.

    Raises:
        ValueError: as for `centreline_dice`.
    """
    predicted, true = masks_of_one_shape(prediction, reference)
    flat = true.squeeze()
    thin = centreline(true) & ~ndimage.binary_opening(flat).reshape(true.shape)
    return _share(thin, predicted) if thin.any() else float("nan")


def centreline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the skeleton of a mask, one voxel wide; a component that thinning removes wholly keeps its innermost voxel.

    Raises:
        ValueError: the mask has neither two nor three axes.
    """
    flat = mask.squeeze()
    if flat.ndim not in (2, 3):
        raise ValueError(
            f"a centreline is that of a mask with two or three axes longer than one voxel, not {mask.shape}"
        )
    skeleton = skeletonize(flat).astype(bool)
    components, number = ndimage.label(flat, ndimage.generate_binary_structure(flat.ndim, flat.ndim))
    lost = np.setdiff1d(np.arange(1, number + 1), components[skeleton])
    if lost.size:
        for place in ndimage.maximum_position(ndimage.distance_transform_edt(flat), components, lost):
            skeleton[place] = True
    return skeleton.reshape(mask.shape)


def _share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(part & whole) / np.count_nonzero(part))
