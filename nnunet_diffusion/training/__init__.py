"""Training inside nnU-Net: the trainer, its pre-segmentor and its checkpoints (layer 3)."""

from nnunet_diffusion.training.averaged_nnunet import nnUNetTrainerEMA
from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer
from nnunet_diffusion.training.hidiff import HiDiffTrainer
from nnunet_diffusion.training.no_mirroring import DiffusionTrainerNoMirroring
from nnunet_diffusion.training.unet import DiffusionTrainerUNet

__all__ = [
    "DiffusionTrainer",
    "DiffusionTrainerNoMirroring",
    "DiffusionTrainerUNet",
    "HiDiffTrainer",
    "nnUNetTrainerEMA",
]
