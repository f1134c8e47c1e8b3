"""Training without mirroring, for labels that have a side (left and right)."""

from __future__ import annotations

from typing import Any

from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


class DiffusionTrainerNoMirroring(DiffusionTrainer):
    """DiffusionTrainer without mirroring in augmentation, validation and prediction, as nnUNetTrainerNoMirroring.

    Its pre-segmentor is trained by nnUNetTrainerNoMirroring.
    """

    presegmentor_trainer = "nnUNetTrainerNoMirroring"

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """Return nnU-Net's augmentation parameters without the axes to mirror along."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None
