"""Weights of the pre-segmentor that a diffusion training embeds (layer 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.utilities.file_path_utilities import get_output_folder
from torch import Tensor

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER
from nnunet_diffusion.training.presegmentor.fit import load_presegmentor_weights
from nnunet_diffusion.training.presegmentor.train import ensure_presegmentor

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


def presegmentor_folder(trainer: DiffusionTrainer) -> Path:
    """Return the fold's folder of the pre-segmentor. It may be missing if the training is resumed, which does not need it."""
    if trainer.given_presegmentor is not None:
        return trainer.given_presegmentor.checkpoint.parent
    manager, name = trainer.plans_manager, trainer.settings.presegmentor_trainer
    return Path(
        get_output_folder(manager.dataset_name, name, manager.plans_name, trainer.configuration_name, trainer.fold)
    )


def presegmentor_weights(trainer: DiffusionTrainer) -> dict[str, Tensor]:
    """Return the weights of a training's pre-segmentor, which is trained first if it does not exist.

    Args:
        trainer: trainer of the denoiser.

    Raises:
        ValueError: the pre-segmentor does not fit; see `load_presegmentor_weights`.
    """
    given = trainer.given_presegmentor
    manager, configuration, fold = trainer.plans_manager, trainer.configuration_name, trainer.fold
    if given is not None:
        checkpoint = given.checkpoint
        trainer.print_to_log_file(f"Pre-segmentor: {checkpoint}, named by {PRESEGMENTOR_FOLDER}.")
    else:
        checkpoint = ensure_presegmentor(
            trainer.settings.presegmentor_trainer,
            manager.dataset_name,
            configuration,
            fold,
            manager.plans_name,
            trainer.device,
            trainer.print_to_log_file,
        )
    return load_presegmentor_weights(
        checkpoint,
        manager.plans,
        configuration,
        fold,
        trainer.dataset_json,
        trainer.do_split()[1],
        given=given is not None,
        mirrored=trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3],
    )
