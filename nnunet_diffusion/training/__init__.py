"""Training inside nnU-Net: the trainer, its pre-segmentor and its checkpoints (layer 3)."""

from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer

__all__ = ["DiffusionTrainer"]
