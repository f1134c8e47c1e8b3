"""nnU-Net trainings in mixed precision on a CPU, which nnU-Net has on CUDA alone, and for images with an up and a down."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5

from nnunet_diffusion.training import DiffusionTrainer


class nnUNetTrainerBfloat16(nnUNetTrainer):
    """`nnUNetTrainer` whose network runs in bfloat16 autocast; loss, gradients' clipping and optimizer stay in float32."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().validation_step(batch)

    def _build_loss(self) -> Any:
        loss = super()._build_loss()

        def in_single_precision(output: Any, target: Any) -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):
                scales = [scale.float() for scale in output] if isinstance(output, (list, tuple)) else output.float()
                return loss(scales, target)

        return in_single_precision


class nnUNetTrainerDA5Bfloat16(nnUNetTrainerBfloat16, nnUNetTrainerDA5):
    """`nnUNetTrainerDA5`, nnU-Net's most augmented training, in the same way."""


class Upright:
    """For 2D images with the probe at the top, as ultrasound's: rotated by 15 degrees at most, mirrored left to right alone."""

    inference_allowed_mirroring_axes: tuple[int, ...] | None

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        parent: Any = super()
        _, dummy_2d, initial_patch_size, _ = parent.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        left_to_right = (1,)
        self.inference_allowed_mirroring_axes = left_to_right
        return (-math.radians(15), math.radians(15)), dummy_2d, initial_patch_size, left_to_right


class nnUNetTrainerUprightBfloat16(Upright, nnUNetTrainerBfloat16):
    """`nnUNetTrainer` that keeps up and down apart."""


class nnUNetTrainerUprightDA5Bfloat16(Upright, nnUNetTrainerDA5Bfloat16):
    """The same with `nnUNetTrainerDA5`'s augmentation, which turns square patches by 90 degrees: take others."""


class DiffusionTrainerBfloat16(DiffusionTrainer):
    """`DiffusionTrainer` in bfloat16 autocast, which it has on CUDA alone; its losses are float32 in any case."""

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16)
