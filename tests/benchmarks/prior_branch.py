"""What does PGDiffSeg's prior branch know, and would its presence head be a better gate against false alarms?

On the validation cases of one fold, on the preprocessed grid: AUROC of the presence head and of the result's largest
probability ("does the case show the class"), Dice of the location map, and Dice, lesions lost and false alarms when the class
is left out below a threshold of either. Thresholds are chosen on one half of the cases and measured on the other, both ways.

    python tests/benchmarks/prior_branch.py -m MODEL_FOLDER -f 0 -device cpu --csv prior_branch.csv
"""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_options import model_parser
from numpy.typing import NDArray

from nnunet_diffusion.cli.models import with_validation_cases
from nnunet_diffusion.evaluation.comparison import markdown_table, number
from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.evaluation.uncertainty import auroc
from nnunet_diffusion.explain.explanation import prior_branch, share_inside
from nnunet_diffusion.inference.volume import VolumeProcess
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model import labels

THRESHOLDS = np.r_[0.0, 0.01, 0.02, np.arange(1, 20) / 20, 0.98, 0.99]
GATES = ("presence", "largest", "product")


@dataclass(frozen=True)
class Measured:
    """One class in one case.

    `location` is the Dice of the location map above 0.5, `inside` the share of the presence head's heat inside the truth, and
    `chance` the share of the image that the truth has.
    """

    case: str
    label: str
    shown: bool
    found: bool
    dice: float
    presence: float
    largest: float
    location: float
    inside: float
    chance: float

    @property
    def product(self) -> float:
        """Of both scores."""
        return self.presence * self.largest


def main() -> None:
    """Measure one model, print the tables and write the CSV file."""
    parser = model_parser(__doc__)
    add = parser.add_argument
    add("--csv", type=Path, help="file for the numbers of each case")
    options = parser.parse_args()
    predictor, found, load = with_validation_cases(options.m, [options.f], options, os.environ)
    rows = [row for name in found[options.f] for row in measure(predictor, load(name))]
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    for label in dict.fromkeys(row.label for row in rows):
        print(f"\n{label}\n{knowledge([row for row in rows if row.label == label])}")
    print(gating(rows))


def measure(predictor: Any, case: Any) -> list[Measured]:
    """Return what is found of each foreground class in one case."""
    network, manager = predictor.network, predictor.label_manager
    if network.settings.regions or manager.has_ignore_label:
        raise NotImplementedError("the benchmark knows classes without an ignore label")
    run = VolumeRun(predictor, torch.from_numpy(case.image))
    mean = labels.activate(run.predict().logits[None])[0].numpy()
    segmentation = mean.argmax(0)
    process = VolumeProcess(network, run.data, run.tiling, run.presegmented, 0, torch.device("cpu"))
    rows = []
    for head in range(1, len(mean)):
        prior = prior_branch(process, head, tuple(run.unpad[1:]))
        if prior is None:
            raise NotImplementedError("the denoiser has no prior branch")
        truth, mask = case.truth == head, segmentation == head
        largest, location = float(mean[head].max()), dice(prior.location > 0.5, truth)
        both = bool(truth.any()), bool(mask.any())
        heat = share_inside(prior.presence_heat, truth), float(truth.mean())
        rows.append(Measured(case.name, str(head), *both, dice(mask, truth), prior.presence, largest, location, *heat))
    return rows


def knowledge(rows: list[Measured]) -> str:
    """Return the table of one class: AUROC of both scores, Dice of the location map and of the result."""
    shown = np.array([row.shown for row in rows])
    scores = [np.array([getattr(row, key) for row in rows]) for key in GATES]
    areas = [number(auroc(score, shown)) if 0 < shown.sum() < len(shown) else "-" for score in scores]
    with_class = [row for row in rows if row.shown]
    parts = [np.nanmean([getattr(row, key) for row in with_class]) for key in ("location", "dice", "inside", "chance")]
    header = [
        "cases",
        "with the class",
        *[f"AUROC of the {name}" for name in GATES],
        "Dice of the location map",
        "of the result",
        "heat of the presence head inside the truth",
        "chance",
    ]
    return markdown_table(header, [[str(len(rows)), str(len(with_class)), *areas, *map(number, parts)]])


def gated(rows: list[Measured], key: str, threshold: float) -> NDArray[np.float64]:
    """Return score, loss and false alarm of each row, (rows, 3): Dice, or 1 where the class is rightly not found."""
    found = np.array([row.found and getattr(row, key) >= threshold for row in rows])
    shown = np.array([row.shown for row in rows])
    overlap = np.nan_to_num([row.dice for row in rows])
    score = np.where(shown, np.where(found, overlap, 0.0), ~found)
    return np.stack([score, shown & ~found, ~shown & found], 1).astype(np.float64)


def gating(rows: list[Measured]) -> str:
    """Return the table of gates, each with thresholds chosen on the other half of the cases."""
    cases = sorted({row.case for row in rows})
    halves = [[row for row in rows if cases.index(row.case) % 2 == half] for half in (0, 1)]
    table = [("none", "-", gated(rows, "presence", 0.0))]
    for key in GATES:
        chosen = [max(THRESHOLDS, key=lambda value: (gated(half, key, value)[:, 0].mean(), -value)) for half in halves]
        crossed = [gated(half, key, threshold) for half, threshold in zip(halves, reversed(chosen), strict=True)]
        table.append((key, " and ".join(f"{each:g}" for each in chosen), np.concatenate(crossed)))
    lines = [
        [name, threshold, number(found[:, 0].mean()), f"{found[:, 1].sum():.0f}", f"{found[:, 2].sum():.0f}"]
        for name, threshold, found in table
    ]
    return markdown_table(["gate", "thresholds", "Dice, 1 if rightly empty", "not found", "false alarms"], lines)


if __name__ == "__main__":
    main()
