"""Cases of nnU-Net's preprocessed data, with their truth, and the Dice of segmentations on their grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.metrics import dice, mean_known


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


def mean_dice(segmentation: NDArray, truth: NDArray, label_manager: LabelManager) -> float:
    """Return the mean Dice of a label map over the foreground labels or regions; NaN if all are absent from both.

    Args:
        segmentation: label map (*volume).
        truth: preprocessed label map (*volume); -1 is background, voxels of the ignore label are excluded.
        label_manager: label manager of the dataset.
    """
    known = np.ones(truth.shape, bool)
    if label_manager.has_ignore_label:
        known = truth != label_manager.ignore_label
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    return mean_known([dice(np.isin(segmentation, each) & known, np.isin(truth, each) & known) for each in classes])
