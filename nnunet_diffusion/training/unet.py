"""Training of nnU-Net's own network as denoiser."""

from __future__ import annotations

from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


class DiffusionTrainerUNet(DiffusionTrainer):
    """DiffusionTrainer whose denoiser is nnU-Net's own network, which starts from the pre-segmentor's weights.

    It sees the noisy segmentation as further input channels, and is trained with nnU-Net's own loss. A training step costs what
    nnU-Net's does, and as little is learned anew, it has a quarter of nnU-Net's epochs. Plans made for PGDiffSeg give it
    nothing but the pre-segmentor (`planned_settings`).
    """

    denoiser = "nnunet"
    epochs: int | None = 250
