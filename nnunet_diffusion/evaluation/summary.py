"""Summary of the numbers of many cases, and the comparison of two predictions of the same cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_diffusion.evaluation.calibration import TEMPERATURES, Reliability, Tempering, crossed, total
from nnunet_diffusion.evaluation.comparison import bootstrap_interval, compare_paired
from nnunet_diffusion.evaluation.failure_detection import failure_detection
from nnunet_diffusion.inference.level_sets import COVERAGE, conformal, fewest_cases, needed

Cases = Mapping[str, Mapping[str, Any]]
"""Name of each case -> what `measure_case` returned, with NaN where JSON has null."""
POINT = 0.01
"""Difference of Dice from which a case counts as better or worse."""


def summarise(cases: Cases, seed: int = 0) -> dict[str, Any]:
    """Return the summary of all cases as JSON; the seed is that of the bootstrap over cases.

    Dice and surface Dice of a class are means over the cases that truly have it, where a miss counts 0. Cases without it are
    counted apart: in `normal_cases`, of which `false_alarms` have the class in the prediction.
    """
    ordered = list(cases.values())
    names = list(ordered[0]["classes"])
    summary: dict[str, Any] = {
        "cases": len(ordered),
        "dice": spread([each["dice"] for each in ordered], seed),
        "nsd": spread([each["nsd"] for each in ordered], seed),
        "classes": {name: _of_class([each["classes"][name] for each in ordered], seed) for name in names},
    }
    with_probabilities = [each["calibration"] for each in ordered if "calibration" in each]
    if with_probabilities:
        summary["calibration"] = _calibration(with_probabilities, seed)
    if maps := sorted({name for each in ordered for name in each["errors"]}):
        summary["errors"] = {
            name: spread([each["errors"].get(name, math.nan) for each in ordered], seed) for name in maps
        }
    if scores := sorted({name for each in ordered for name in each["scores"]}):
        summary["failure_detection"] = {name: _failure(ordered, name) for name in scores}
    if any("volumes" in each for each in ordered):
        summary["volumes"] = _volumes(ordered, names)
    with_sets = [each for each in ordered if "level_sets_mm3" in each]
    if len(with_sets) >= 2 * fewest_cases():
        summary["volumes_of_level_sets"] = {name: _crossed_volumes(with_sets, name) for name in names}
    if "raters" in ordered[0]:
        summary["raters"] = {name: _raters([each["raters"][name] for each in ordered], seed) for name in names}
    return summary


def spread(values: Iterable[float], seed: int = 0) -> dict[str, float]:
    """Return number, mean, median and the 95 % bootstrap interval of the mean of all finite values."""
    finite = np.array([each for each in values if math.isfinite(each)])
    low, high = bootstrap_interval(finite, seed=seed)
    return {
        "cases": len(finite),
        "mean": float(finite.mean()) if len(finite) else math.nan,
        "median": float(np.median(finite)) if len(finite) else math.nan,
        "low": low,
        "high": high,
    }


def _of_class(cases: Sequence[Mapping[str, float]], seed: int) -> dict[str, Any]:
    there = [each for each in cases if each["true_mm3"] > 0]
    normal = [each for each in cases if each["true_mm3"] == 0]
    result: dict[str, Any] = {key: spread([each[key] for each in there], seed) for key in ("dice", "nsd")}
    for key in ("iou", "precision", "recall", "fnr", "fpr", "hd95_mm"):
        result[key] = spread([each[key] for each in there], seed)["mean"]
    return result | {
        "cases": len(there),
        # their HD95 is infinite, and not in the mean
        "missed": sum(each["predicted_mm3"] == 0 for each in there),
        "normal_cases": len(normal),
        "false_alarms": sum(each["predicted_mm3"] > 0 for each in normal),
    }


def _calibration(cases: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        where: {key: spread([each[where][key] for each in cases], seed) for key in ("ece", "ace", "brier", "nll")}
        for where in ("band", "box")
    }
    sums = [tempering_of(each["sums"]) for each in cases]
    one = TEMPERATURES.index(1.0)
    pooled = total(sums).reliability[one]
    result["pooled_ece"] = pooled.ece()
    result["reliability"] = [pooled.voxels.tolist(), pooled.confidence.tolist(), pooled.right.tolist()]
    if len(sums) > 1:
        unseen = crossed(sums)
        result["temperatures"] = list(unseen.temperatures)
        result["pooled_ece_tempered"] = unseen.reliability.ece()
    return result


def tempering_of(sums: Mapping[str, Any]) -> Tempering:
    """Return the sums of a case as `measure_case` wrote them."""
    return Tempering(
        np.array(sums["loss"]), [Reliability(*(np.array(each) for each in entry)) for entry in sums["reliability"]]
    )


def risks(cases: Sequence[Mapping[str, Any]], score: str) -> tuple[list[float], list[float]]:
    """Return score and risk, 1 - mean Dice, of the cases that have the score."""
    known = [each for each in cases if score in each["scores"]]
    return [each["scores"][score] for each in known], [1 - each["dice"] for each in known]


def _failure(cases: Sequence[Mapping[str, Any]], score: str) -> dict[str, Any]:
    scores, risk = risks(cases, score)
    return dataclasses.asdict(failure_detection(scores, risk)) if scores else {"cases": 0}


def _volumes(cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    result = {}
    for name in names:
        there = [each for each in cases if name in each.get("volumes", {})]
        found = [each["volumes"][name] for each in there]
        if found:
            result[name] = {
                "cases": len(found),
                "interval": ", ".join(sorted({each["interval"] for each in found})),
                "coverage": float(np.mean([each["covered"] for each in found])),
                "mean_width_mm3": float(np.mean([each["width_mm3"] for each in found])),
                "mean_true_mm3": float(np.mean([each["classes"][name]["true_mm3"] for each in there])),
                "mean_predicted_mm3": float(np.mean([each["classes"][name]["predicted_mm3"] for each in there])),
            }
    return result


def _crossed_volumes(cases: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return the intervals between level sets, each half of the cases with the half width that the other half needs."""
    sets = [np.array(each["level_sets_mm3"][name]) for each in cases]
    true = [each["classes"][name]["true_mm3"] for each in cases]
    places = [needed(each, volume) for each, volume in zip(sets, true, strict=True)]
    chosen = conformal(places[1::2]), conformal(places[::2])
    intervals = [sets[number][:, chosen[number % 2]] for number in range(len(cases))]
    return {
        "cases": len(cases),
        "interval": f"{round(100 * COVERAGE)} %, fitted to the other half",
        "coverage": float(np.mean([low <= each <= high for (low, high), each in zip(intervals, true, strict=True)])),
        "mean_width_mm3": float(np.mean([high - low for low, high in intervals])),
        "mean_true_mm3": float(np.mean(true)),
        "mean_predicted_mm3": float(np.mean([each["classes"][name]["predicted_mm3"] for each in cases])),
    }


