"""Markdown report of the comparison: paired tables per class, false positives apart, and the repair test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from comparison_evaluation import CORRUPTIONS, NNUNET, Row

from nnunet_diffusion.evaluation.comparison import (
    PairedComparison,
    compare_paired,
    comparison_cells,
    markdown_table,
    number,
)

MEAN = "mean of the classes"
VESSELS = {"cldice": "clDice", "thin_recall": "Recall of vessels at most two voxels wide"}
PAIRED = ["cases", "left out", "mean", "median", "difference to nnU-Net", "95 % interval", "Wilcoxon p"]


@dataclass(frozen=True)
class Entry:
    """All rows of one model at one setting from one start, by case."""

    model: str
    setting: str
    start: str
    rows: dict[str, Row]

    @property
    def name(self) -> str:
        """Model and setting."""
        return f"{self.model}, {self.setting}" if self.setting else self.model


def write_report(rows: Sequence[Row], heading: str, seed: int) -> str:
    """Return the report; only cases that every entry of a table shares with nnU-Net are compared."""
    classes = list(dict.fromkeys(row.label for row in rows))
    parts = [heading]
    if len(classes) > 1:
        parts += [f"## Dice, {MEAN}\n", dice_table(mean_rows(rows), seed)]
    for label in classes:
        own = [row for row in rows if row.label == label]
        parts += [f"## Dice, {label}\n", dice_table(own, seed), f"## HD95 in mm, {label}\n", hd95_table(own, seed)]
        for key, title in VESSELS.items():
            known = [row for row in own if not np.isnan(getattr(row, key))]
            parts += [f"## {title}, {label}\n", plain_table(known, key, seed)] if known else []
        absent = false_positive_table(own)
        parts += [f"## Cases without {label}\n", absent] if absent else []
    parts += ["## Cost\n", cost_table(rows)]
    repaired = [row for row in rows if row.start in CORRUPTIONS]
    if repaired:
        parts += [
            "## Repair test\n\nStarts made from the truth instead of nnU-Net; Dice before and after.\n",
            repair_table(repaired, classes, seed),
        ]
    return "\n".join(parts)


def entries(rows: Sequence[Row]) -> list[Entry]:
    """Group the rows of one class by model, setting and start, in order of appearance."""
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((row.model, row.setting, row.start), {})[row.case] = row
    return [Entry(*key, cases) for key, cases in grouped.items()]


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """One row per case: mean Dice over the classes that it has, voxel counts summed over all classes."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return [
        Row(
            *group[0].key,
            label=MEAN,
            dice=_mean([row.dice for row in group if row.reference_voxels]),
            hd95=float("nan"),
            start_dice=_mean([row.start_dice for row in group if row.reference_voxels]),
            start_hd95=float("nan"),
            reference_voxels=sum(row.reference_voxels for row in group),
            predicted_voxels=sum(row.predicted_voxels for row in group),
            corrected=sum(row.corrected for row in group),
            broken=sum(row.broken for row in group),
            seconds=group[0].seconds,
            presegmentor_evaluations=group[0].presegmentor_evaluations,
            denoiser_evaluations=group[0].denoiser_evaluations,
        )
        for group in groups.values()
    ]


def dice_table(rows: Sequence[Row], seed: int) -> str:
    """Dice of the cases that have the class, paired with nnU-Net, with the voxels put right and wrong per case."""
    lines = []
    for entry, pairs, comparison in _paired(rows, "dice", seed):
        corrected, broken = (_mean([getattr(row, key) for row in pairs]) for key in ("corrected", "broken"))
        changes = ["-", "-"] if entry.model == NNUNET else [number(corrected, 1), number(broken, 1)]
        lines.append([entry.name, *_cells(entry, comparison, 4), *changes])
    return markdown_table(["model", *PAIRED, "voxels corrected", "voxels broken"], lines)


