"""Dice of the validation cases at several values of `presegmentation_weight`, from one prediction of each network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot
from numpy.typing import NDArray
from torch import Tensor

from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model import labels
from nnunet_diffusion.training.verdict import mean_known

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


def predict_members(predictor: DiffusionPredictor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Predict a volume with nnU-Net alone and with the denoiser alone; the pre-segmentation is computed once.

    Args:
        predictor: predictor with the weights of one fold; afterwards its `presegmentation_weight` is 0.
        data: preprocessed volume (C, *volume).

    Returns:
        Probabilities (K, *volume) of nnU-Net, and of the denoiser.
    """
    found, presegmented = [], None
    for weight in (1.0, 0.0):
        # the predictor has its own copy of the network's settings
        settings = dataclasses.replace(predictor.network.settings, presegmentation_weight=weight)
        predictor.network.settings = settings
        run = VolumeRun(predictor, data, presegmented=presegmented)
        found.append(labels.activate(run.predict().logits[None], settings.regions)[0])
        presegmented = run.presegmented
    return found[0], found[1]


def dice_by_weight(
    trainer: DiffusionTrainer, cases: Sequence[str], weights: Sequence[float]
) -> dict[float, dict[str, float]]:
    """Predict each case once with the network in memory and return its Dice at each weight.

    Args:
        trainer: trainer with the averaged weights in its network.
        cases: names of preprocessed cases.
        weights: values of `presegmentation_weight`, 0..1.

    Returns:
        Weight -> case -> mean Dice of the foreground classes or regions on the preprocessed grid; NaN if all are absent from
        truth and prediction.
    """
    predictor = DiffusionPredictor(device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.segmenter, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    dataset = trainer.dataset_class(
        trainer.preprocessed_dataset_folder,
        list(cases),
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
    )
    found: dict[float, dict[str, float]] = {weight: {} for weight in weights}
    for case in dataset.identifiers:
        image, truth, previous, _ = dataset.load_case(case)
        data = np.array(image[:])  # a mapped file would be read-only
        if trainer.is_cascaded:
            one_hot = convert_labelmap_to_one_hot(previous[:], trainer.label_manager.foreground_labels, data.dtype)
            data = np.vstack((data, one_hot))
        nnunet, denoiser = predict_members(predictor, torch.from_numpy(data))
        for weight in weights:
            mixed = torch.lerp(denoiser, nnunet, weight)
            segmentation = trainer.label_manager.convert_probabilities_to_segmentation(mixed).numpy()
            found[weight][case] = mean_dice(segmentation, truth[:][0], trainer.label_manager)
    return found


def mean_dice(segmentation: NDArray, truth: NDArray, label_manager: LabelManager) -> float:
    """Return the mean Dice of a label map over the foreground labels or regions; NaN if all are absent from both.

    Args:
        segmentation: label map (*volume).
        truth: preprocessed label map (*volume); -1 is background, voxels with the ignore label are left out.
        label_manager: label manager of the dataset.
    """
    known = np.ones(truth.shape, bool)
    if label_manager.has_ignore_label:
        known = truth != label_manager.ignore_label
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    return mean_known([dice(np.isin(segmentation, each) & known, np.isin(truth, each) & known) for each in classes])
