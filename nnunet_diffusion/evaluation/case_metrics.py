"""All numbers of one case: its classes, calibration, whether uncertainty finds errors, volumes, several raters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_diffusion.evaluation import calibration, raters
from nnunet_diffusion.evaluation.folders import CaseArrays, Classes
from nnunet_diffusion.evaluation.metrics import dice, hd95, mean_known, surface_dice
from nnunet_diffusion.evaluation.uncertainty import auroc, band
from nnunet_diffusion.inference.uncertainty import entropy

BAND_VOXELS = 5
ENTROPY = "entropy of the probabilities"
BOX_MARGIN_VOXELS = 20
"""Margin of the box around the raters' foreground, as in CURVAS 2025."""


def measure_case(arrays: CaseArrays, classes: Classes, tolerance_mm: float | None = None) -> dict[str, Any]:
    """Return the numbers of one case as JSON.

    Args:
        arrays: the arrays of the case; the first truth is the reference where one is needed.
        classes: what is compared.
        tolerance_mm: of the surface Dice; None for 1 mm, or the in-plane spacing if that is larger.

    Returns:
        Dictionary with `classes` (name -> metrics), `dice` and `nsd` (means over the classes that are there), and where the
        files are there `calibration`, `errors` (AUROC of each map), `scores`, `volumes` and `raters`.
    """
    tolerance = default_tolerance(arrays.spacing_mm) if tolerance_mm is None else tolerance_mm
    masks = {name: _mask(arrays.prediction, labels, arrays.known) for name, labels in classes.labels.items()}
    truths = {
        name: [_mask(truth, labels, arrays.known) for truth in arrays.truths] for name, labels in classes.labels.items()
    }
    by_class = {
        name: class_numbers(masks[name], truths[name][0], arrays.known, arrays.spacing_mm, tolerance) for name in masks
    }
    result: dict[str, Any] = {
        "tolerance_mm": tolerance,
        "classes": by_class,
        "dice": mean_known([each["dice"] for each in by_class.values()]),
        "nsd": mean_known([each["nsd"] for each in by_class.values()]),
    }
    near = arrays.known & band(arrays.prediction, arrays.truths[0], BAND_VOXELS)
    values, scores = {name: each[near] for name, each in arrays.maps.items()}, {}
    if arrays.probabilities is not None:
        result["calibration"] = _calibration(arrays, classes, near, list(truths.values()))
        values[ENTROPY] = entropy(torch.from_numpy(arrays.probabilities[:, near]), classes.regions).numpy()
        scores["confidence"] = confidence(arrays, classes)
    if arrays.numbers.get("score") is not None:
        scores["pairwise Dice"] = float(arrays.numbers["score"])
    wrong = wrong_voxels(arrays, classes)[near]
    # agreement is high where the others are low
    result["errors"] = {
        name: auroc(-each if name == "agreement" else each, wrong) for name, each in sorted(values.items())
    }
    result["scores"] = scores
    voxel_mm3 = math.prod(arrays.spacing_mm)
    if arrays.numbers:
        result["volumes"] = _intervals(arrays.numbers, truths, voxel_mm3)
    if len(arrays.truths) > 1:
        result["raters"] = _raters(arrays, classes, masks, truths, voxel_mm3)
    return result


def default_tolerance(spacing_mm: Sequence[float]) -> float:
    """Return 1 mm, or the in-plane spacing (of the two finest axes the coarser) if that is larger."""
    return max(1.0, sorted(spacing_mm)[1] if len(spacing_mm) > 1 else spacing_mm[0])


