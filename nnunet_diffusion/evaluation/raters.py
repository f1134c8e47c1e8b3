"""Metrics of one class against several raters, none of whom is the truth.

Masks are of one class, all on one grid. Of label maps take `labels == label` first, of the raters too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

from nnunet_diffusion.evaluation.metrics import dice, masks_of_one_shape, mean_known

CURVAS_THRESHOLDS = tuple(np.linspace(0.1, 0.8, 6).tolist())
CURVAS_DEVIATIONS = 3.0
CRPS_KINDS = ("exact", "curvas")
CHUNK_VOXELS = 2**20  # float32 counts exactly up to 2^24


def consensus_dice(prediction_mask: ArrayLike, rater_masks: Sequence[ArrayLike]) -> float:
    """Dice on the voxels where all raters agree, inside as well as outside the class.

    Args:
        prediction_mask: boolean mask, (*spatial).
        rater_masks: one boolean mask (*spatial) for each rater, at least one.

    Returns:
        0..1. NaN if prediction and raters are empty on these voxels, as for `dice`.

    Raises:
        ValueError: there is no rater, or the shapes differ.

    Source: CURVAS challenge (2024).
    """
    raters = _stacked(rater_masks, "rater_masks")
    predicted, inside = masks_of_one_shape(prediction_mask, raters.all(0))
    agreed = inside | ~raters.any(0)
    return dice(predicted & agreed, inside)


def soft_dice_over_thresholds(
    probability: ArrayLike, rater_masks: Sequence[ArrayLike], thresholds: Sequence[float] = CURVAS_THRESHOLDS
) -> float:
    """Mean Dice of a probability and the mean of the raters, both cut at several thresholds.

    A voxel is inside if its value is above the threshold, not equal to it: of five raters, 0.8 asks for all five.

    Args:
        probability: of the class, 0..1, (*spatial).
        rater_masks: one boolean mask (*spatial) for each rater, at least one.
        thresholds: within 0..1.

    Returns:
        0..1. A threshold above which both are empty counts as 1.

    Raises:
        ValueError: there is no rater or threshold, or the shapes differ.

    Source: CURVAS-PDACVI challenge (2025).
    """
    if not len(thresholds):
        raise ValueError("thresholds is empty: give at least one number within 0..1")
    predicted, share = np.asarray(probability), _stacked(rater_masks, "rater_masks").mean(0)
    values = [dice(predicted > threshold, share > threshold) for threshold in thresholds]
    return float(np.mean([1.0 if math.isnan(value) else value for value in values]))


def staple_dice(prediction_mask: ArrayLike, rater_masks: Sequence[ArrayLike]) -> float:
    """Dice against the STAPLE estimate of the raters, cut at 0.5.

    STAPLE sees the bounding box of the voxels that the raters dispute (`inference.fusion.staple`). Where it has no result,
    the majority of the raters decides.

    Args:
        prediction_mask: boolean mask, (*spatial).
        rater_masks: one boolean mask (*spatial) for each rater, at least one; two or three axes.

    Returns:
        0..1. NaN if prediction and estimate are empty, as for `dice`.

    Raises:
        ValueError: there is no rater, or the shapes differ.

    Source: Warfield et al., Simultaneous truth and performance level estimation (2004).
    """
    # prediction imports nnU-Net, which the other metrics do not need
    import torch

    from nnunet_diffusion.inference.fusion import staple

    masks = torch.from_numpy(_stacked(rater_masks, "rater_masks").astype(np.uint8))
    return dice(prediction_mask, (staple(masks, masks.float().mean(0)) > 0.5).numpy())


def crps(predicted_volume: float, rater_volumes: Sequence[float], kind: str = "exact") -> float:
    """Continuous ranked probability score of a volume against the normal distribution of the raters' volumes.

    The standard deviation is that of the population (divided by the number of raters), as in CURVAS: the raters at hand
    are the reference, not a sample from which other raters are estimated.

    Args:
        predicted_volume: sum of probabilities x voxel volume, in the unit of the raters' volumes.
        rater_volumes: one for each rater, at least one.
        kind: "exact", or "curvas", which integrates over mean +- 3 standard deviations only and therefore saturates.
            (CURVAS also tabulates the distribution from 1 % to 99 %; the difference is below 0.01 standard deviations.)

    Returns:
        In the unit of the volumes, 0 or more, small is good. If all raters' volumes are equal, the absolute difference,
        for both kinds.

    Raises:
        ValueError: there is no rater, or the kind is unknown.

    Source: Gneiting and Raftery, Strictly proper scoring rules (2007), section 4.2.
    """
    if kind not in CRPS_KINDS:
        raise ValueError(f"kind is {kind!r}; known: {', '.join(CRPS_KINDS)}")
    volumes = np.asarray(rater_volumes, np.float64)
    if volumes.ndim != 1 or not volumes.size:
        raise ValueError(
            f"rater_volumes has shape {volumes.shape}, but must be one volume for each rater, at least one"
        )
    mean, deviation = float(volumes.mean()), float(volumes.std())
    if np.ptp(volumes) == 0:
        return abs(float(predicted_volume) - mean)
    step = (float(predicted_volume) - mean) / deviation
    left_out = 0.0
    if kind == "curvas":
        step, left_out = float(np.clip(step, -CURVAS_DEVIATIONS, CURVAS_DEVIATIONS)), _tail(-CURVAS_DEVIATIONS)
    # int (F(v) - 1{v >= predicted})^2 dv: F^2 below the step, and by symmetry (1 - F)^2 above it
    return deviation * (_tail(step) + _tail(-step) - 2 * left_out)


def _tail(z: float) -> float:
    """Return the integral of the squared normal distribution function from minus infinity to z."""
    # d/dz [z Phi^2 + 2 phi Phi - Phi(sqrt(2) z) / sqrt(pi)] = Phi^2
    below, density = norm.cdf(z), norm.pdf(z)
    return float(z * below**2 + 2 * density * below - norm.cdf(math.sqrt(2) * z) / math.sqrt(math.pi))


def iou_matrix(first_masks: Sequence[ArrayLike], second_masks: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return the intersection over union of each mask of one set with each of another, (N, M).

    Args:
        first_masks: N boolean masks, (*spatial).
        second_masks: M boolean masks, (*spatial).

    Returns:
        0..1. An empty mask and an empty mask have 1.

    Raises:
        ValueError: a set has no mask, or the shapes differ.
    """
    first, second = _stacked(first_masks, "sample_masks"), _stacked(second_masks, "rater_masks")
    masks_of_one_shape(first[0], second[0])
    occupied = first.any(0) | second.any(0)
    first, second = first[:, occupied], second[:, occupied]
    shared = np.zeros((len(first), len(second)))
    for start in range(0, first.shape[1], CHUNK_VOXELS):
        part = slice(start, start + CHUNK_VOXELS)
        shared += first[:, part].astype(np.float32) @ second[:, part].astype(np.float32).T
    either = first.sum(1)[:, None] + second.sum(1) - shared
    return np.where(either > 0, shared / np.maximum(either, 1), 1.0)


