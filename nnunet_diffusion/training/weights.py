"""Dice of the validation cases at several values of `presegmentation_weight`, from one prediction of each network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnunet_diffusion.evaluation.preprocessed import mean_dice, preprocessed_cases
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model import labels

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
    previous = Path(trainer.folder_with_segs_from_previous_stage) if trainer.is_cascaded else None
    found: dict[float, dict[str, float]] = {weight: {} for weight in weights}
    for case in preprocessed_cases(Path(trainer.preprocessed_dataset_folder), cases, trainer.label_manager, previous):
        nnunet, denoiser = predict_members(predictor, torch.from_numpy(case.image))
        for weight in weights:
            mixed = torch.lerp(denoiser, nnunet, weight)
            segmentation = trainer.label_manager.convert_probabilities_to_segmentation(mixed).numpy()
            found[weight][case.name] = mean_dice(segmentation, case.truth, trainer.label_manager)
    return found
