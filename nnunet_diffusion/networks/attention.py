"""Attention over voxels whose memory is linear in their number: parameter-shared attention and self-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_diffusion.networks.blocks import group_norm, pointwise

FLOWS = ("condition", "denoising")
KEY_REDUCTION = 8


def pooled_size(size: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return the size to which keys and values are pooled.

    The longest axis is halved, rounding up, until the product is at most `tokens`.

    Args:
        size: spatial size in voxels.
        tokens: most tokens allowed, at least 1.
    """
    pooled = list(size)
    while math.prod(pooled) > tokens:
        longest = pooled.index(max(pooled))
        pooled[longest] = -(-pooled[longest] // 2)
    return tuple(pooled)


def pool_tokens(features: Tensor, tokens: int) -> Tensor:
    """Average features (B, C, *spatial) down to at most `tokens` voxels; unchanged if they are no more than that."""
    size = tuple(features.shape[2:])
    pooled = pooled_size(size, tokens)
    # "area" is adaptive average pooling for any number of axes
    return features if pooled == size else functional.interpolate(features, size=pooled, mode="area")


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query^T key / sqrt(D)) applied to the value, for feature maps.

    Trap: `scaled_dot_product_attention` builds the N x M matrix without a word when queries and keys are narrower
    than values, or when channels are not the innermost axis in memory. Hence the zeros, which change no product, the
    explicit scale and the contiguous copies.

    Args:
        query: (B, D, *spatial), N voxels.
        key: (B, D, *pooled), M voxels.
        value: (B, C, *pooled), C >= D.

    Returns:
        (B, C, *spatial).
    """
    width = value.shape[1]

    # B batch, H one head, N voxels, C channels
    def as_tokens_BHNC(features: Tensor) -> Tensor:
        tokens, padding = features.flatten(2).transpose(1, 2), width - features.shape[1]
        # padding copies even where it adds nothing
        return (functional.pad(tokens, (0, padding)) if padding else tokens).contiguous().unsqueeze(1)

    mixed_BHNC = functional.scaled_dot_product_attention(
        as_tokens_BHNC(query), as_tokens_BHNC(key), as_tokens_BHNC(value), scale=query.shape[1] ** -0.5
    )
    return mixed_BHNC.squeeze(1).transpose(1, 2).reshape(value.shape[0], width, *query.shape[2:])


class ParameterSharedAttention(nn.Module):
    """Attention of each flow to itself with shared query and key projections; PGDiffSeg, Eq. 2-5 and Fig. 4.

    The flows share parameters, not activations, so the condition flow stays independent of the noisy state.
    """

    def __init__(self, channels: int, conv_op: type[nn.Module], tokens: int) -> None:
        """Build the projections; keys and values are pooled to at most `tokens` voxels."""
        super().__init__()
        self.tokens = tokens
        key_channels = max(1, channels // KEY_REDUCTION)
        # Eq. 2: Q and K are shared, each flow has its own V. A bias of K cancels in the softmax
        self.query = pointwise(conv_op, channels, key_channels)
        self.key = pointwise(conv_op, channels, key_channels, bias=False)
        self.value = nn.ModuleDict({flow: pointwise(conv_op, channels, channels) for flow in FLOWS})
        # Eq. 5: eta1 and eta2 start at 0; without an axis, so that they do not promote half precision features
        self.eta = nn.ParameterDict({flow: nn.Parameter(torch.zeros(())) for flow in FLOWS})

    def forward(self, features: Tensor, flow: str) -> Tensor:
        """Map features (B, C, *spatial) of a flow, "condition" or "denoising", to the same shape."""
        pooled = pool_tokens(features, self.tokens)
        # Eq. 3-4: X = v Softmax(q^T k)
        mixed = attend(self.query(features), self.key(pooled), self.value[flow](pooled))
        # Eq. 5: x = eta X + x
        return self.eta[flow] * mixed + features


class SelfAttention(nn.Module):
    """Self-attention with a residual connection between the residual blocks of the bottleneck; PGDiffSeg, Fig. 12b."""

    def __init__(self, channels: int, conv_op: type[nn.Module], tokens: int) -> None:
        """Build the projections; keys and values are pooled to at most `tokens` voxels."""
        super().__init__()
        self.tokens = tokens
        self.norm = group_norm(channels)
        self.query = pointwise(conv_op, channels, channels)
        self.key = pointwise(conv_op, channels, channels, bias=False)
        self.value = pointwise(conv_op, channels, channels)
        self.out = pointwise(conv_op, channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, *spatial) to the same shape."""
        normed = self.norm(features)
        pooled = pool_tokens(normed, self.tokens)
        return features + self.out(attend(self.query(normed), self.key(pooled), self.value(pooled)))
