"""Building blocks shared by the networks: norms, residual block, slim dense block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_batchnorm,
    maybe_convert_scalar_to_list,
)
from torch import Tensor, nn
from torch.nn import functional

from nnunet_diffusion.networks.architectures import network_class

NORMS = ("batch", "instance", "group")
MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 4
DENSE_SCALE = 0.2


def resolve_conv_op(conv_op: type[nn.Module] | str) -> type[nn.Module]:
    """Return the convolution class that nnU-Net's plans name.

    Args:
        conv_op: a convolution class of torch, or its dotted name such as "torch.nn.modules.conv.Conv3d".

    Raises:
        ValueError: if it is neither.
    """
    found = network_class(conv_op) if isinstance(conv_op, str) else conv_op
    if not isinstance(found, type) or not issubclass(found, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(f"conv_op must be a convolution class of torch or its dotted name, got {conv_op!r}")
    return found


def per_axis(name: str, values: Sequence[int | Sequence[int]], conv_op: type[nn.Module]) -> list[tuple[int, ...]]:
    """Return one tuple of positive integers, one per spatial axis, for each stage.

    Args:
        name: name of the values, for the error message.
        values: for each stage, one integer for all axes or one integer per axis.
        conv_op: the convolution class, which decides the number of axes.

    Raises:
        ValueError: if a stage has the wrong number of axes, or a value below one.
    """
    axes = convert_conv_op_to_dim(conv_op)
    stages = [tuple(int(v) for v in maybe_convert_scalar_to_list(conv_op, value)) for value in values]
    for stage, sizes in enumerate(stages):
        if len(sizes) != axes or min(sizes) < 1:
            raise ValueError(f"{name}[{stage}] must hold {axes} integers of at least 1 (one per axis), got {sizes}")
    return stages


def check_topology(features: Sequence[int], strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless widths, strides and kernel sizes describe a U-Net of at least two stages."""
    if len(features) < 2 or min(features) < 1:
        raise ValueError(f"features_per_stage must hold at least 2 positive integers, got {features}")
    for name, values in (("strides", strides), ("kernel_sizes", kernels)):
        if len(values) != len(features):
            raise ValueError(f"{name} must have one entry per stage ({len(features)}), got {len(values)}")
    if max(strides[0]) > 1:
        raise ValueError(f"strides[0] must be all ones (the first stage works at full resolution), got {strides[0]}")
    if any(size % 2 == 0 for kernel in kernels for size in kernel):
        raise ValueError(f"kernel_sizes must be odd, got {list(kernels)}")