def plain_table(rows: Sequence[Row], key: str, seed: int) -> str:
    """A metric of the cases that have the class, paired with nnU-Net."""
    lines = [[entry.name, *_cells(entry, comparison, 4)] for entry, _, comparison in _paired(rows, key, seed)]
    return markdown_table(["model", *PAIRED], lines)


def hd95_table(rows: Sequence[Row], seed: int) -> str:
    """HD95 of the cases that have the class, paired with nnU-Net; the test counts a missed class as the largest distance."""
    lines = [
        [entry.name, *_cells(entry, comparison, 3), f"{comparison.candidate_infinite} ({comparison.baseline_infinite})"]
        for entry, _, comparison in _paired(rows, "hd95", seed)
    ]
    return markdown_table(["model", *PAIRED, "class missed (by nnU-Net)"], lines)


def false_positive_table(rows: Sequence[Row]) -> str:
    """Share of the cases without the class in which it is found, and its size there; empty where there are none."""
    lines = []
    for entry in entries([row for row in rows if row.start not in CORRUPTIONS and row.reference_voxels == 0]):
        sizes = np.array([row.predicted_voxels for row in entry.rows.values()])
        found = sizes[sizes > 0]
        size = number(float(found.mean()) if found.size else float("nan"), 1)
        lines.append([entry.name, str(sizes.size), f"{100 * found.size / sizes.size:.1f} %", size])
    return markdown_table(["model", "cases", "with false positives", "mean voxels in these"], lines) if lines else ""


def cost_table(rows: Sequence[Row]) -> str:
    """Seconds and network evaluations (tiles and mirrors counted) per case."""
    lines = []
    for entry in entries([row for row in rows if row.start not in CORRUPTIONS]):
        each = list(entry.rows.values())
        means = [
            _mean([getattr(row, key) for row in each])
            for key in Row.__dataclass_fields__
            if key.endswith("evaluations")
        ]
        seconds = _mean([row.seconds for row in each])
        lines.append([entry.name, number(seconds, 3), *[number(mean, 1) for mean in means]])
    return markdown_table(["model", "seconds", "nnU-Net evaluations", "denoiser evaluations"], lines)


def repair_table(rows: Sequence[Row], classes: Sequence[str], seed: int) -> str:
    """Dice before and after, per class and corrupted start."""
    lines = []
    for label in classes:
        for entry in entries([row for row in rows if row.label == label and row.reference_voxels > 0]):
            each = list(entry.rows.values())
            gain = compare_paired([row.dice for row in each], [row.start_dice for row in each], seed=seed)
            cases, _, after, _, difference, interval, p = comparison_cells(gain)
            name = [
                f"{entry.name}, {entry.start}",
                label,
                cases,
                number(gain.baseline_mean),
                after,
                difference,
                interval,
                p,
            ]
            lines.append(
                [*name, *(number(_mean([getattr(row, key) for row in each]), 1) for key in ("corrected", "broken"))]
            )
    header = ["model and start", "class", "cases", "before", "after", "gain", "95 % interval", "Wilcoxon p"]
    return markdown_table([*header, "voxels corrected", "voxels broken"], lines)


def _paired(rows: Sequence[Row], key: str, seed: int) -> list[tuple[Entry, list[Row], PairedComparison]]:
    found = entries([row for row in rows if row.start not in CORRUPTIONS and row.reference_voxels > 0])
    baseline = next((entry.rows for entry in found if entry.model == NNUNET), {})
    results = []
    for entry in found:
        shared = [case for case in entry.rows if case in baseline]
        candidate, reference = ([getattr(each[case], key) for case in shared] for each in (entry.rows, baseline))
        results.append((entry, [entry.rows[case] for case in shared], compare_paired(candidate, reference, seed=seed)))
    return results


def _cells(entry: Entry, comparison: PairedComparison, digits: int) -> list[str]:
    cells = comparison_cells(comparison, digits)
    return [*cells[:4], "-", "-", "-"] if entry.model == NNUNET else cells


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
