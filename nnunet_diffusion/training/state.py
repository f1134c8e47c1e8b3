"""The state of a diffusion training: saved in a checkpoint, and restored from it (layer 3)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.model.corrupted_truth import Mistakes
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.training.checkpoints import (
    DIFFUSION_KEY,
    read_checkpoint,
    refuse_foreign_checkpoint,
    refuse_unknown_networks,
)
from nnunet_diffusion.training.curves import curves_of
from nnunet_diffusion.training.learner import averaged_weights

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


def checkpoint_of(trainer: DiffusionTrainer) -> dict[str, Any]:
    """Return the checkpoint of a trainer, in nnU-Net's layout with an additional section.

    `network_weights` are the averaged weights, which inference uses.
    """
    with averaged_weights(trainer.segmenter, trainer.learners):
        averaged = trainer.segmenter.state_dict()
    learner, *further = (
        {**trainer.learners[name].state_dict(), "optimizer": trainer.optimizers[name].state_dict()}
        for name in trainer.settings.learning_networks
    )
    return {
        "network_weights": averaged,
        "optimizer_state": learner["optimizer"],
        "grad_scaler_state": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch + 1,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        DIFFUSION_KEY: {
            "denoiser_weights": learner["weights"],
            "averaged_steps": learner["averaged_steps"],
            "further_learners": dict(zip(trainer.settings.learning_networks[1:], further, strict=True)),
            "mistakes": None if trainer.mistakes is None else dataclasses.asdict(trainer.mistakes),
        },
    }


def own_checkpoint(trainer: DiffusionTrainer, given: dict | str | Path) -> dict[str, Any]:
    """Return the checkpoint from which a trainer continues, read without running code from it.

    Args:
        trainer: trainer of the same dataset, configuration and fold.
        given: checkpoint, or path of its file.

    Raises:
        ValueError: the checkpoint is not from a diffusion trainer, or from another dataset, configuration, fold or denoiser.
    """
    if isinstance(given, dict):
        name, checkpoint = "The given dictionary", given
        refuse_unknown_networks(checkpoint.get("init_args", {}).get("plans"), name)
    else:
        name, checkpoint = str(given), read_checkpoint(given, trainer.device)
    own = {
        "dataset": trainer.plans_manager.dataset_name,
        "configuration": trainer.configuration_name,
        "fold": str(trainer.fold),
    }
    refuse_foreign_checkpoint(checkpoint, name, own)
    _refuse_another_denoiser(trainer, checkpoint, name)
    return checkpoint


def _refuse_another_denoiser(trainer: DiffusionTrainer, checkpoint: dict[str, Any], name: str) -> None:
    saved = PlansManager(checkpoint["init_args"]["plans"]).get_configuration(trainer.configuration_name)
    theirs = DiffusionSettings.from_plans(saved.configuration).denoiser
    if theirs != trainer.settings.denoiser:
        raise ValueError(
            f"{name} is of the denoiser {theirs!r} ({checkpoint['trainer_name']}), this training is of "
            f"{trainer.settings.denoiser!r}: continue it with its own trainer, or remove it from this output folder."
        )


def restore(trainer: DiffusionTrainer, checkpoint: dict[str, Any]) -> None:
    """Restore an initialised trainer from a checkpoint that `own_checkpoint` returned."""
    with averaged_weights(trainer.segmenter, trainer.learners):
        trainer.segmenter.load_state_dict(checkpoint["network_weights"])
    trainer.my_init_kwargs = checkpoint["init_args"]
    trainer.current_epoch = checkpoint["current_epoch"]
    trainer.logger.load_checkpoint(checkpoint["logging"])
    # nnU-Net saves before it updates `_best_ema`, so a worse epoch could otherwise overwrite checkpoint_best
    trainer._best_ema = max(curves_of(trainer)["ema_fg_dice"], default=checkpoint["_best_ema"])
    trainer.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    own = checkpoint[DIFFUSION_KEY]
    trainer.learners["denoiser"].load_state_dict(
        {"weights": own["denoiser_weights"], "averaged_steps": own["averaged_steps"]}, checkpoint["optimizer_state"]
    )
    for name, state in own.get("further_learners", {}).items():
        trainer.learners[name].load_state_dict(state, state["optimizer"])
    if own.get("mistakes") is not None:  # checkpoints of earlier versions have none
        trainer.mistakes = Mistakes(**own["mistakes"])
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
