"""Parameter-shared attention and self-attention over voxels, with memory linear in the number of voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_diffusion.networks.blocks import group_norm, pointwise

FLOWS = ("condition", "denoising")
ATTENTIONS = ("paper", "cross")
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
    """Average features (B, C, *spatial) down to at most `tokens` voxels; return them unchanged if they have no more."""
    size = tuple(features.shape[2:])
    pooled = pooled_size(size, tokens)
    # "area" is adaptive average pooling for any number of axes
    return features if pooled == size else functional.interpolate(features, size=pooled, mode="area")


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query^T key / sqrt(D)) applied to the value, for feature maps.

    `scaled_dot_product_attention` silently builds the N x M matrix if queries and keys are narrower than values, or if
    channels are not the innermost axis in memory. Zero padding (which leaves the products unchanged), an explicit
    scale and contiguous copies avoid this.

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
        # functional.pad copies even if the padding is 0
        return (functional.pad(tokens, (0, padding)) if padding else tokens).contiguous().unsqueeze(1)

    # Eq. 3-4: V softmax(Q^T K)
    mixed_BHNC = functional.scaled_dot_product_attention(
        as_tokens_BHNC(query), as_tokens_BHNC(key), as_tokens_BHNC(value), scale=query.shape[1] ** -0.5
    )
    return mixed_BHNC.squeeze(1).transpose(1, 2).reshape(value.shape[0], width, *query.shape[2:])


class ParameterSharedAttention(nn.Module):
    """Attention of each flow to itself with shared query and key projections; PGDiffSeg, Eq. 2-5 and Fig. 4.

    By the equations the flows share parameters, not activations. With "cross" the denoising flow attends to the condition
    flow instead, as the paper's text describes. In both the condition flow stays independent of the noisy state.
    """

    def __init__(
        self,
        channels: int,
        conv_op: type[nn.Module],
        tokens: int,
        kind: str = "paper",
        flows: Sequence[str] = FLOWS,
    ) -> None:
        """Build the projections of these flows; keys and values are pooled to at most `tokens` voxels.

        Raises:
            ValueError: if the kind is unknown.
        """
        if kind not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {kind!r}")
        super().__init__()
        self.tokens = tokens
        key_channels = max(1, channels // KEY_REDUCTION)
        # Eq. 2: Q and K are shared, each flow has its own V. A bias of K would cancel in the softmax
        self.query = pointwise(conv_op, channels, key_channels)
        self.key = pointwise(conv_op, channels, key_channels, bias=False)
        self.value = nn.ModuleDict({flow: pointwise(conv_op, channels, channels) for flow in flows})
        # Eq. 5: eta1 and eta2 start at 0, and stay near it in training; attention across the flows starts at 1.
        # As scalars they do not promote half-precision features
        self.eta = nn.ParameterDict({flow: nn.Parameter(torch.zeros(())) for flow in flows})
        if kind == "cross":
            nn.init.ones_(self.eta["denoising"])

    def forward(self, features: Tensor, flow: str, seen: Tensor | None = None) -> Tensor:
        """Map features (B, C, *spatial) of a flow, "condition" or "denoising", to the same shape.

        Args:
            features: features of the flow.
            flow: its name.
            seen: features of the same shape to attend to; None for the flow's own.
        """
        pooled = pool_tokens(features if seen is None else seen, self.tokens)
        # Eq. 3-4: X = v Softmax(q^T k)
        mixed = attend(self.query(features), self.key(pooled), self.value[flow](pooled))
        # Eq. 5: x = eta X + x
        return self.eta[flow] * mixed + features

    def row(self, features: Tensor, voxel: Sequence[int], seen: Tensor | None = None) -> Tensor:
        """Return how much a voxel attends to each (pooled) voxel, (B, *pooled), sum 1: one row of Softmax(q^T k), Eq. 3-4.

        Args:
            features: (B, C, *spatial), what `forward` got.
            voxel: index of the voxel in `spatial`.
            seen: as for `forward`.
        """
        key = self.key(pool_tokens(features if seen is None else seen, self.tokens))
        place = (slice(None), slice(None), *voxel)
        query = self.query(features)[place]
        weights = torch.einsum("bd,bdm->bm", query, key.flatten(2)) * query.shape[1] ** -0.5
        return weights.softmax(1).reshape(len(features), *key.shape[2:])


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
