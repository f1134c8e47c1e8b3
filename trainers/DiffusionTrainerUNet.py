"""`-tr DiffusionTrainerUNet`: 1000 epochs; nnU-Net's own network as denoiser, with nnUNetTrainer as its pre-segmentor."""

from nnunet_diffusion.training import DiffusionTrainerUNet

__all__ = ["DiffusionTrainerUNet"]