def generalized_energy_distance(sample_masks: Sequence[ArrayLike], rater_masks: Sequence[ArrayLike]) -> float:
    """Squared distance of the distribution of samples from that of the raters, with d = 1 - IoU.

    Pairs of a mask with itself are included, and no root is taken.

    Args:
        sample_masks: N boolean masks, (*spatial).
        rater_masks: M boolean masks, (*spatial).

    Returns:
        0..2; 0 if both sets have the same masks in the same proportions. Two empty masks have the distance 0.

    Raises:
        ValueError: a set has no mask, or the shapes differ.

    Source: Kohl et al., A probabilistic U-Net (2018).
    """
    between = 1 - iou_matrix(sample_masks, rater_masks)
    of_samples, of_raters = 1 - iou_matrix(sample_masks, sample_masks), 1 - iou_matrix(rater_masks, rater_masks)
    # D^2 = 2 E d(Y, S) - E d(S, S') - E d(Y, Y')
    return float(2 * between.mean() - of_samples.mean() - of_raters.mean())


def hungarian_iou(sample_masks: Sequence[ArrayLike], rater_masks: Sequence[ArrayLike]) -> float:
    """Mean IoU of samples and raters in the best matching of one to one.

    Both sets are repeated to the least common multiple of their sizes first.

    Args:
        sample_masks: N boolean masks, (*spatial).
        rater_masks: M boolean masks, (*spatial).

    Returns:
        0..1. An empty mask matched to an empty mask has 1.

    Raises:
        ValueError: a set has no mask, or the shapes differ.

    Source: Kohl et al., A hierarchical probabilistic U-Net (2019).
    """
    iou = iou_matrix(sample_masks, rater_masks)
    samples, raters = iou.shape
    common = math.lcm(samples, raters)
    repeated = iou.repeat(common // samples, axis=0).repeat(common // raters, axis=1)
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].mean())


def interrater_dice(rater_masks: Sequence[ArrayLike]) -> float:
    """Mean Dice of all pairs of raters.

    Args:
        rater_masks: one boolean mask (*spatial) for each rater, at least two.

    Returns:
        0..1. Pairs of two empty masks are left out; NaN if there is no other.

    Raises:
        ValueError: there are fewer than two raters, or the shapes differ.
    """
    raters = _stacked(rater_masks, "rater_masks")
    if len(raters) < 2:
        raise ValueError("rater_masks has one mask, but two or more raters are needed to compare them")
    return mean_known([dice(one, other) for one, other in itertools.combinations(raters, 2)])


def _stacked(masks: Sequence[ArrayLike], name: str) -> NDArray[np.bool_]:
    arrays = [np.asarray(mask, dtype=bool) for mask in masks]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        found = f"masks of the shapes {', '.join(map(str, sorted(shapes)))}" if shapes else "no mask"
        raise ValueError(f"{name} has {found}: give one mask or more, all on one grid")
    return np.stack(arrays)
