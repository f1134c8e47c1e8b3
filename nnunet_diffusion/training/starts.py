"""What the starts of a denoiser's training need: the pre-segmentor's mistakes, and networks that were not trained on a case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nnunet_diffusion.model import corrupted_truth, labels
from nnunet_diffusion.model.corrupted_truth import Mistakes
from nnunet_diffusion.model.objective import DenoisingObjective
from nnunet_diffusion.training.checks import check_batch
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
        assert isinstance(trainer.objective, DenoisingObjective)  # the settings allow no such starts elsewhere
        trainer.objective.out_of_fold = out_of_fold(trainer)


def prepare_mistakes(trainer: DiffusionTrainer) -> None:
    """Measure the pre-segmentor's mistakes on validation patches, if the settings ask for corrupted truths, and log them.

    A resumed training has them in its checkpoint. Where the pre-segmentor was trained on the validation cases too (fold "all"),
    they would be too small, so the usual ones are taken.
    """
    if "corrupted" not in trainer.settings.starts:
        return
    if trainer.mistakes is None:
        trained, validated = trainer.do_split()
        if set(trained) & set(validated):
            trainer.mistakes, source = corrupted_truth.UNMEASURED, "assumed, as it was trained on the validation cases"
        else:
            measured = corrupted_truth.measure(_validation_patches(trainer), trainer.settings.regions)
            trainer.mistakes, source = _of_first_rank(measured), "measured on validation patches"
        trainer.print_to_log_file(
            f"Corrupted truths imitate the pre-segmentor's mistakes, {source}: {trainer.mistakes.describe()}"
        )
    assert isinstance(trainer.objective, DenoisingObjective)
    trainer.objective.mistakes = trainer.mistakes


def _of_first_rank(mistakes: Mistakes) -> Mistakes:
    """Return what the first rank of a distributed training measured, which its checkpoint keeps."""
    if not (dist.is_available() and dist.is_initialized()):
        return mistakes
    found = [mistakes]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _validation_patches(trainer: DiffusionTrainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the start's probabilities and the true masks of validation patches, each (B, K, *spatial).

    Both are background where the truth is not known (ignore label).
    """
    segmenter = trainer.segmenter
    heads, regions = segmenter.denoiser.state_channels, trainer.settings.regions
    for _ in range(math.ceil(MEASURED_PATCHES / trainer.batch_size)):
        batch = next(trainer.dataloader_val)
        check_batch(batch, trainer)
        image, target = (batch[key].to(trainer.device, non_blocking=True) for key in ("data", "target"))
        truth = labels.read_target(target, heads, regions, segmenter.ignore_label)
        with torch.no_grad():
            own = segmenter.own_start(image)
        if truth.known is None:
            yield own, truth.masks
            continue
        background = torch.zeros_like(own)
        if not regions:
            background[:, 0] = 1
        yield torch.where(truth.known, own, background), torch.where(truth.known, truth.masks, background)
