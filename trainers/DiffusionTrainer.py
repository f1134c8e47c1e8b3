"""`-tr DiffusionTrainer`: 1000 epochs, as nnUNetTrainer, which is its pre-segmentor."""

from nnunet_diffusion.training import DiffusionTrainer

__all__ = ["DiffusionTrainer"]
