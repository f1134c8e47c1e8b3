"""Dice, HD95, surface Dice and the count of corrected and broken voxels, for arrays of any number of dimensions.

Where the reference has an ignore label, mask its voxels first, as nnU-Net's evaluation does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

HD95_PERCENTILE = 95.0


@dataclass(frozen=True)
class VoxelChanges:
    """Voxels that a refinement corrected and broke, relative to its start.

    Attributes:
        corrected: voxels wrong in the start and right in the result.
        broken: voxels right in the start and wrong in the result.
    """

    corrected: int
    broken: int


def dice(prediction: ArrayLike, reference: ArrayLike) -> float:
    """Dice coefficient of two masks of one shape.

    Args:
        prediction: boolean mask, (*spatial).
        reference: boolean mask, (*spatial).

    Returns:
        2 |A and B| / (|A| + |B|), 0..1. NaN if both masks are empty, as in nnU-Net's evaluation; 0 if one is empty.

    Raises:
        ValueError: the shapes differ.
    """
    predicted, true = masks_of_one_shape(prediction, reference)
    total = np.count_nonzero(predicted) + np.count_nonzero(true)
    return 2.0 * np.count_nonzero(predicted & true) / total if total else float("nan")


def mean_known(values: Sequence[float]) -> float:
    """Return the mean of all values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def hd95(prediction: ArrayLike, reference: ArrayLike, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance of two masks: the larger of the two directed 95th percentiles.

    The surface of a mask consists of its voxels with a face neighbour outside the mask. The outside of the array counts as
    outside the mask. Axes of length one are removed first, so that a single slice is measured in 2D. Directed distances
    run from the centre of each surface voxel of one mask to the nearest surface voxel of the other. Percentiles are
    linearly interpolated. (medpy pools both directions before taking the percentile.)

    Args:
        prediction: boolean mask, (*spatial).
        reference: boolean mask, (*spatial).
        spacing_mm: voxel size in mm along each axis of the masks.

    Returns:
        Distance in mm. NaN if both masks are empty; infinity if one is, so that a missed structure is never better than a
        poor segmentation.

    Raises:
        ValueError: the shapes differ, or `spacing_mm` is not one positive number per axis.
    """
    return surface_metrics(prediction, reference, spacing_mm, 0.0)[0]


def surface_dice(
    prediction: ArrayLike, reference: ArrayLike, spacing_mm: Sequence[float], tolerance_mm: float
) -> float:
    """Normalised surface Dice, NSD: the share of both surfaces that lies within a tolerance of the other one.

    Surfaces and distances are those of `hd95`; each surface voxel counts once. (DeepMind's implementation weights them by
    their area.)

    Args:
        prediction: boolean mask, (*spatial).
        reference: boolean mask, (*spatial).
        spacing_mm: voxel size in mm along each axis of the masks.
        tolerance_mm: largest distance in mm that counts as agreement.

    Returns:
        0..1. NaN if both masks are empty, 0 if one is.

    Raises:
        ValueError: as for `hd95`, or the tolerance is negative.

    Source: Nikolov et al., Clinically applicable segmentation of head and neck anatomy (2021).
    """
    return surface_metrics(prediction, reference, spacing_mm, tolerance_mm)[1]


def voxels_corrected_and_broken(start: ArrayLike, result: ArrayLike, reference: ArrayLike) -> VoxelChanges:
    """Count the voxels that a refinement corrected and those that it broke.

    Args:
        start: integer label map that the refinement began with, (*spatial).
        result: integer label map that it ended with, (*spatial).
        reference: true label map, (*spatial).

    Returns:
        The two counts. A voxel that changes from one wrong class to another is in neither.

    Raises:
        ValueError: the shapes differ.
    """
    before, after, true = np.asarray(start), np.asarray(result), np.asarray(reference)
    _same_shape(before, true, "start")
    _same_shape(after, true, "result")
    right_before, right_after = before == true, after == true
    return VoxelChanges(
        corrected=int(np.count_nonzero(~right_before & right_after)),
        broken=int(np.count_nonzero(right_before & ~right_after)),
    )


def masks_of_one_shape(prediction: ArrayLike, reference: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both as boolean arrays.

    Raises:
        ValueError: the shapes differ.
    """
    predicted, true = np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
    _same_shape(predicted, true, "prediction")
    return predicted, true


def _same_shape(array: NDArray, reference: NDArray, name: str) -> None:
    if array.shape != reference.shape:
        raise ValueError(f"{name} has shape {array.shape}, the reference {reference.shape}: compare on one grid")


def _spacing(spacing_mm: Sequence[float], dimensions: int) -> tuple[float, ...]:
    spacing = tuple(float(size) for size in spacing_mm)
    if len(spacing) != dimensions or not all(0 < size < float("inf") for size in spacing):
        raise ValueError(f"spacing_mm must be {dimensions} positive numbers, one per axis, got {spacing_mm}")
    return spacing


def surface_metrics(
    prediction: ArrayLike, reference: ArrayLike, spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float]:
    """Return `hd95` and `surface_dice`, whose distances are computed once for both; arguments and errors are theirs."""
    predicted, true, spacing = _checked(prediction, reference, spacing_mm, tolerance_mm)
    if not predicted.any() or not true.any():
        return (float("inf"), 0.0) if predicted.any() or true.any() else (float("nan"), float("nan"))
    distances = _surface_distances(predicted, true, spacing)
    together = np.concatenate(distances)
    # NSD = (|S_p near S_t| + |S_t near S_p|) / (|S_p| + |S_t|)
    near = float(np.count_nonzero(together <= tolerance_mm) / together.size)
    return float(max(np.percentile(each, HD95_PERCENTILE) for each in distances)), near


def _checked(
    prediction: ArrayLike, reference: ArrayLike, spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[float, ...]]:
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm is {tolerance_mm}, but must be 0 or more")
    predicted, true = masks_of_one_shape(prediction, reference)
    return predicted, true, _spacing(spacing_mm, predicted.ndim)


def _surface_distances(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], spacing: tuple[float, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances in mm from each surface voxel of one mask to the other's surface; no mask is empty."""
    long_axes = [axis for axis, length in enumerate(predicted.shape) if length > 1]
    if not long_axes:
        return np.zeros(1), np.zeros(1)
    predicted, true, spacing = predicted.squeeze(), true.squeeze(), tuple(spacing[axis] for axis in long_axes)
    # Outside the joint bounding box everything is background, so cropping changes neither surfaces nor distances.
    box = ndimage.find_objects((predicted | true).astype(np.uint8))[0]
    surface_predicted, surface_true = _surface(predicted[box]), _surface(true[box])
    to_true = ndimage.distance_transform_edt(~surface_true, sampling=spacing)[surface_predicted]
    to_predicted = ndimage.distance_transform_edt(~surface_predicted, sampling=spacing)[surface_true]
    return to_true, to_predicted


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~ndimage.binary_erosion(mask, border_value=0)


def evenly_spaced(names: Sequence[str], number: int | None = None) -> list[str]:
    """Return `number` of the names, the first and the last among them; all if that is None or there are no more."""
    places = np.linspace(0, len(names) - 1, min(number or len(names), len(names)))
    return [names[round(place)] for place in places]
