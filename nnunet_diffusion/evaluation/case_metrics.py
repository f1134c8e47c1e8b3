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
from nnunet_diffusion.evaluation.metrics import dice, mean_known, surface_metrics
from nnunet_diffusion.evaluation.uncertainty import auroc, band
from nnunet_diffusion.inference.level_sets import level_sets
from nnunet_diffusion.inference.uncertainty import AGREEMENT, entropy

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
        Dictionary with `classes` (name -> metrics), `dice` and `nsd` (means over the classes that are there, 1 if none is),
        `errors` (AUROC of each map), `scores`, and where the files are there `calibration`, `volumes`, `level_sets_mm3` (name
        -> volumes above the upper and from the lower level on, see `level_sets`) and `raters`.
    """
    tolerance = default_tolerance(arrays.spacing_mm) if tolerance_mm is None else tolerance_mm
    by_class, volumes, of_raters, sets = {}, {}, {}, {}
    intervals = arrays.numbers.get("volume_mm3", {}) if arrays.known.all() else {}
    # one class at a time: the masks of a hundred classes do not fit into memory together
    for name, labels in classes.labels.items():
        predicted = _mask(arrays.prediction, labels, arrays.known)
        truths = [_mask(truth, labels, arrays.known) for truth in arrays.truths]
        by_class[name] = class_numbers(predicted, truths[0], arrays.known, arrays.spacing_mm, tolerance)
        if name in intervals:
            volumes[name] = _interval(intervals[name], by_class[name]["true_mm3"])
        if arrays.probabilities is not None and labels in classes.heads:
            sets[name] = _level_sets(arrays, classes.heads.index(labels))
        if len(truths) > 1:
            of_raters[name] = _raters(arrays, classes, labels, predicted, truths)
    result: dict[str, Any] = {"tolerance_mm": tolerance, "classes": by_class}
    for key in ("dice", "nsd"):
        mean = mean_known([each[key] for each in by_class.values()])
        # nothing is there, and nothing was found
        result[key] = 1.0 if math.isnan(mean) else mean
    optional = {"volumes": volumes, "level_sets_mm3": sets, "raters": of_raters}
    return {**result, **_uncertainty(arrays, classes), **{key: each for key, each in optional.items() if each}}


def _uncertainty(arrays: CaseArrays, classes: Classes) -> dict[str, Any]:
    """Return calibration, where there are probabilities, the AUROC of each map, and the scores of the case."""
    result: dict[str, Any] = {}
    prediction, truth = arrays.compared(classes)
    near = arrays.known & band(prediction, truth, BAND_VOXELS)
    values, scores = {name: each[near] for name, each in arrays.maps.items()}, {}
    if arrays.probabilities is not None:
        result["calibration"] = _calibration(arrays, classes, near)
        values[ENTROPY] = entropy(torch.from_numpy(arrays.probabilities[:, near]), classes.regions).numpy()
        scores["confidence"] = confidence(arrays.probabilities, prediction, classes.regions)
    if arrays.numbers.get("score") is not None:
        scores["pairwise Dice"] = float(arrays.numbers["score"])
    wrong = wrong_voxels(prediction, truth, classes)[near]
    # agreement is high where the others are low
    errors = {name: auroc(-each if name == AGREEMENT else each, wrong) for name, each in sorted(values.items())}
    return {**result, "errors": errors, "scores": scores}


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
    hd95, nsd = surface_metrics(predicted, true, spacing_mm, tolerance_mm)
    return {
        "dice": dice(predicted, true),
        "iou": _share(tp, tp + fp + fn),
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, tp + fn),
        "fnr": _share(fn, tp + fn),
        "fpr": _share(fp, fp + tn),
        "hd95_mm": hd95,
        "nsd": nsd,
        "predicted_mm3": (tp + fp) * voxel_mm3,
        "true_mm3": (tp + fn) * voxel_mm3,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _mask(label_map: NDArray, labels: Sequence[int], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.isin(label_map, labels) & known


def wrong_voxels(prediction: NDArray, truth: NDArray, classes: Classes) -> NDArray[np.bool_]:
    """Return where a prediction has another class than the truth, or is in other regions (*image)."""
    wrong = np.zeros(truth.shape, bool)
    for labels in classes.labels.values():
        wrong |= np.isin(prediction, labels) != np.isin(truth, labels)
    return wrong


def confidence(probabilities: NDArray, segmentation: NDArray, regions: bool) -> float:
    """Return a score without truth: the mean confidence near the borders of the segmentation, 0..1.

    The confidence of a voxel is the probability of its most likely class (for regions the mean over them of max(p, 1 - p)).
    Of a segmentation without border it is that of the least certain voxel, so that a missed lesion is not trusted.

    Args:
        probabilities: (K, *image).
        segmentation: label map (*image).
        regions: whether the heads are regions.
    """
    near = band(segmentation, segmentation, BAND_VOXELS)
    found = near.any()
    values = probabilities[:, near] if found else probabilities.reshape(len(probabilities), -1)
    top = np.maximum(values, 1 - values).mean(0) if regions else values.max(0)
    return float(top.mean() if found else top.min())


def _calibration(arrays: CaseArrays, classes: Classes, near: NDArray[np.bool_]) -> dict[str, Any]:
    """Return calibration in the band and in the box around the foreground, the latter as the mean over raters."""
    labels = [label for each in classes.labels.values() for label in each]
    box = around([np.isin(truth, labels) for truth in arrays.truths]) & arrays.known
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
    """Return probabilities (K, N) and labels (N,) of the voxels of a mask."""
    assert arrays.probabilities is not None
    masks = np.stack([np.isin(truth[where], labels) for labels in classes.heads])
    return calibration.problem(arrays.probabilities[:, where], masks, classes.regions)


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


def _interval(interval: dict[str, Any], true_mm3: float) -> dict[str, Any]:
    """Return whether an interval of the volume holds the true one, its width, and what it is."""
    low, high = interval["low"], interval["high"]
    # the ends count: a volume of exactly 0 is often certain
    return {"width_mm3": high - low, "covered": bool(low <= true_mm3 <= high), "interval": interval["interval"]}


def _level_sets(arrays: CaseArrays, head: int) -> list[list[float]]:
    assert arrays.probabilities is not None
    sets = level_sets(torch.from_numpy(arrays.probabilities[head][arrays.known])[None])[0]
    return [(each * math.prod(arrays.spacing_mm)).tolist() for each in sets]


def _raters(
    arrays: CaseArrays,
    classes: Classes,
    labels: tuple[int, ...],
    predicted: NDArray[np.bool_],
    truths: list[NDArray[np.bool_]],
) -> dict[str, Any]:
    """Return the metrics of one class against several raters; without samples the segmentation is the only one."""
    voxel_mm3 = math.prod(arrays.spacing_mm)
    samples = [_mask(each, labels, arrays.known) for each in arrays.samples] or [predicted]
    soft = predicted.astype(np.float32)
    if arrays.probabilities is not None and labels in classes.heads:
        soft = arrays.probabilities[classes.heads.index(labels)] * arrays.known
    volume = float(soft.sum(dtype=np.float64) * voxel_mm3)
    volumes = [float(np.count_nonzero(each) * voxel_mm3) for each in truths]
    return {
        "dice": [dice(predicted, each) for each in truths],
        "interrater_dice": raters.interrater_dice(truths),
        "consensus_dice": raters.consensus_dice(predicted, truths),
        "soft_dice": raters.soft_dice_over_thresholds(soft, truths),
        "staple_dice": raters.staple_dice(predicted, truths),
        "crps_mm3": raters.crps(volume, volumes),
        "crps_curvas_mm3": raters.crps(volume, volumes, "curvas"),
        "ged": raters.generalized_energy_distance(samples, truths),
        "hungarian_iou": raters.hungarian_iou(samples, truths),
    }
