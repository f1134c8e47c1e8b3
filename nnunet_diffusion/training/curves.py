"""The loss terms in nnU-Net's log, and a figure of their curves (layer 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from nnunetv2.utilities.collate_outputs import collate_outputs

from nnunet_diffusion.explain.figures import curves_figure

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


def curves_of(trainer: DiffusionTrainer) -> dict[str, list]:
    """Return the values that nnU-Net's logger recorded: name -> one value per epoch."""
    return trainer.logger.local_logger.my_fantastic_logging


def log_terms(trainer: DiffusionTrainer, outputs: Sequence[dict]) -> None:
    """Log the mean of each loss term over the steps of an epoch and over all ranks.

    Args:
        trainer: trainer with the objective that names the terms.
        outputs: results of its training steps.
    """
    means = {key: _mean_of_ranks(values, trainer.is_ddp) for key, values in collate_outputs(list(outputs)).items()}
    terms = trainer.objective.terms
    curves = curves_of(trainer)
    for term in terms:
        curve = curves.setdefault(f"{term}_loss", [])
        curve.extend([float("nan")] * (trainer.current_epoch - len(curve)))
        trainer.logger.log(f"{term}_loss", means[term], trainer.current_epoch)
    trainer.print_to_log_file(", ".join(f"{term} {means[term]:.4f}" for term in terms))


def draw_curves(trainer: DiffusionTrainer) -> None:
    """Draw loss, loss terms and proxy Dice into `progress_diffusion.png` in the output folder."""
    curves = curves_of(trainer)
    shown = {"training loss": curves["train_losses"]}
    if len(trainer.objective.terms) > 1:  # a single term is the loss
        shown |= {f"{term} loss": curves[f"{term}_loss"] for term in trainer.objective.terms}
    shown["Dice, one step (proxy)"] = curves["mean_fg_dice"]
    curves_figure(shown, Path(trainer.output_folder) / "progress_diffusion.png")


def _mean_of_ranks(values: Any, distributed: bool) -> float:
    everywhere = [values]
    if distributed:
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, values)
    return float(np.mean([np.mean(each) for each in everywhere]))
