"""Prior-supervision branch: shapes, where its two heads look, single-voxel bottlenecks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_diffusion.networks.prior_supervision import PriorSupervision


def branch(strides, conv_op=nn.Conv2d, norm="batch", features=(4, 8, 12)):
    axes = 2 if conv_op is nn.Conv2d else 3
    return PriorSupervision(
        2,
        list(features),
        [(s,) * axes for s in strides],
        [(3,) * axes for _ in features],
        conv_op,
        presence_classes=3,
        location_classes=5,
        norm=norm,
    )


@pytest.mark.parametrize(("conv_op", "size"), [(nn.Conv2d, (13, 8)), (nn.Conv3d, (8, 9, 5))])
def test_shapes(conv_op, size):
    prior = branch([1, 2, 2], conv_op)(torch.randn(2, 2, *size))
    half = tuple(-(-n // 2) for n in size)
    assert prior.features.shape == (2, 12, *(-(-n // 2) for n in half))
    assert prior.presence_logits.shape == (2, 3)
    assert prior.location_logits.shape == (2, 5, *half)


def test_two_stages_take_the_location_from_the_first_block():
    prior = branch([1, 2], features=(4, 8))(torch.randn(2, 2, 6, 6))
    assert prior.location_logits.shape == (2, 5, 6, 6)


def test_presence_is_linear_in_the_pooled_last_features():
    net = branch([1, 2, 2]).eval()
    prior = net(torch.randn(2, 2, 8, 8))
    expected = prior.features.mean(dim=(2, 3)) @ net.presence.weight.T + net.presence.bias
    torch.testing.assert_close(prior.presence_logits, expected)


def test_location_comes_from_the_penultimate_unit():
    net = branch([1, 2, 2])
    net(torch.randn(2, 2, 8, 8)).location_logits.square().sum().backward()
    assert all(p.grad is None for p in net.units[-1].parameters())
    assert all(p.grad.abs().max() > 0 for p in net.units[0].parameters())


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("conv_op", [nn.Conv2d, nn.Conv3d])
def test_single_voxel_at_the_bottleneck_still_tells_images_apart(norm, conv_op):
    net = branch([1, 2, 2], conv_op, norm).train()
    size = (4, 4) if conv_op is nn.Conv2d else (4, 4, 4)
    logits = [net(torch.randn(1, 2, *size)).presence_logits for _ in range(2)]
    assert all(x.isfinite().all() for x in logits)
    assert not torch.allclose(logits[0], logits[1])