def group_count(channels: int) -> int:
    """Return the number of groups for group normalisation.

    This is the largest divisor of `channels` that is at most 32 and leaves at least 4 channels per group, or 1 if none
    exists. Smaller groups resemble instance normalisation, which would remove a time embedding added just before it.

    Args:
        channels: number of channels, at least 1.
    """
    limit = min(MAX_GROUPS, channels // MIN_CHANNELS_PER_GROUP)
    return max((groups for groups in range(1, limit + 1) if channels % groups == 0), default=1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that stays in half precision under autocast, which runs torch's own in float32.

    The kernel computes the statistics in float32 in either case. Float32 feature maps would double the memory traffic
    of every residual block.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features of shape (B, C, *spatial)."""
        return self.normalise(features, self.num_groups)

    def normalise(self, features: Tensor, groups: int) -> Tensor:
        """Normalise features of shape (B, C, *spatial) in `groups` groups of channels."""
        if features.dtype not in (torch.bfloat16, torch.float16):
            return functional.group_norm(features, groups, self.weight, self.bias, self.eps)
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            return functional.group_norm(features, groups, weight, bias, self.eps)


def group_norm(channels: int) -> GroupNorm:
    """Return group normalisation with `group_count(channels)` groups."""
    return GroupNorm(group_count(channels), channels)


class InstanceNorm(GroupNorm):
    """Instance normalisation that also accepts a feature map of a single voxel.

    The variance of a single voxel is zero, so that torch's instance normalisation raises an error. Such a voxel is
    normalised over its channels instead.
    """

    def __init__(self, channels: int) -> None:
        """Build the norm with one learned scale and shift per channel."""
        super().__init__(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features of shape (B, C, *spatial)."""
        return self.normalise(features, 1 if features[0, 0].numel() == 1 else self.num_groups)


def make_norm(norm: str, channels: int, conv_op: type[nn.Module]) -> nn.Module:
    """Return the normalisation layer of that name.

    Args:
        norm: "batch" (in training needs more than one value per channel), "instance" or "group".
        channels: number of channels.
        conv_op: the convolution class, which decides the number of axes.

    Raises:
        ValueError: if the name is unknown.
    """
    if norm == "batch":
        return get_matching_batchnorm(conv_op)(channels)
    if norm == "instance":
        return InstanceNorm(channels)
    if norm == "group":
        return group_norm(channels)
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def make_conv(
    conv_op: type[nn.Module],
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] | int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
) -> nn.Module:
    """Return a convolution that keeps the size (n becomes ceil(n / stride)).

    Args:
        conv_op: the convolution class.
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd kernel size per axis.
        stride: stride per axis.
        bias: whether to add a bias; False if a norm follows directly, which would remove it.
        padding_mode: "zeros" or "replicate" (repeats the voxels at the edge).
    """
    if padding_mode == "replicate":
        edge_repeating = _edge_repeating(conv_op)  # type: ignore[arg-type]  # mypy takes its __hash__ for an instance's
        return edge_repeating(in_channels, out_channels, tuple(kernel_size), stride=stride, bias=bias)
    padding = _same_padding(kernel_size)
    return conv_op(in_channels, out_channels, tuple(kernel_size), stride=stride, padding=padding, bias=bias)


def _same_padding(kernel_size: Sequence[int]) -> list[int]:
    """Return the padding per axis with which a convolution with odd kernels keeps the size."""
    return [(size - 1) // 2 for size in kernel_size]


@cache
def _edge_repeating(conv_op: type[nn.Module]) -> type[nn.Module]:
    """Return a convolution class with replicate padding; it keeps the size for odd kernels and stride 1."""

    class EdgeRepeating(conv_op):  # type: ignore[misc, valid-type]
        def forward(self, features: Tensor) -> Tensor:
            """Convolve features of shape (B, C, *spatial)."""
            return super().forward(repeat_edges(features, _same_padding(self.kernel_size)))

    return EdgeRepeating


def repeat_edges(features: Tensor, padding: Sequence[int]) -> Tensor:
    """Repeat the outermost voxels of features (B, C, *spatial) `padding` times beyond both ends of each axis.

    Under torch.compile the repetition is made by concatenation: torch.compile (2.14) expects wrong strides of the
    gradient of torch's own padding (`replication_pad2d_backward`), and training would stop with an error.
    """
    if not torch.compiler.is_compiling():
        return functional.pad(features, [size for size in reversed(padding) for _ in range(2)], mode="replicate")
    for axis, size in enumerate(padding, start=2):
        first, last = features.narrow(axis, 0, 1), features.narrow(axis, features.shape[axis] - 1, 1)
        features = torch.cat([*[first] * size, features, *[last] * size], dim=axis)
    return features


def pointwise(conv_op: type[nn.Module], in_channels: int, out_channels: int, bias: bool = True) -> nn.Module:
    """Return a convolution with a kernel of one voxel."""
    return conv_op(in_channels, out_channels, 1, bias=bias)


def output_head(
    channels: int, output_channels: int, kernel_size: Sequence[int], conv_op: type[nn.Module]
) -> nn.Sequential:
    """Return a U-Net's last layers: GroupNorm, SiLU and a convolution to the output channels."""
    # zero padding would disturb the outermost voxels, and no later layer could correct them
    last = make_conv(conv_op, channels, output_channels, kernel_size, padding_mode="replicate")
    return nn.Sequential(group_norm(channels), nn.SiLU(), last)


class ResidualBlock(nn.Module):
    """Two (GroupNorm - SiLU - convolution) with a residual connection; PGDiffSeg, Eq. 20 and Fig. 12.

    The first changes the number of channels to `out_channels`, the second has the residual connection. With this reading
    the number of operations agrees with the paper's; a pointwise convolution in the shortcut would exceed it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], conv_op: type[nn.Module]
    ) -> None:
        """Build the two blocks."""
        super().__init__()

        def block(channels: int) -> nn.Sequential:
            return nn.Sequential(
                group_norm(channels), nn.SiLU(), make_conv(conv_op, channels, out_channels, kernel_size)
            )

        self.widen, self.refine = block(in_channels), block(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, *spatial) to (B, out_channels, *spatial)."""
        # Eq. 20, in the order of Fig. 12
        features = self.widen(features)
        return features + self.refine(features)


class SlimDenseBlock(nn.Module):
    """Layers that each receive the scaled sum of all earlier outputs; PGDiffSeg, Eq. 1 and Fig. 3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        conv_op: type[nn.Module],
        *,
        depth: int,
        norm: str,
    ) -> None:
        """Build `depth` layers; the first maps the input to `out_channels`.

        Raises:
            ValueError: if depth is below one or the norm unknown.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(f"sdb_depth must be at least 1, got {depth}")
        # zero padding would mean neither background nor foreground for a state in [-1, 1]
        first = [(in_channels, "replicate"), *[(out_channels, "zeros")] * (depth - 1)]
        # Fig. 3: H is two convolutions, norm and LeakyReLU
        self.layers = nn.ModuleList(
            nn.Sequential(
                make_conv(conv_op, channels, out_channels, kernel_size, bias=False, padding_mode=padding_mode),
                make_conv(conv_op, out_channels, out_channels, kernel_size, bias=False),
                make_norm(norm, out_channels, conv_op),
                nn.LeakyReLU(inplace=True),
            )
            for channels, padding_mode in first
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, *spatial) to (B, out_channels, *spatial)."""
        newest = self.layers[0](features)
        total = None
        # Eq. 1: x_i = H(x_{i-1}) + 0.2 * (x_1 + ... + x_{i-1})
        for layer in list(self.layers)[1:]:
            total = newest if total is None else total + newest
            newest = torch.add(layer(newest), total, alpha=DENSE_SCALE)
        return newest
