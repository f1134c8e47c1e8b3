"""The page of an evaluation: one HTML file with its pictures inside, which opens without a network."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_diffusion.evaluation.comparison import number

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: right; border-bottom: 1px solid #eee; } th { color: #555; font-weight: 600; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; } .wide { overflow-x: auto; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; } img { max-width: 100%; }
figcaption, .note { color: #555; font-size: .85rem; }
"""
NAMES = {
    "dice": "Dice", "nsd": "surface Dice", "iou": "IoU", "precision": "precision", "recall": "recall", "fnr": "FNR",
    "fpr": "FPR", "hd95_mm": "HD95 (mm)", "ece": "ECE", "ace": "ACE", "brier": "Brier", "nll": "NLL",
    "interrater_dice": "Dice between raters", "consensus_dice": "consensus Dice", "soft_dice": "Dice over thresholds",
    "staple_dice": "Dice against STAPLE", "crps_mm3": "CRPS (mm³)",
    "crps_curvas_mm3": "CRPS, CURVAS (mm³)", "ged": "GED", "hungarian_iou": "matched IoU", "auroc": "AUROC",
}  # fmt: skip
"""Key -> heading."""
LEVEL_SETS = (
    "Level sets: the volumes where the probability is above a high and above a low level. The two are as far apart as the "
    "other half of the cases needs, so that nine of ten true volumes lie between them (split conformal prediction)."
)


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        caption: text below it.
        content: content of a PNG file.
    """

    caption: str
    content: bytes


def page(
    title: str,
    summaries: Mapping[str, Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
    curves: Sequence[Picture],
    cases: Sequence[Picture],
    notes: Sequence[str] = (),
) -> str:
    """Return the HTML of the page.

    Args:
        title: heading.
        summaries: name of each prediction -> its summary, from `summarise`.
        comparison: of two predictions, from `compare`; None for one.
        curves: diagrams.
        cases: pictures of single cases.
        notes: what was left out, or failed.
    """
    sections = [f"<h1>{html.escape(title)}</h1>"]
    sections += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    sections += ["<h2>Overview</h2>", _overview(summaries)]
    for name, summary in summaries.items():
        sections += [f"<h2>Classes: {html.escape(name)}</h2>", _classes(summary)]
    if comparison is not None:
        sections += [f"<h2>{html.escape(' against '.join(summaries))}</h2>", _comparison(comparison)]
    for name, summary in summaries.items():
        parts = [_calibration(summary), _errors(summary), _failure(summary), _volumes(summary), _raters(summary)]
        if any(parts):
            sections += [f"<h2>Uncertainty: {html.escape(name)}</h2>", *(part for part in parts if part)]
    for heading, pictures in (
        ("Diagrams", curves),
        ("Cases of lowest and highest Dice, the slice with most errors", cases),
    ):
        if pictures:
            sections += [f"<h2>{heading}</h2>", *(_figure(each) for each in pictures)]
    body = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode("ascii")
    text = html.escape(picture.caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(each)}</{tag}>" for each in cells) + "</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<div class="wide"><table>{"".join(lines)}</table></div>{below}'


def _number(value: float | None, digits: int = 4) -> str:
    return number(math.nan if value is None or math.isinf(value) else value, digits)


def with_interval(spread: Mapping[str, float], digits: int = 4) -> str:
    """Write a mean with its interval."""
    if not math.isfinite(spread["mean"]):
        return "-"
    return f"{_number(spread['mean'], digits)} ({_number(spread['low'], digits)} to {_number(spread['high'], digits)})"


def _overview(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            name,
            str(each["cases"]),
            with_interval(each["dice"]),
            _number(each["dice"]["median"]),
            with_interval(each["nsd"]),
        ]
        for name, each in summaries.items()
    ]
    return _table(
        ["prediction", "cases", "mean Dice (95 % interval)", "median", "surface Dice"],
        rows,
        "Dice of a case is the mean over its classes; a class that neither truth nor prediction has does not count, and a case "
        "without any counts 1. The interval is a bootstrap over cases.",
    )


def _classes(summary: Mapping[str, Any]) -> str:
    plain = ("iou", "precision", "recall", "fnr", "fpr", "hd95_mm")
    header = ["class", "cases", "Dice", "surface Dice", *(NAMES[key] for key in plain), "missed", "false alarms"]
    rows = [
        [
            name,
            str(each["cases"]),
            with_interval(each["dice"]),
            with_interval(each["nsd"]),
            *(_number(each[key]) for key in plain),
            str(each["missed"]),
            f"{each['false_alarms']} of {each['normal_cases']}" if each["normal_cases"] else "-",
        ]
        for name, each in summary["classes"].items()
    ]
    return _table(
        header,
        rows,
        "Means over the cases that truly have the class; a miss counts 0, and is not in HD95. False alarms are those among the "
        "cases without the class.",
    )


def _comparison(comparison: Mapping[str, Any]) -> str:
    rows = [
        [
            " ".join([NAMES.get(metric.split()[0], metric.split()[0]), *metric.split()[1:]]),
            str(each["cases"]),
            str(each["undefined"] + each["infinite"]),
            _number(each["candidate_mean"]),
            _number(each["baseline_mean"]),
            f"{each['mean_difference']:+.4f}" if math.isfinite(each["mean_difference"]) else "-",
            f"{_number(each['interval'][0])} to {_number(each['interval'][1])}",
            "-" if not math.isfinite(each["p_value"]) else f"{each['p_value']:.2g}",
            f"{each['better']} / {each['worse']}",
        ]
        for metric, each in comparison.items()
    ]
    header = [
        "metric",
        "cases",
        "left out",
        "first",
        "second",
        "difference",
        "95 % interval",
        "Wilcoxon p",
        "better / worse",
    ]
    return _table(
        header,
        rows,
        "Left out of the means are cases in which a value is not defined, or infinite (HD95 of a miss, which the test takes as "
        "the largest difference). Better and worse count the cases in which the first is better; for Dice by more than one "
        "point.",
    )


def _calibration(summary: Mapping[str, Any]) -> str:
    if "calibration" not in summary:
        return ""
    found, keys = summary["calibration"], ("ece", "ace", "brier", "nll")
    rows = [
        [
            f"voxels of the {where}",
            str(found[where]["ece"]["cases"]),
            *(with_interval(found[where][key]) for key in keys),
        ]
        for where in ("band", "box")
    ]
    tempered = ""
    if "pooled_ece_tempered" in found:
        temperatures = " and ".join(f"{each:.2f}" for each in found["temperatures"])
        ece = _number(found["pooled_ece_tempered"])
        tempered = f"; with a temperature fitted on the other half of the cases ({temperatures}) {ece}"
    return "<h3>Calibration</h3>" + _table(
        ["", "cases", *(NAMES[key] for key in keys)],
        rows,
        "Means over cases. The band is within 5 voxels of a border of truth or prediction, the box 20 voxels around the true "
        f"foreground. ECE of all cases' bands together: {_number(found['pooled_ece'])}{tempered}.",
    )


def _errors(summary: Mapping[str, Any]) -> str:
    if not summary.get("errors"):
        return ""
    rows = [[name, str(each["cases"]), with_interval(each)] for name, each in summary["errors"].items()]
    return "<h3>Does it find the wrong voxels?</h3>" + _table(
        ["map", "cases", "AUROC in the band"],
        rows,
        "0.5 knows nothing, 1 ranks every wrong voxel above every right one. The entropy of the probabilities is that of the "
        ".npz; the others are the maps beside the segmentations, which a temperature does not change.",
    )


def _failure(summary: Mapping[str, Any]) -> str:
    if not summary.get("failure_detection"):
        return ""
    keys = ("aurc", "random", "optimal", "normalised", "spearman", "pearson")
    rows = [
        [name, str(each["cases"]), *(_number(each.get(key)) for key in keys)]
        for name, each in summary["failure_detection"].items()
    ]
    return "<h3>Does it find the poor cases?</h3>" + _table(
        ["score", "cases", "AURC", "at random", "best possible", "normalised", "Spearman", "Pearson"],
        rows,
        "AURC is the area under the mean risk (1 - Dice) of the most trusted cases; normalised, 1 is the best possible, 0 "
        "knows nothing, and below 0 is worse than chance.",
    )


def _volumes(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            source,
            str(each["cases"]),
            each["interval"],
            _number(each["coverage"], 2),
            _number(each["mean_width_mm3"], 1),
            _number(each["mean_true_mm3"], 1),
            _number(each["mean_predicted_mm3"], 1),
        ]
        for key, source in (("volumes", "predict --uncertainty"), ("volumes_of_level_sets", "level sets of the .npz"))
        for name, each in summary.get(key, {}).items()
    ]
    if not rows:
        return ""
    header = [
        "class",
        "source",
        "cases",
        "interval",
        "share of true volumes in it",
        "mean width (mm³)",
        "mean true volume (mm³)",
        "mean volume of the segmentations (mm³)",
    ]
    return "<h3>Volumes</h3>" + _table(
        header,
        rows,
        LEVEL_SETS if "volumes_of_level_sets" in summary else "",
    )


def _raters(summary: Mapping[str, Any]) -> str:
    if not summary.get("raters"):
        return ""
    parts = []
    for name, each in summary["raters"].items():
        rows = [[f"Dice against rater {place + 1}", with_interval(found)] for place, found in enumerate(each["dice"])]
        rows += [
            [NAMES[key], with_interval(found, 1 if key.startswith("crps") else 4)]
            for key, found in each.items()
            if key != "dice"
        ]
        parts.append(_table([name, "mean (95 % interval)"], rows))
    return "<h3>Several raters</h3>" + "".join(parts)
