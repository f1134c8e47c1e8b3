"""Embedding of the timestep and its projection onto the channels of a unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Return sines and cosines of the timestep at geometrically spaced frequencies.

    Source: Ho et al. 2020, after Vaswani et al. 2017. Frequencies run from 1 to 1/10000 radian per timestep.

    Args:
        timestep: (B,), integer or floating; computed in float32 or better.
        width: number of values per timestep, even.

    Returns:
        (B, width), between -1 and 1.
    """
    dtype = torch.promote_types(timestep.dtype, torch.float32)
    position = torch.arange(width // 2, device=timestep.device, dtype=dtype) / max(width // 2 - 1, 1)
    angle = timestep.to(dtype)[:, None] * torch.exp(-math.log(MAX_PERIOD) * position)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoids, then Linear - SiLU - Linear - SiLU; PGDiffSeg, the MLP of Fig. 2.

    Each unit's projection (`TimeShift`) begins with a SiLU. It is the same in all units, so it is computed once, here.
    """

    def __init__(self, sinusoid_width: int, width: int) -> None:
        """Build the embedding of `width` values from `sinusoid_width` (even) sines and cosines."""
        super().__init__()
        self.sinusoid_width = sinusoid_width
        self.expand = nn.Linear(sinusoid_width, width)
        self.activation = nn.SiLU()
        self.mix = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Map timesteps (B,) to (B, width)."""
        waves = sinusoids(timestep, self.sinusoid_width).to(self.expand.weight.dtype)
        return self.activation(self.mix(self.activation(self.expand(waves))))


class TimeShift(nn.Module):
    """The time embedding added to every voxel of a unit's input; PGDiffSeg, Fig. 12."""

    def __init__(self, width: int, channels: int) -> None:
        """Build the projection of an embedding of `width` values onto `channels`."""
        super().__init__()
        self.project = nn.Linear(width, channels)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Add the projected embedding (B, width) to features (B, C, *spatial)."""
        shift = self.project(time)
        return features + shift.reshape(*shift.shape, *[1] * (features.ndim - 2))
