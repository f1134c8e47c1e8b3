"""The cases of a publication's figures: which ones, which slice of a volume, and the rows that are drawn of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.folders import TRUTH, CasePaths, Classes, read_case
from nnunet_diffusion.explain.comparison_figure import ComparisonRow, ProcessRow
from nnunet_diffusion.explain.evaluation_figures import worst_slice
from nnunet_diffusion.explain.explanation import reverse
from nnunet_diffusion.explain.figures import ReportRow
from nnunet_diffusion.explain.uncertainty_figure import plane_name
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.cases import CaseFiles, PreparedCase, prepare_case
from nnunet_diffusion.inference.presegmentation import check_geometry, check_shape, one_hot
from nnunet_diffusion.inference.reading import read_images, without_thickness
from nnunet_diffusion.inference.report import foreground_names
from nnunet_diffusion.model.labels import probabilities_to_logits


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
    words = ["best Dice", "worst Dice", "median Dice"]
    if len(dice) > 1:
        words = [
            _change("largest gain", "smallest loss", values[highest]),
            _change("smallest gain", "largest loss", values[lowest]),
            "median change",
        ]
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
        files: its image files, one per channel, or one with all channels.
        image: intensities (C, *image).
        truth: label map; labels that are not compared are background, as in the predictions.
        predictions: label map of each folder.
        known: voxels that count; the label maps are background elsewhere.
        spacing_mm: voxel size along each axis.
    """

    name: str
    why: str
    files: Sequence[str]
    image: NDArray
    truth: NDArray
    predictions: Sequence[NDArray]
    known: NDArray[np.bool_]
    spacing_mm: tuple[float, ...]

    @property
    def slice_axis(self) -> int:
        """The axis along which slices are taken: one of length 1, else the first of those with the largest spacing."""
        if 1 in self.truth.shape:
            return self.truth.shape.index(1)
        return int(np.argmax(self.spacing_mm))

    def label(self, axis: int, number: int, *more: str) -> str:
        """Return the label of a row: why, name, the slice of a volume, and `more`, each in a line."""
        plane = plane_name(axis, number) if self.truth.shape[axis] > 1 else ""
        return "\n".join(part for part in (self.why, self.name, plane, *more) if part)


def read_shown_case(
    paths: Sequence[CasePaths], why: str, files: Sequence[str], classes: Classes, reader: Any
) -> ShownCase:
    """Read image, truth and predictions of a case.

    Args:
        paths: files of the case, one entry for each folder of predictions, with the same truth.
        why: why it is shown.
        files: image files, one per channel, or one with all channels.
        classes: what is compared.
        reader: instance of nnU-Net's reader.

    Raises:
        FileNotFoundError: an image file is missing.
        ValueError: a file cannot be read, or image or predictions do not have the geometry of the truth. The message names
            the file, the value found and the expected one.
    """
    image, properties = read_images(files, reader)
    arrays = [read_case(each, classes, reader) for each in paths]
    truth, known = paths[0].truths[0], arrays[0].known
    image_path, where = Path(files[0]), f"the {TRUTH} {truth}"
    check_shape("image", image_path, image.shape[1:], known.shape, where)
    check_geometry("image", image_path, properties, reader.read_seg(str(truth))[1], where)
    compared = [[np.where(known, labels, 0) for labels in each.compared(classes)] for each in arrays]
    predictions, truths = zip(*compared, strict=True)
    return ShownCase(
        paths[0].name, why, files, image, truths[0], predictions, known, without_thickness(properties["spacing"])
    )


def most_different_slice(truth: NDArray, predictions: Sequence[NDArray], axis: int) -> int:
    """Return the slice with most voxels in which the label maps differ; that with most foreground if they are equal."""
    differing = np.any([each != truth for each in predictions], axis=0)
    marked = np.where(differing, -1, truth)  # no label is -1
    return worst_slice(np.moveaxis(truth, axis, 0), np.moveaxis(marked, axis, 0))


