"""The cases of a publication's figures: which ones, which slice of a volume, and what is drawn of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.folders import TRUTH, CasePaths, Classes, read_case
from nnunet_diffusion.explain.comparison_figure import ComparisonRow, ProcessRow
from nnunet_diffusion.explain.evaluation_figures import worst_slice
from nnunet_diffusion.explain.figures import ReportRow
from nnunet_diffusion.explain.reverse_process import reverse_process
from nnunet_diffusion.explain.uncertainty_figure import plane_name
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.cases import CaseFiles, prepare_case
from nnunet_diffusion.inference.presegmentation import check_geometry, check_shape, one_hot
from nnunet_diffusion.inference.reading import read_images, without_thickness
from nnunet_diffusion.inference.report import foreground_names
from nnunet_diffusion.model.labels import foreground, probabilities_to_logits

COLOURS_IN_A_FILE = 3


def choose_cases(dice: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Choose the cases with the highest, the lowest and the median difference in Dice.

    Args:
        dice: for each folder of predictions, case -> mean foreground Dice; all with the same cases, at least one. The
            difference is that of the last folder minus the first; of one folder it is the Dice itself.

    Returns:
        Case -> why it is shown, in the order highest, lowest, median; fewer than three if there are fewer cases. Of an even
        number of cases, the median is the higher of the two in the middle. Equal cases come in the order of their names.
    """
    first, last = dice[0], dice[-1]
    values = {case: last[case] - first[case] for case in first} if len(dice) > 1 else dict(first)
    ranked = sorted(values, key=lambda case: (-values[case], case))
    if len(ranked) == 1:
        return {ranked[0]: "only case"}
    highest, lowest, median = ranked[0], ranked[-1], ranked[(len(ranked) - 1) // 2]
    words = ("best Dice", "worst Dice", "median Dice")
    if len(dice) > 1:
        words = (
            _change("largest gain", "smallest loss", values[highest]),
            _change("smallest gain", "largest loss", values[lowest]),
            "median difference",
        )
    chosen: dict[str, str] = {}
    for case, why in zip((highest, lowest, median), words, strict=True):
        chosen.setdefault(case, why)
    return chosen


def _change(gain: str, loss: str, difference: float) -> str:
    return gain if difference > 0 else loss if difference < 0 else "no change"


@dataclass(frozen=True, eq=False)
class ShownCase:
    """One case of the figures; arrays are (*image) with three axes, (1, H, W) of a 2D image.

    Attributes:
        name: name of the case.
        why: why it is shown; empty if the user named it.
        files: its image files.
        image: intensities (C, *image).
        truth: label map; labels that are not compared and unknown voxels are background, here and in the predictions.
        predictions: label map of each folder.
        spacing_mm: voxel size along each axis.
    """

    name: str
    why: str
    files: Sequence[str]
    image: NDArray
    truth: NDArray
    predictions: Sequence[NDArray]
    spacing_mm: tuple[float, ...]

    @property
    def slice_axis(self) -> int:
        """The axis along which slices are taken: that of length one, else the first of those with the largest spacing."""
        if 1 in self.truth.shape:
            return self.truth.shape.index(1)
        return int(np.argmax(self.spacing_mm))

    def label(self, axis: int, number: int, *more: str) -> str:
        """Return the label of a row: why, name, and the slice of a volume, one below the other."""
        plane = plane_name(axis, number) if self.truth.shape[axis] > 1 else ""
        return "\n".join(part for part in (self.why, self.name, plane, *more) if part)


def read_shown_case(
    paths: Sequence[CasePaths], why: str, files: Sequence[str], classes: Classes, reader: Any
) -> ShownCase:
    """Read the image, truth and predictions of a case.

    Args:
        paths: files of the case, one entry for each folder of predictions, with the same truth.
        why: why it is shown.
        files: image files, one per channel, or one with all channels.
        classes: what is compared.
        reader: instance of nnU-Net's reader.

    Raises:
        FileNotFoundError: an image file is missing.
        ValueError: a file cannot be read, or the image does not have the geometry of the truth. The message names the file.
    """
    image, properties = read_images(files, reader)
    truth_path = paths[0].truths[0]
    where = f"the {TRUTH} {truth_path}"
    arrays = [read_case(each, classes, reader) for each in paths]
    check_shape("image", paths_of(files), image.shape[1:], arrays[0].truths[0].shape, where)
    truth_properties = reader.read_seg(str(truth_path))[1]
    check_geometry("image", paths_of(files), properties, truth_properties, where)
    compared = [[np.where(each.known, found, 0) for found in each.compared(classes)] for each in arrays]
    return ShownCase(
        paths[0].name,
        why,
        files,
        image,
        compared[0][1],
        [prediction for prediction, _ in compared],
        without_thickness(properties["spacing"]),
    )
