"""Imperfect segmentations made from the truth, so that training shows the denoiser mistakes to repair (layer 2).

PD-DDPM starts the reverse process from another network's output. A denoiser trained on noised truth alone never meets
a mistake there and learns to return its start. Here the truth is given the mistakes segmentations have: borders moved
in and out, parts missing, parts invented, soft transitions; the target stays the truth.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

BLUR_CELLS = (2, 4, 8)  # voxels per cell of the grids that soften borders: borders move by about as much
PART_PROBABILITY = 0.25  # share of samples that lose a part; as many are given one
CERTAIN = 8.0  # log-odds of a part erased or invented


def corrupt(masks: Tensor, generator: Generator, regions: bool = False) -> Tensor:
    """Return probabilities of a plausible wrong segmentation for each true one.

    Args:
        masks: (B, K, *spatial) of 0 and 1, background first unless the heads are regions.
        generator: source of all randomness, on the masks' device.
        regions: whether the heads are regions; each is then spoiled by itself.

    Returns:
        (B, K, *spatial) probabilities, of classes with the sum 1 over K, float32.
    """
    if regions:
        alone = masks.flatten(0, 1).unsqueeze(1)
        return corrupt(torch.cat((1 - alone, alone), 1), generator)[:, 1].view(masks.shape)
    strength = 1.5 * _uniform((len(masks),), masks, generator)
    logits = (_soften(masks, generator) + 1e-2).log()
    # a constant moves all borders of a class in or out, a smooth field moves them here and there
    logits = logits + strength * _normal((len(masks), masks.shape[1]), masks, generator)
    logits = logits + strength * _smooth_field(masks, cells=6, generator=generator)
    logits = logits + _erased_part(masks, generator) + _invented_part(masks, generator)
    return logits.softmax(1)


def _soften(share: Tensor, generator: Generator) -> Tensor:
    """Mix the label map with itself averaged over coarser grids, in random proportions."""
    weights = torch.rand((len(share), 1 + len(BLUR_CELLS)), generator=generator, device=share.device)
    weights = weights / weights.sum(1, keepdim=True)
    mixed = share * _column(weights[:, 0], share)
    for index, cell in enumerate(BLUR_CELLS, start=1):
        coarse = interpolate(share, size=[max(1, -(-size // cell)) for size in share.shape[2:]], mode="area")
        mixed = mixed + _resize(coarse, share) * _column(weights[:, index], share)
    return mixed


def _erased_part(share: Tensor, generator: Generator) -> Tensor:
    """Background log-odds of everything beyond a random plane near the foreground's centre, for some samples."""
    foreground = share[:, 1:].sum(1, keepdim=True)
    mass = foreground.flatten(1).sum(1).clamp(min=1)
    beyond = torch.zeros_like(foreground)
    for axis, size in enumerate(share.shape[2:]):
        shape = [1] * share.ndim
        shape[axis + 2] = size
        position = torch.linspace(-0.5, 0.5, size, device=share.device).view(shape)
        centre = (foreground * position).flatten(1).sum(1) / mass
        centre = centre + 0.05 * torch.randn(len(share), generator=generator, device=share.device)
        beyond = beyond + _normal((len(share),), share, generator) * (position - _column(centre, share))
    chosen = _uniform((len(share),), share, generator) < PART_PROBABILITY
    background = torch.zeros_like(share)
    background[:, :1] = CERTAIN * (chosen & (beyond > 0))
    return background


def _invented_part(share: Tensor, generator: Generator) -> Tensor:
    """Log-odds of one foreground class inside random blobs, for some samples, with or without foreground."""
    blobs = _smooth_field(share[:, :1], cells=5, generator=generator) > 1.2
    chosen = _uniform((len(share),), share, generator) < PART_PROBABILITY
    classes = torch.randint(1, share.shape[1], (len(share),), generator=generator, device=share.device)
    which = torch.nn.functional.one_hot(classes, share.shape[1]).view(*share.shape[:2], *[1] * (share.ndim - 2))
    return CERTAIN * (blobs & chosen) * which


def _smooth_field(like: Tensor, cells: int, generator: Generator) -> Tensor:
    """Normal noise on a grid of `cells` per axis, interpolated to `like`'s shape."""
    size = [min(cells, length) for length in like.shape[2:]]
    return _resize(torch.randn((*like.shape[:2], *size), generator=generator, device=like.device), like)


def _resize(field: Tensor, like: Tensor) -> Tensor:
    return interpolate(
        field, size=like.shape[2:], mode="bilinear" if like.ndim == 4 else "trilinear", align_corners=False
    )


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return _column(torch.rand(shape, generator=generator, device=like.device), like)


def _normal(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return _column(torch.randn(shape, generator=generator, device=like.device), like)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions until `values` broadcasts against `like`."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))
