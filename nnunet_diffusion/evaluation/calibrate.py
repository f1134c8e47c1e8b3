"""Calibration of a model on the validation cases of its folds: temperature (Guo et al. 2017), and intervals of volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_diffusion.evaluation import calibration
from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase
from nnunet_diffusion.evaluation.uncertainty import band
from nnunet_diffusion.inference.level_sets import HALF_WIDTHS, conformal, fewest_cases, level_sets, needed
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import one_hot
from nnunet_diffusion.inference.report import foreground_names
from nnunet_diffusion.model import labels


@dataclass(frozen=True, eq=False)
class CaseSums:
    """What the fit needs of one case.

    Attributes:
        tempering: sums over its voxels near borders at each temperature.
        half_widths: for each foreground class the place of the level sets that its true volume needs.
    """

    tempering: calibration.Tempering
    half_widths: list[int]


@dataclass(frozen=True)
class Fit:
    """Calibration of voxels near borders, without and with a temperature, and of the volumes.

    Attributes:
        temperature: that of least negative log-likelihood over all cases.
        cases: names of the cases.
        nll: negative log-likelihood in nats, as it was, and with the temperature of the other half of the cases.
        ece: expected calibration error, likewise.
        half_widths: of the level sets of each foreground class, in log-odds; empty with too few cases.
    """

    temperature: float
    cases: list[str]
    nll: tuple[float, float]
    ece: tuple[float, float]
    half_widths: tuple[float, ...]

    @property
    def is_at_an_end(self) -> bool:
        """Whether the temperature is the lowest or highest candidate."""
        return self.temperature in (calibration.TEMPERATURES[0], calibration.TEMPERATURES[-1])

    def table(self) -> str:
        """Return a markdown table."""
        rows = [
            [name, f"{self.nll[place]:.4f}", f"{self.ece[place]:.4f}"]
            for place, name in enumerate(("uncalibrated", "temperature of the other half of the cases"))
        ]
        return markdown_table(["probabilities", "NLL", "ECE"], rows)

    def about_volumes(self, names: Sequence[str]) -> str:
        """Return a sentence on the intervals of the volumes.

        Args:
            names: of the foreground classes.
        """
        if not self.half_widths:
            return (
                f"Intervals of the volumes need {fewest_cases()} cases, and there are {len(self.cases)}: they stay those of "
                "the samples."
            )
        # the levels are 1 - 1 / (1 + exp(-x)) and 1 / (1 + exp(-x))
        found = [
            f"{name} the whole image (no level holds it)"
            if each == HALF_WIDTHS[-1]
            else f"{name} {1 / (1 + np.exp(-each)):.3g} and {1 / (1 + np.exp(each)):.3g}"
            for name, each in zip(names, self.half_widths, strict=True)
        ]
        return (
            f"The interval of a volume goes from the voxels above a high to those above a low probability: {', '.join(found)}. "
            f"It is made to hold nine of ten true volumes, by {len(self.cases)} cases; more cases allow a narrower one."
        )


def fit(
    predictor_of: Mapping[str, DiffusionPredictor],
    cases: Sequence[tuple[str, str]],
    load: Callable[[str], PreprocessedCase],
    on_case: Callable[[str], object] = lambda name: None,
) -> Fit:
    """Predict the validation cases of a model's folds, and fit the temperature to the voxels near borders.

    Args:
        predictor_of: fold -> predictor with that fold of the model.
        cases: (fold, name) of at least two cases, each of a fold that was not trained on it.
        load: returns a case of that name.
        on_case: called with the name of each case when it begins.

    Raises:
        ValueError: fewer than two cases, or no voxel near a border in them.
    """
    if len(cases) < 2:
        raise ValueError(
            f"calibration got {len(cases)} cases, but needs two: one half of them measures the other's fit"
        )
    found = []
    for fold, name in cases:
        on_case(name)
        found.append(sums_of(predictor_of[fold], load(name)))
    return fit_sums(found, [name for _, name in cases])


def fit_sums(cases: Sequence[CaseSums], names: Sequence[str]) -> Fit:
    """Return the fit of cases whose sums are known; see `fit`."""
    sums = [case.tempering for case in cases]
    everything = calibration.total(sums)
    voxels = everything.reliability[0].voxels.sum()
    if not voxels:
        raise ValueError("no case has a voxel near a border of truth or segmentation, so there is nothing to calibrate")
    one = calibration.TEMPERATURES.index(1.0)
    unseen = calibration.crossed(sums)
    of_classes = zip(*(case.half_widths for case in cases), strict=True)
    enough = len(cases) >= fewest_cases()
    return Fit(
        calibration.TEMPERATURES[everything.best()],
        list(names),
        (float(everything.loss[one] / voxels), float(unseen.loss / voxels)),
        (everything.reliability[one].ece(), unseen.reliability.ece()),
        tuple(HALF_WIDTHS[conformal(places)] for places in of_classes) if enough else (),
    )


def sums_of(predictor: DiffusionPredictor, case: PreprocessedCase) -> CaseSums:
    """Return the sums of one case, on the network's grid."""
    regions, manager = predictor.network.settings.regions, predictor.label_manager
    logits = predictor.predict_volume(torch.from_numpy(case.image)).logits
    probabilities = labels.activate(logits[None], regions)[0].numpy()
    truth = np.maximum(case.truth, 0)
    segmentation = np.asarray(manager.convert_probabilities_to_segmentation(probabilities))
    known = truth != manager.ignore_label if manager.has_ignore_label else np.ones(truth.shape, bool)
    # no border where the truth is not known
    near = known & band(segmentation, np.where(known, truth, segmentation))
    masks = one_hot(truth[near], manager) > 0
    tempering = calibration.tempering(*calibration.problem(probabilities[:, near], masks, regions))
    classes = len(foreground_names(manager))
    sets = level_sets(torch.from_numpy(probabilities[-classes:][:, known]))
    volumes = one_hot(truth[known], manager)[-classes:].sum(1, dtype=np.float64)
    return CaseSums(tempering, [needed(each, volume) for each, volume in zip(sets, volumes, strict=True)])
