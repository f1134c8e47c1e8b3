"""Training of nnU-Net's own network as denoiser."""

from __future__ import annotations

from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


class DiffusionTrainerUNet(DiffusionTrainer):
    """DiffusionTrainer whose denoiser is nnU-Net's network, which starts from the pre-segmentor's weights."""

    denoiser = "nnunet"