def comparison_row(case: ShownCase, dice: Sequence[float], axis: int | None = None) -> ComparisonRow:
    """Return the row of a case in the comparison, its `most_different_slice`.

    Args:
        case: the case.
        dice: mean foreground Dice of each prediction in the whole image.
        axis: along which slices of a volume are taken; None, and of a 2D image, for `ShownCase.slice_axis`.
    """
    axis = case.slice_axis if axis is None or 1 in case.truth.shape else axis
    number = most_different_slice(case.truth, case.predictions, axis)
    image = case.image.take(number, axis + 1)
    # three channels in one file are colours; three files are three sequences
    coloured = len(image) == 3 and len(case.files) == 1
    return ComparisonRow(
        case.label(axis, number),
        np.moveaxis(image, 0, -1) if coloured else image.mean(0),
        case.truth.take(number, axis),
        [each.take(number, axis) for each in case.predictions],
        dice,
        _aspect(case.truth.shape, case.spacing_mm, axis),
    )


def _aspect(shape: Sequence[int], spacing_mm: Sequence[float], axis: int) -> float:
    """Return height / width in mm of a slice along an axis."""
    height, width = (shape[other] * spacing_mm[other] for other in range(3) if other != axis)
    return height / width


def process_row(case: ShownCase, predictor: DiffusionPredictor) -> ProcessRow:
    """Run a reverse process on a case; its row shows the slice in which truth and predictions differ most.

    The states are on the network's grid, all else on that of the image, cropped as nnU-Net does. They are those of the
    foreground class or region with most voxels in the true slice, whose name is in the label if there are several.

    Args:
        case: the case.
        predictor: predictor with a model, from one fold.

    Raises:
        ValueError: the image does not fit the model. The message names the file.
        MemoryError: the image does not fit into memory.
    """
    plans, manager, network = predictor.plans_manager, predictor.label_manager, predictor.network
    prepared = prepare_case(CaseFiles(case.name, case.files), predictor.managers)
    forward, box = plans.transpose_forward, prepared.properties["bbox_used_for_cropping"]

    def cropped(array: NDArray) -> NDArray:
        return array.transpose(forward)[tuple(slice(*bounds) for bounds in box)]

    truth, known, image = cropped(case.truth), cropped(case.known), cropped(case.image.mean(0))
    number = most_different_slice(truth, [cropped(each) for each in case.predictions], 0)
    found = reverse(predictor, prepared)
    inside = (slice(None), *found.inner)

    def labels(probabilities: NDArray) -> NDArray:
        return np.where(known[number], cropped(_label_map(probabilities, prepared, predictor))[number], 0)

    names, classes = foreground_names(manager), one_hot(truth[number], manager)
    shown = int(classes[len(classes) - len(names) :].sum((1, 2)).argmax())
    head = len(classes) - len(names) + shown  # background is the first head, unless they are regions
    start, result = (each[inside].numpy() for each in (found.presegmentation, found.result))
    place = min(
        int((number + 0.5) * result.shape[1] / len(truth)), result.shape[1] - 1
    )  # the slice on the network's grid
    states = [
        (timestep, network.process.to_probabilities(state)[0][inside][head, place].clamp(0, 1).numpy())
        for timestep, state in found.states
    ]
    label = case.label(forward[0], number + int(box[0][0]), *([f"states: {names[shown]}"] if len(names) > 1 else []))
    row = ReportRow(
        label, image[number], truth[number], labels(start), [*states, (-1, result[head, place])], labels(result),
        start[head, place] if network.settings.is_hidiff else None,
    )  # fmt: skip
    return ProcessRow(row, _aspect(truth.shape, [case.spacing_mm[axis] for axis in forward], 0))


def _label_map(probabilities: NDArray, prepared: PreparedCase, predictor: DiffusionPredictor) -> NDArray:
    """Return the label map (*image) of probabilities (K, *volume) on the network's grid."""
    manager = predictor.label_manager
    logits = probabilities_to_logits(torch.from_numpy(probabilities)[None], manager.has_regions)[0]
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, predictor.plans_manager, predictor.configuration_manager, manager, prepared.properties
    )
