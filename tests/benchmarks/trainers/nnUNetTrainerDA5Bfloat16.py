"""nnU-Net's most augmented training in mixed precision on a CPU, where nnU-Net itself has mixed precision on CUDA alone."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5


class nnUNetTrainerDA5Bfloat16(nnUNetTrainerDA5):
    """`nnUNetTrainerDA5` whose network runs in bfloat16 autocast; loss, gradients' clipping and optimizer stay in float32."""

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
