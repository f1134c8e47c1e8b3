"""Binarised convolutions (XNOR-Net, Rastegari et al. 2016; ReActNet, Liu et al. 2020) with time-dependent shifts (HiDiff)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnunet_diffusion.networks.blocks import make_conv
from nnunet_diffusion.networks.time_embedding import TimeShift


class _StraightThroughSign(torch.autograd.Function):
    """-1 or 1 forward; the gradient of a clamp to [-1, 1] backward (Hubara et al. 2016)."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (values,) = context.saved_tensors
        return gradients[0] * (values.abs() <= 1)


def straight_through_sign(values: Tensor) -> Tensor:
    """Return -1 or 1 for each value (0 counts as positive), with the gradient of a clamp to [-1, 1]."""
    return _StraightThroughSign.apply(values)


class BinaryConv(nn.Module):
    """Convolution of the signs of shifted features with the signs of weights, scaled by the weights' mean magnitude.

    The shift before the sign depends on the timestep, because the features' distribution does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        conv_op: type[nn.Module],
        time_width: int,
    ) -> None:
        """Build the convolution; it keeps the size and has no bias, as a norm or a shift follows."""
        super().__init__()
        self.shift = TimeShift(time_width, in_channels)
        self.conv = make_conv(conv_op, in_channels, out_channels, kernel_size, bias=False)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Map (B, in_channels, *spatial) to (B, out_channels, *spatial)."""
        conv: Any = self.conv
        # one scale for each output channel: the least-squares fit of alpha sign(w) to w
        scale = conv.weight.abs().flatten(1).mean(1).view(-1, *[1] * (conv.weight.ndim - 1))
        weight = scale * straight_through_sign(conv.weight)
        signs = straight_through_sign(self.shift(features, time))
        return functional_call(conv, {"weight": weight}, (signs,))
