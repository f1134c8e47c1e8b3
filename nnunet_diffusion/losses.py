"""Losses of the denoiser beside nnU-Net's own Dice + cross-entropy, which is handed in from above (layer 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_diffusion import labels


def presence_loss(presence_logits: Tensor, state: Tensor) -> Tensor:
    """Cross-entropy of "does this class occur in the patch" (PGDiffSeg Eq. 7, for each foreground class).

    Args:
        presence_logits: (B, K - 1).
        state: (B, K, *spatial) clean state in {-1, +1}.
    """
    return binary_cross_entropy_with_logits(presence_logits.float(), labels.presence(state))


def location_loss(location_logits: Tensor, state: Tensor) -> Tensor:
    """Soft Dice + cross-entropy of the coarse location map (PGDiffSeg Eq. 8 and 9).

    Args:
        location_logits: (B, K - 1, *coarse).
        state: (B, K, *spatial) clean state in {-1, +1}; averaged down to the coarse grid.

    Returns:
        Scalar; finite without foreground too, where it is the cross-entropy alone up to the Dice of an empty map.
    """
    logits = location_logits.float()
    target = labels.location(state, logits.shape[2:])
    probability = logits.sigmoid()
    axes = (0, *range(2, logits.ndim))
    overlap, total = (probability * target).sum(axes), (probability + target).sum(axes)
    dice = (2 * overlap + 1) / (total + 1)
    return 1 - dice.mean() + binary_cross_entropy_with_logits(logits, target)


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error (PGDiffSeg Eq. 19), each sample weighted by `weight` (B, 1, ..., 1) if given."""
    error = (prediction.float() - target) ** 2
    return (error if weight is None else error * weight).mean()


def min_snr_weight(alpha_bar: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Weight of the squared error at a noise level (Hang et al. 2023, "Efficient diffusion training via Min-SNR").

    Args:
        alpha_bar: (B, 1, ..., 1), 0 < alpha_bar < 1.
        prediction_type: `x0`, `epsilon` or `v`.
        gamma: cap of the signal-to-noise ratio, > 0.

    Returns:
        min(SNR, gamma) for x0, divided by SNR for epsilon and by SNR + 1 for v.
    """
    snr = alpha_bar / (1 - alpha_bar)
    divisor = {"x0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[prediction_type]
    return snr.clamp(max=gamma) / divisor