def _raters(cases: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {key: spread([each[key] for each in cases], seed) for key in cases[0] if key != "dice"}
    result["dice"] = [spread(each, seed) for each in zip(*(case["dice"] for case in cases), strict=True)]
    return result


def compare(candidate: Cases, baseline: Cases, seed: int = 0) -> dict[str, Any]:
    """Compare two predictions of the same cases, metric by metric.

    Args:
        candidate: numbers of one prediction.
        baseline: numbers of the other.
        seed: of the bootstrap.

    Returns:
        metric -> the fields of `PairedComparison`, and how many cases are better and worse (Dice: by more than one point).

    Raises:
        ValueError: the predictions have other cases.
    """
    if set(candidate) != set(baseline):
        other = sorted(set(candidate) ^ set(baseline))[0]
        raise ValueError(f"only one of the predictions has {other}: compare predictions of the same cases")
    pairs = [(candidate[name], baseline[name]) for name in candidate]
    result = {}
    for metric, values in _paired_values(pairs).items():
        first, second = (np.array([each[side] for each in values]) for side in (0, 1))
        compared = dataclasses.asdict(compare_paired(first, second, seed=seed))
        gain = (first - second) * (1 if _higher_is_better(metric) else -1)
        limit = POINT if metric.startswith("dice") else 0.0
        compared |= {"better": int((gain > limit).sum()), "worse": int((gain < -limit).sum())}
        compared["interval"] = list(compared["interval"])
        result[metric] = compared
    return result


def _higher_is_better(metric: str) -> bool:
    return not metric.startswith(("hd95", "ece", "nll"))


def _dice_of(case: Mapping[str, Any], name: str) -> float:
    dice = case["classes"][name]["dice"]
    return 1.0 if math.isnan(dice) else dice


def _paired_values(pairs: Sequence[tuple[Any, Any]]) -> dict[str, list[tuple[float, float]]]:
    result = {key: [(one[key], two[key]) for one, two in pairs] for key in ("dice", "nsd")}
    for name in pairs[0][0]["classes"] if len(pairs[0][0]["classes"]) > 1 else ():
        # 1 where neither truth nor prediction has the class, so that a false alarm is a difference
        result[f"dice of {name}"] = [(_dice_of(one, name), _dice_of(two, name)) for one, two in pairs]
    for name in pairs[0][0]["classes"]:
        result[f"hd95_mm of {name}"] = [tuple(each["classes"][name]["hd95_mm"] for each in pair) for pair in pairs]
    if all("calibration" in each for pair in pairs for each in pair):
        for key in ("ece", "nll"):
            result[f"{key} in the band"] = [tuple(each["calibration"]["band"][key] for each in pair) for pair in pairs]
    for name in sorted(set(pairs[0][0]["errors"]) & set(pairs[0][1]["errors"])):
        result[f"auroc of {name}"] = [tuple(each["errors"].get(name, math.nan) for each in pair) for pair in pairs]
    return result
