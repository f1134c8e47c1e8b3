"""Blocks: norms, residual block and slim dense block against slow implementations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_diffusion.networks.blocks import (
    GroupNorm,
    InstanceNorm,
    ResidualBlock,
    SlimDenseBlock,
    group_count,
    group_norm,
    make_conv,
    make_norm,
    per_axis,
    resolve_conv_op,
)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (16, 4), (24, 6), (64, 16), (128, 32), (320, 32), (1024, 32), (130, 26)],
)
def test_group_count_is_the_largest_divisor_that_leaves_four_channels(channels, groups):
    assert group_count(channels) == groups


def test_group_count_always_divides():
    for channels in range(1, 600):
        groups = group_count(channels)
        assert channels % groups == 0
        assert groups <= 32
        assert groups == 1 or channels // groups >= 4


@pytest.mark.parametrize("conv_op", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_conv_op_by_class_and_by_name(conv_op):
    assert resolve_conv_op(conv_op) is conv_op
    assert resolve_conv_op(f"torch.nn.modules.conv.{conv_op.__name__}") is conv_op


@pytest.mark.parametrize("conv_op", ["torch.nn.Linear", "no.such.class", nn.Linear, 2])
def test_conv_op_refuses_what_is_no_convolution(conv_op):
    with pytest.raises(ValueError, match="conv_op must be"):
        resolve_conv_op(conv_op)


def test_per_axis_repeats_integers_and_refuses_other_lengths():
    assert per_axis("strides", [1, (1, 2)], nn.Conv2d) == [(1, 1), (1, 2)]
    with pytest.raises(ValueError, match=r"strides\[1\].*2 integers"):
        per_axis("strides", [1, [1, 2, 2]], nn.Conv2d)
    with pytest.raises(ValueError, match=r"strides\[0\].*at least 1"):
        per_axis("strides", [0], nn.Conv2d)


def test_instance_norm_equals_torch():
    ours, theirs = InstanceNorm(6).double(), nn.InstanceNorm2d(6, affine=True).double()
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norm_keeps_information_of_a_single_voxel(batch):
    norm = make_norm("instance", 8, nn.Conv3d).train()
    normed = norm(torch.randn(batch, 8, 1, 1, 1))
    assert normed.isfinite().all()
    assert normed.std() > 0.5


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm3d), ("instance", InstanceNorm), ("group", GroupNorm)]
)
def test_norm_is_what_was_asked(norm, kind):
    assert type(make_norm(norm, 16, nn.Conv3d)) is kind


def test_unknown_norm_names_the_known_ones():
    with pytest.raises(ValueError, match="batch, instance, group.*'layer'"):
        make_norm("layer", 8, nn.Conv2d)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_conv_divides_the_size_rounding_up(size, kernel, stride):
    conv = make_conv(nn.Conv1d, 1, 1, [kernel], [stride])
    assert conv(torch.zeros(1, 1, size)).shape[2] == -(-size // stride)


@pytest.mark.parametrize(("conv_op", "size"), [(nn.Conv2d, (5, 7)), (nn.Conv3d, (3, 5, 4))])
def test_residual_block_is_the_sum_of_its_two_blocks(conv_op, size):
    block = ResidualBlock(8, 12, [3] * len(size), conv_op)
    features = torch.randn(2, 8, *size)
    widened = block.widen(features)
    assert block(features).shape == (2, 12, *size)
    torch.testing.assert_close(block(features), widened + block.refine(widened))
    nn.init.zeros_(block.refine[2].weight)
    nn.init.zeros_(block.refine[2].bias)
    torch.testing.assert_close(block(features), widened, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_slim_dense_block_is_equation_1(depth):
    block = SlimDenseBlock(2, 6, [3, 3], nn.Conv2d, depth=depth, norm="batch").double().eval()
    image = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    outputs = [image]
    for i in range(1, depth + 1):
        dense = sum((0.2 * x for x in outputs[1:i]), start=torch.zeros(()))
        outputs.append(block.layers[i - 1](outputs[i - 1]) + dense)
    torch.testing.assert_close(block(image), outputs[-1], rtol=0, atol=1e-12)


def test_slim_dense_layer_has_two_convolutions_norm_and_activation():
    block = SlimDenseBlock(1, 8, [3, 3, 3], nn.Conv3d, depth=4, norm="instance")
    assert len(block.layers) == 4
    edge_repeating = type(make_conv(nn.Conv3d, 1, 8, [3, 3, 3], padding_mode="replicate"))
    assert issubclass(edge_repeating, nn.Conv3d)
    for first, layer in zip([edge_repeating, nn.Conv3d, nn.Conv3d, nn.Conv3d], block.layers, strict=True):
        assert [type(part) for part in layer] == [first, nn.Conv3d, InstanceNorm, nn.LeakyReLU]


def test_slim_dense_block_needs_a_layer():
    with pytest.raises(ValueError, match="sdb_depth must be at least 1, got 0"):
        SlimDenseBlock(1, 8, [3, 3], nn.Conv2d, depth=0, norm="batch")


def test_group_norm_stays_in_half_precision_under_autocast():
    norm, features = group_norm(16), torch.randn(2, 16, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = norm(features.bfloat16())
    assert half.dtype == torch.bfloat16
    # one rounding of the input and one of the result, each 2^-9 of values up to about 4
    torch.testing.assert_close(half.float(), norm(features), atol=0.04, rtol=0.01)
