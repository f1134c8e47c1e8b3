"""One reverse process on a whole slice, kept for a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from nnunet_diffusion.model.segmenter import DiffusionSegmenter


@dataclass(frozen=True, eq=False)
class ReverseProcess:
    """What a reverse process began with, went through and found; all as shares in [0, 1], (K, height, width).

    Attributes:
        start: the segmentation it starts from.
        states: (timestep, noisy state), from T' - 1 downwards.
        result: probabilities.
    """

    start: NDArray
    states: list[tuple[int, NDArray]]
    result: NDArray


def reverse_process(
    network: DiffusionSegmenter, image: Tensor, presegmentation: Tensor | None = None, **changes: Any
) -> ReverseProcess:
    """Run one reverse process on a slice at the network's resolution, without tiles, mirroring or averaging with nnU-Net.

    Args:
        network: in evaluation mode.
        image: (C, height, width), preprocessed; edges are repeated to a size that the network can halve.
        presegmentation: probabilities (K, height, width) to start from; by default the pre-segmentor's.
        changes: inference settings that differ from the network's, such as `steps`.
    """
    height, width = image.shape[1:]
    divisor = 2 ** len(network.settings.features_per_stage)

    def padded(tensor: Tensor) -> Tensor:
        return pad(tensor.float()[None], (0, -width % divisor, 0, -height % divisor), mode="replicate")

    def shares(state: Tensor) -> NDArray:
        unit = network.process.to_probabilities(state.float())[0, :, :height, :width]
        return np.clip(unit.cpu().numpy(), 0, 1)

    states: list[tuple[int, NDArray]] = []
    seen = padded(image)
    start = network.presegment(seen).probabilities if presegmentation is None else padded(presegmentation)
    with torch.no_grad(), network.overridden(samples=1, presegmentation_weight=0.0, **changes):
        found = network.sample(seen, start, on_step=lambda timestep, noisy, _: states.append((timestep, shares(noisy))))
    cut = (0, slice(None), slice(height), slice(width))
    return ReverseProcess(start[cut].cpu().numpy(), states, found[cut].float().cpu().numpy())
