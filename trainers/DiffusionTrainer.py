"""`-tr DiffusionTrainer`: 1000 epochs, as nnUNetTrainer, which is its pre-segmentor."""

import os

try:
    from nnunet_diffusion.training import DiffusionTrainer
except ModuleNotFoundError as error:  # nnU-Net imports this file first in any search for a trainer of this folder
    raise ModuleNotFoundError(
        f"{error}. The trainers of this folder need the package nnunet-diffusion in the environment that runs nnU-Net: "
        f"pip install it there (its README says how), or take {os.path.dirname(__file__)} out of nnUNet_extTrainer."
    ) from error

__all__ = ["DiffusionTrainer"]
