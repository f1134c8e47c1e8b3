"""Losses of the denoiser beside nnU-Net's own Dice + cross-entropy, which is handed in from above (layer 2)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_diffusion.model import labels
from nnunet_diffusion.model.labels import Target


def presence_loss(presence_logits: Tensor, target: Target, regions: bool = False) -> Tensor:
    """Cross-entropy of "does this class occur in the patch" (PGDiffSeg Eq. 7, for each foreground class or region).

    Args:
        presence_logits: (B, K - 1), of regions (B, K).
        target: the truth; with ignored voxels, what may hide behind them does not count.
        regions: whether the heads are regions.
    """
    found, weight = labels.presence(target, regions)
    return weighted_cross_entropy(presence_logits.float(), found, weight)


def location_loss(location_logits: Tensor, target: Target, regions: bool = False) -> Tensor:
    """Soft Dice + cross-entropy of the coarse location map (PGDiffSeg Eq. 8 and 9).

    Args:
        location_logits: (B, K - 1, *coarse), of regions (B, K, *coarse).
        target: the truth, averaged down to the coarse grid; cells count by their share of known voxels.
        regions: whether the heads are regions.

    Returns:
        Scalar, its Dice that of the whole batch, in distributed training too. Without foreground it is finite: the
        cross-entropy alone, up to the Dice of an empty map.
    """
    logits = location_logits.float()
    wanted, weight = labels.location(target, logits.shape[2:], regions)
    return _soft_dice_loss(logits.sigmoid(), wanted, weight) + weighted_cross_entropy(logits, wanted, weight)


def weighted_cross_entropy(logits: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy averaged with weights that broadcast against `logits`; 0 where all weights are 0."""
    terms = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return _mean(terms, weight)


def soft_dice_loss(probability: Tensor, wanted: Tensor, known: Tensor | None = None) -> Tensor:
    """1 - soft Dice of the whole batch, mean over the channels; finite without foreground.

    Args:
        probability: (B, K, *spatial).
        wanted: same shape, 0 to 1.
        known: (B, 1, *spatial) bool; other voxels do not count.
    """
    return _soft_dice_loss(probability, wanted, 1.0 if known is None else known.to(wanted))


def squared_error(prediction: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean squared error (PGDiffSeg Eq. 19).

    Args:
        prediction: (B, K, *spatial).
        target: same shape.
        known: (B, 1, *spatial) bool; other voxels do not count.
    """
    return mean((prediction.float() - target) ** 2, known)


def mean(terms: Tensor, known: Tensor | None) -> Tensor:
    """Mean of (B, K, *spatial) over the voxels that are known, (B, 1, *spatial) bool; over all without."""
    return terms.mean() if known is None else _mean(terms, known.to(terms))


def _soft_dice_loss(probability: Tensor, wanted: Tensor, weight: Tensor | float) -> Tensor:
    axes = (0, *range(2, wanted.ndim))
    overlap = _over_ranks((weight * probability * wanted).sum(axes))
    total = _over_ranks((weight * (probability + wanted)).sum(axes))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


def _over_ranks(sums: Tensor) -> Tensor:
    """Return the sums over all processes of a distributed training, with gradients."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    from torch.distributed.nn.functional import all_reduce  # not in every build of torch

    return all_reduce(sums)


def _mean(terms: Tensor, weight: Tensor) -> Tensor:
    weight = weight.expand_as(terms)
    return (terms * weight).sum() / weight.sum().clamp(min=1)
