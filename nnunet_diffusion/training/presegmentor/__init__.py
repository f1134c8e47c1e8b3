"""The pre-segmentor: an ordinary nnU-Net of the same dataset, plans, configuration and fold; trained first if missing."""

from nnunet_diffusion.training.presegmentor.embed import presegmentor_folder, presegmentor_weights
from nnunet_diffusion.training.presegmentor.fit import (
    build_presegmentor,
    given_presegmentor,
    load_presegmentor_weights,
    trainer_class,
)
from nnunet_diffusion.training.presegmentor.halves import out_of_fold
from nnunet_diffusion.training.presegmentor.train import ensure_presegmentor, presegmentor_state

__all__ = [
    "build_presegmentor",
    "ensure_presegmentor",
    "given_presegmentor",
    "load_presegmentor_weights",
    "out_of_fold",
    "presegmentor_folder",
    "presegmentor_state",
    "presegmentor_weights",
    "trainer_class",
]