def class_numbers(
    predicted: NDArray[np.bool_],
    true: NDArray[np.bool_],
    known: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> dict[str, float]:
    """Return the metrics of one class. NaN where one is not defined, such as Dice if both masks are empty.

    Args:
        predicted: mask (*image).
        true: mask (*image).
        known: voxels that count.
        spacing_mm: voxel size along each axis.
        tolerance_mm: of the surface Dice.
    """
    tp, fp, fn, tn = (
        int(np.count_nonzero(each))
        for each in (predicted & true, predicted & ~true, ~predicted & true, known & ~predicted & ~true)
    )
    voxel_mm3 = math.prod(spacing_mm)
    return {
        "dice": dice(predicted, true),
        "iou": _share(tp, tp + fp + fn),
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, tp + fn),
        "fnr": _share(fn, tp + fn),
        "fpr": _share(fp, fp + tn),
        "hd95_mm": hd95(predicted, true, spacing_mm),
        "nsd": surface_dice(predicted, true, spacing_mm, tolerance_mm),
        "predicted_mm3": (tp + fp) * voxel_mm3,
        "true_mm3": (tp + fn) * voxel_mm3,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mask(label_map: NDArray, labels: Sequence[int], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.isin(label_map, labels) & known


def wrong_voxels(arrays: CaseArrays, classes: Classes) -> NDArray[np.bool_]:
    """Return where the prediction has another class than the first truth, or is in other regions (*image)."""
    wrong = np.zeros(arrays.known.shape, bool)
    for labels in classes.labels.values():
        wrong |= np.isin(arrays.prediction, labels) != np.isin(arrays.truths[0], labels)
    return wrong & arrays.known


def confidence(arrays: CaseArrays, classes: Classes) -> float:
    """Return a score without truth: the mean confidence near the borders of the segmentation, 0..1.

    The confidence of a voxel is the probability of its most likely class (for regions the mean over them of max(p, 1 - p)).
    Where the segmentation has no border, all voxels count.
    """
    assert arrays.probabilities is not None
    near = band(arrays.prediction, arrays.prediction, BAND_VOXELS)
    values = arrays.probabilities[:, near if near.any() else np.ones_like(near)]
    top = np.maximum(values, 1 - values).mean(0) if classes.regions else values.max(0)
    return float(top.mean())


def _calibration(
    arrays: CaseArrays, classes: Classes, near: NDArray[np.bool_], truths: Sequence[Sequence[NDArray]]
) -> dict[str, Any]:
    """Return calibration in the band and in the box around the foreground, the latter as the mean over raters."""
    box = around([mask for of_class in truths for mask in of_class]) & arrays.known
    in_band = _problem(arrays, classes, near, arrays.truths[0])
    tempering = calibration.tempering(*in_band)
    of_raters = [_errors(*_problem(arrays, classes, box, truth)) for truth in arrays.truths]
    return {
        "band": _errors(*in_band),
        "box": {key: float(np.mean([each[key] for each in of_raters])) for key in of_raters[0]},
        "sums": {
            "loss": tempering.loss.tolist(),
            "reliability": [
                [each.voxels.tolist(), each.confidence.tolist(), each.right.tolist()] for each in tempering.reliability
            ],
        },
    }


def _problem(
    arrays: CaseArrays, classes: Classes, where: NDArray[np.bool_], truth: NDArray
) -> tuple[NDArray, NDArray[np.intp]]:
    """Return probabilities (K, N) and labels (N,) of the voxels of a mask; regions as two classes."""
    assert arrays.probabilities is not None
    probabilities, values = arrays.probabilities[:, where], truth[where]
    masks = np.stack([np.isin(values, labels) for labels in classes.heads])
    if classes.regions:
        return calibration.heads_as_classes(probabilities, masks)
    return probabilities, masks.argmax(0)


def _errors(probabilities: NDArray, labels: NDArray) -> dict[str, float]:
    return {
        "voxels": float(labels.size),
        "ece": calibration.reliability(probabilities, labels).ece(),
        "ace": calibration.adaptive_calibration_error(probabilities, labels),
        "brier": calibration.brier(probabilities, labels),
        "nll": calibration.negative_log_likelihood(probabilities, labels),
    }


def around(masks: Sequence[NDArray[np.bool_]], margin: int = BOX_MARGIN_VOXELS) -> NDArray[np.bool_]:
    """Return the box around all masks with a margin in voxels; the whole image if all are empty."""
    together = np.any(masks, axis=0)
    found = ndimage.find_objects(together.astype(np.uint8))
    box = np.ones(together.shape, bool)
    if found:
        box[...] = False
        box[tuple(slice(max(0, each.start - margin), each.stop + margin) for each in found[0])] = True
    return box


def _intervals(numbers: dict[str, Any], truths: dict[str, list[NDArray]], voxel_mm3: float) -> dict[str, Any]:
    """Return whether each class's interval of the volume holds the true one, and its width."""
    result = {}
    for name, interval in numbers.get("volume_mm3", {}).items():
        if name in truths:
            true = float(np.count_nonzero(truths[name][0]) * voxel_mm3)
            low, high = interval["low"], interval["high"]
            # the edges count: a volume of exactly 0 is often certain
            result[name] = {"true_mm3": true, "width_mm3": high - low, "covered": bool(low <= true <= high)}
    return result


def _raters(
    arrays: CaseArrays,
    classes: Classes,
    masks: dict[str, NDArray[np.bool_]],
    truths: dict[str, list[NDArray[np.bool_]]],
    voxel_mm3: float,
) -> dict[str, Any]:
    """Return the metrics against several raters, of each class; without samples the segmentation is the only one."""
    result = {}
    for name, labels in classes.labels.items():
        samples = [_mask(each, labels, arrays.known) for each in arrays.samples] or [masks[name]]
        soft = masks[name].astype(np.float32)
        if arrays.probabilities is not None and labels in classes.heads:
            soft = arrays.probabilities[classes.heads.index(labels)] * arrays.known
        volume = float(soft.sum(dtype=np.float64) * voxel_mm3)
        volumes = [np.count_nonzero(each) * voxel_mm3 for each in truths[name]]
        result[name] = {
            "dice": [dice(masks[name], each) for each in truths[name]],
            "interrater_dice": raters.interrater_dice(truths[name]),
            "consensus_dice": raters.consensus_dice(masks[name], truths[name]),
            "soft_dice": raters.soft_dice_over_thresholds(soft, truths[name]),
            "staple_dice": raters.staple_dice(masks[name], truths[name]),
            "crps_mm3": raters.crps(volume, volumes),
            "crps_curvas_mm3": raters.crps(volume, volumes, "curvas"),
            "ged": raters.generalized_energy_distance(samples, truths[name]),
            "hungarian_iou": raters.hungarian_iou(samples, truths[name]),
        }
    return result
