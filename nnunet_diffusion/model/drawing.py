"""Chains that decide on the way: clean estimates that are drawn from their probabilities before they are noised again.

A sampler that noises the estimate itself averages over all masks that it allows. One that noises a drawn mask commits to it, so
that chains of one image end at differing masks (CCDM, Zbinden et al. 2023, whose states are categorical throughout).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.bernoulli import Uniform, uniform_like
from nnunet_diffusion.diffusion.process import Process, Random
from nnunet_diffusion.diffusion.samplers import Estimate
from nnunet_diffusion.model import labels

NOTHING, VOXELS, LEVEL = "no", "voxels", "level"
DRAWS = (NOTHING, VOXELS, LEVEL)


def deciding(
    estimate: Estimate, kind: str, last: int, process: Process, regions: bool, generator: Random = None
) -> Estimate:
    """Return an estimate that is drawn at all timesteps but the last, whose probabilities are the result.

    Args:
        estimate: (noisy, timestep) -> clean estimate (B, K, *spatial).
        kind: one of `DRAWS`; with "no" the estimate is returned as it is.
        last: last timestep of the reverse process.
        process: the diffusion process.
        regions: whether the heads are regions.
        generator: source of the random numbers, also one for each entry of the batch.
    """
    if kind == NOTHING:
        return estimate

    def decided(noisy: Tensor, timestep: int) -> Tensor:
        clean = estimate(noisy, timestep)
        if timestep == last:
            return clean
        probabilities = labels.normalised(process.to_probabilities(clean), regions)
        return process.to_state(draw(probabilities, kind, regions, generator)).to(clean)

    return decided


def draw(probabilities: Tensor, kind: str, regions: bool, generator: Random = None) -> Tensor:
    """Return masks (B, K, *spatial) drawn from probabilities; each voxel has its own probability of each head.

    Args:
        probabilities: (B, K, *spatial).
        kind: "voxels" draws each voxel by itself. "level" draws one number u for the whole image: its foreground is where the
            probability of foreground is above u, a level set, so that borders move as a whole.
        regions: whether the heads are regions; they share u.
        generator: as for `deciding`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in (VOXELS, LEVEL):
        raise ValueError(f"kind is {kind!r}; known kinds of draws: {VOXELS}, {LEVEL}")
    one_number = (slice(None), *[slice(0, 1)] * (probabilities.ndim - 1))
    uniform = uniform_like(probabilities[:, :1] if kind == VOXELS else probabilities[one_number], generator)
    if regions:
        return (probabilities > uniform).to(probabilities)
    # inverse of the cumulative distribution over the classes, the background first
    below = (probabilities.cumsum(1)[:, :-1] <= uniform).sum(1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(1, below, 1.0)


def level_noise(regions: bool) -> Uniform:
    """Return a source of noise for a Bernoulli process whose draws are level sets: all voxels of an image share one number u.

    Args:
        regions: whether the heads are regions, which share u. Of classes the background has 1 - u, so that of two classes each
            voxel has one, as in `draw`.
    """

    def noise(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        batch, _, *spatial = shape
        device = None if generator is None else generator.device
        one = torch.rand((batch, 1, *[1] * len(spatial)), generator=generator, device=device, dtype=torch.float32)
        shared = one.expand(tuple(shape)).clone()
        if not regions:
            # 1 - u of a u of 0 would be 1, which no probability exceeds
            shared[:, :1] = (1 - one).clamp(max=1 - torch.finfo(torch.float32).eps)
        return shared

    return noise
