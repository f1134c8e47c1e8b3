"""What the starts of a denoiser's training need: the pre-segmentor's mistakes, and networks that were not trained on a case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnunet_diffusion.model import corrupted_truth, labels
from nnunet_diffusion.training.presegmentor import out_of_fold

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer

MEASURED_PATCHES = 256
RECYCLING_SHARE = 0.1  # of the epochs, the last ones; nnU-Net's schedule has an eighth of the learning rate left there


def first_recycling_epoch(epochs: int) -> int:
    """Return the first epoch of the last tenth of a training, which is one epoch at least."""
    return epochs - max(1, round(RECYCLING_SHARE * epochs))


def prepare_networks(trainer: DiffusionTrainer) -> None:
    """Give the objective networks that were not trained on a case, if the settings ask for starts out of fold.

    They are trained first if they do not exist.
    """
    if "out_of_fold" in trainer.settings.starts:
        trainer.objective.out_of_fold = out_of_fold(trainer)


def prepare_mistakes(trainer: DiffusionTrainer) -> None:
    """Measure the pre-segmentor's mistakes on validation patches, if the settings ask for corrupted truths, and log them.

    A resumed training has them in its checkpoint.
    """
    if "corrupted" not in trainer.settings.starts:
        return
    regions = trainer.settings.regions
    if trainer.mistakes is None:
        trainer.mistakes = corrupted_truth.measure(_validation_patches(trainer), regions)
        trainer.print_to_log_file(
            f"The pre-segmentor's mistakes on validation patches, which corrupted truths imitate: {trainer.mistakes.describe()}"
        )
    trainer.objective.mistakes = trainer.mistakes


def _validation_patches(trainer: DiffusionTrainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start's probabilities and the true masks of validation patches, each (B, K, *spatial).

    Where the truth is not known (ignore label), the start counts as true.
    """
    segmenter = trainer.segmenter
    heads, regions = segmenter.denoiser.state_channels, trainer.settings.regions
    for _ in range(math.ceil(MEASURED_PATCHES / trainer.batch_size)):
        batch = next(trainer.dataloader_val)
        image, target = (batch[key].to(trainer.device, non_blocking=True) for key in ("data", "target"))
        truth = labels.read_target(target, heads, regions, segmenter.ignore_label)
        with torch.no_grad():
            own = segmenter.own_start(image)
        masks = truth.masks if truth.known is None else torch.where(truth.known, truth.masks, own.round())
        yield own, masks
