"""Denoisers whose answer is known, for every prediction type."""

from __future__ import annotations

import pytest
import torch
from paired_process import Paired

from nnunet_diffusion.diffusion.predictions import Logits


@pytest.fixture
def knows():
    """Builds a network that knows the clean state and says so in the process's prediction type."""

    def build(process: Paired, clean: torch.Tensor):
        def predict(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
            if isinstance(process.prediction, Logits):
                return 50 * clean  # for a clean state of -1 and 1: probabilities of 0 and 1 in float64
            return process.target(clean, process.to_noise(clean, noisy, timestep), timestep)

        return predict

    return build
