"""The weights of the pre-segmentor that a diffusion training embeds (layer 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER
from nnunet_diffusion.training.presegmentor.fit import GivenPresegmentor, load_presegmentor_weights
from nnunet_diffusion.training.presegmentor.train import ensure_presegmentor

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


def presegmentor_weights(trainer: DiffusionTrainer, given: GivenPresegmentor | None) -> dict[str, Tensor]:
    """Return the weights of the pre-segmentor of a training, trained first where it does not exist.

    Args:
        trainer: of the denoiser.
        given: the trained nnU-Net that the user names, if any.

    Raises:
        ValueError: it does not fit; see `load_presegmentor_weights`.
    """
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
