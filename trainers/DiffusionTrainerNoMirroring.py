"""`-tr DiffusionTrainerNoMirroring`: for labels that have a side; nnUNetTrainerNoMirroring is its pre-segmentor."""

from nnunet_diffusion.training import DiffusionTrainerNoMirroring

__all__ = ["DiffusionTrainerNoMirroring"]
