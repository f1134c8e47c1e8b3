"""Cases of nnU-Net's preprocessed data, with their truth, and the Dice of segmentations on their grid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.metrics import dice, evenly_spaced, mean_known

if TYPE_CHECKING:
    from nnunet_diffusion.inference.predictor import DiffusionPredictor


@dataclass(frozen=True, eq=False)
class PreprocessedCase:
    """A case on the network's grid.

    Attributes:
        name: name of the case.
        image: (C, *volume), float32; in the cascade the one-hot channels of the previous stage follow those of the image.
        truth: label map (*volume); -1 is background outside of the image's nonzero region.
    """

    name: str
    image: NDArray
    truth: NDArray


def preprocessed_cases(
    folder: Path, cases: Sequence[str], label_manager: LabelManager, previous_stage_folder: Path | None = None
) -> Iterator[PreprocessedCase]:
    """Read cases of a configuration, one at a time.

    Args:
        folder: folder of the configuration's preprocessed cases.
        cases: names of the cases.
        label_manager: label manager of the dataset.
        previous_stage_folder: in the cascade, the folder of the previous stage's segmentations for this configuration.
    """
    dataset = infer_dataset_class(str(folder))(
        str(folder),
        list(cases),
        folder_with_segs_from_previous_stage=None if previous_stage_folder is None else str(previous_stage_folder),
    )
    for case in dataset.identifiers:
        image, truth, previous, _ = dataset.load_case(case)
        data = np.array(image[:])  # a mapped file would be read-only
        if previous_stage_folder is not None:
            one_hot = convert_labelmap_to_one_hot(previous[:], label_manager.foreground_labels, data.dtype)
            data = np.vstack((data, one_hot))
        yield PreprocessedCase(case, data, np.array(truth[:])[0])


def validation_cases(
    predictor: DiffusionPredictor, preprocessed: Path, fold: str, number: int | None = None
) -> tuple[list[str], Path]:
    """Return the names of a fold's validation cases, and the folder of their preprocessed data.

    Args:
        predictor: predictor with a loaded model.
        preprocessed: folder `nnUNet_preprocessed`.
        fold: fold of the model.
        number: number of cases, evenly spaced in their list; None for all.

    Raises:
        FileNotFoundError: the split or the preprocessed data are missing.
        NotImplementedError: the model is the second stage of a cascade.
        ValueError: the split has no such fold, or no validation case in it.
    """
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    if configuration.previous_stage_name is not None:
        raise NotImplementedError("the second stage of a cascade is not supported by this command")
    dataset = preprocessed / plans.dataset_name
    folder, splits = dataset / configuration.data_identifier, dataset / "splits_final.json"
    for path in (folder, splits):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: preprocess the data and train the fold on this machine first"
            )
    split = json.loads(splits.read_text(encoding="utf-8"))
    if not fold.isdecimal() or int(fold) >= len(split):
        raise ValueError(
            f"fold {fold} has no validation cases: {splits} has folds 0 to {len(split) - 1}; choose one with -f"
        )
    names = sorted(split[int(fold)]["val"])
    if not names:
        raise ValueError(f"fold {fold} has no validation cases: choose another with -f")
    return evenly_spaced(names, number), folder


def mean_dice(segmentation: NDArray, truth: NDArray, label_manager: LabelManager) -> float:
    """Return the mean Dice of a label map over the foreground labels or regions; NaN if all are absent from both.

    Args:
        segmentation: label map (*volume).
        truth: preprocessed label map (*volume); -1 is background, voxels of the ignore label are excluded.
        label_manager: label manager of the dataset.
    """
    return mean_known([dice(ours, theirs) for ours, theirs in class_masks(segmentation, truth, label_manager)])


def class_masks(
    segmentation: NDArray, truth: NDArray, label_manager: LabelManager
) -> Iterator[tuple[NDArray, NDArray]]:
    """Yield the known voxels of each foreground label or region in a label map and in the truth; see `mean_dice`."""
    known = np.ones(truth.shape, bool)
    if label_manager.has_ignore_label:
        known = truth != label_manager.ignore_label
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    for each in classes:
        yield np.isin(segmentation, each) & known, np.isin(truth, each) & known
