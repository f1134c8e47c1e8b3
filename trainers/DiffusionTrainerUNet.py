"""`-tr DiffusionTrainerUNet`: nnUNetTrainer (1000 epochs), then 250 epochs of nnU-Net's own network as denoiser."""

from nnunet_diffusion.training import DiffusionTrainerUNet

__all__ = ["DiffusionTrainerUNet"]
