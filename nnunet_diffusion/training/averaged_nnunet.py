"""nnU-Net with a moving average of its weights (EMA), as a pre-segmentor and as the control of every comparison."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nnunet_diffusion.training.learner import moving_average

RAW_KEY = "raw_weights"


class nnUNetTrainerEMA(nnUNetTrainer):
    """`nnUNetTrainer` whose averaged weights are validated, saved as `network_weights` and used by inference.

    Training itself is nnU-Net's, unchanged. The average has the warm-up of the denoiser's (`moving_average`).
    """

    epochs: int | None = None  # set by the length variants; None for nnU-Net's 1000
    ema_decay = 0.999
    average: AveragedModel

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        """Set nnU-Net up."""
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.epochs is not None:
            self.num_epochs = self.epochs

    @property
    def _plain_network(self) -> nn.Module:
        """The network without the wrappers of distributed training and torch.compile."""
        network: Any = self.network
        network = getattr(network, "module", network)
        return getattr(network, "_orig_mod", network)

    def initialize(self) -> None:
        """Build the network as nnU-Net does, then its average."""
        super().initialize()
        self.average = moving_average(self._plain_network, self.ema_decay)

    def train_step(self, batch: dict) -> dict:
        """Take nnU-Net's own step, then move the average."""
        result = super().train_step(batch)
        self.average.update_parameters(self._plain_network)
        return result

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Exchange the weights with the averaged ones for a `with` block; modules and their wrappers stay."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        ours, theirs = (
            [*module.parameters(), *module.buffers()] for module in (self._plain_network, self.average.module)
        )
        for one, other in zip(ours, theirs, strict=True):
            one.data, other.data = other.data, one.data

    def validation_step(self, batch: dict) -> dict:
        """Take nnU-Net's own step with the averaged weights."""
        with self._averaged_weights():
            return super().validation_step(batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, with the averaged weights."""
        with self._averaged_weights():
            super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with the averaged weights; the raw ones have a key of their own."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        # through memory: nnU-Net assembles its checkpoint only to write it
        written: Any = io.BytesIO()
        with self._averaged_weights():
            super().save_checkpoint(written)
        written.seek(0)
        checkpoint = torch.load(written, map_location="cpu", weights_only=False)
        checkpoint[RAW_KEY] = self._plain_network.state_dict()
        checkpoint["averaged_steps"] = self.average.n_averaged
        torch.save(checkpoint, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore network, average and training; a checkpoint of stock nnU-Net has one set of weights for both."""
        super().load_checkpoint(filename_or_checkpoint)
        self.average.module.load_state_dict(self._plain_network.state_dict())
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = torch.load(checkpoint, map_location=self.device, weights_only=False)
        if RAW_KEY in checkpoint:
            self._plain_network.load_state_dict(checkpoint[RAW_KEY])
            self.average.n_averaged.copy_(checkpoint["averaged_steps"])
