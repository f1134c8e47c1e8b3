"""HiDiff's refiner: shapes on nnU-Net's topologies, what it depends on, binarised blocks."""

import pytest
import torch
from small_unets import WIDTHS, small_unet
from torch import nn

from nnunet_diffusion.networks import unet
from nnunet_diffusion.networks.binary import BinaryConv, straight_through_sign
from nnunet_diffusion.networks.hidiff import HiDiffRefiner

ANISOTROPIC_3D = {
    "features_per_stage": [4, 8, 8, 12],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 1]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "conv_op": "torch.nn.modules.conv.Conv3d",
}
PLAIN_2D = {"features_per_stage": [4, 8, 8], "strides": [1, 2, 2], "kernel_sizes": [3, 3, 3], "conv_op": nn.Conv2d}
CLASSES = 2


def guide_channels(topology):
    return [5 + stage for stage in range(len(topology["strides"]))]


def build(topology=PLAIN_2D, **options):
    torch.manual_seed(0)
    network = HiDiffRefiner(1, CLASSES, **topology, guide_channels=guide_channels(topology), **options)
    assert not any(parameter.any() for parameter in network.output[-1].parameters())
    nn.init.normal_(network.output[-1].weight, std=0.1)  # as after some training
    return network


def inputs(network, topology=PLAIN_2D, size=(12, 16), batch=2):
    """Image and p, noisy state, timestep, and encoder features of each stage's size."""
    image, noisy = torch.randn(batch, 1 + CLASSES, *size), torch.randint(0, 2, (batch, CLASSES, *size)).float()
    features, stage_size = [], list(size)
    for stride, channels in zip(topology["strides"], guide_channels(topology), strict=True):
        strides = [stride] * len(size) if isinstance(stride, int) else stride
        stage_size = [-(-n // s) for n, s in zip(stage_size, strides, strict=True)]
        features.append(torch.randn(batch, channels, *stage_size))
    return image, noisy, torch.arange(batch) * 3, features


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("topology", "size"),
    [(PLAIN_2D, (12, 16)), (PLAIN_2D, (9, 7)), (ANISOTROPIC_3D, (4, 8, 8)), (ANISOTROPIC_3D, (3, 7, 5))],
)
def test_shapes(topology, size, binary):
    network = build(topology, binary=binary)
    image, noisy, timestep, features = inputs(network, topology, size)
    assert network(noisy, timestep, network.encode(image, None, features)).shape == (2, CLASSES, *size)


def test_features_of_the_middle_stages_are_concatenated_and_the_lowest_attended_to():
    assert build().guided == (1,)
    assert build(ANISOTROPIC_3D).guided == (2,)
    six = {"features_per_stage": [4] * 6, "strides": [1, 2, 2, 2, 2, 2], "kernel_sizes": [3] * 6, "conv_op": nn.Conv2d}
    network = build(six)
    assert network.guided == (2, 3, 4)
    image, _, _, features = inputs(network, six, (32, 32))
    used = network.encode(image, None, features).features
    assert [each.shape[1] for each in used] == [7, 8, 9, 10]


@pytest.mark.parametrize("binary", [False, True])
def test_every_parameter_and_every_input_has_a_gradient(binary):
    network = build(binary=binary)
    image, noisy, timestep, features = inputs(network)
    image.requires_grad_()
    used = [each.requires_grad_() for each in features]
    found = network(noisy.requires_grad_(), timestep, network.encode(image, None, used))
    (found * torch.randn_like(found)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in (image, noisy, *used[1:]))
    assert used[0].grad is None  # the first stage's features are not used


@pytest.mark.parametrize("binary", [False, True])
def test_the_output_depends_on_each_input(binary):
    network = build(binary=binary).eval()
    image, noisy, timestep, features = inputs(network)
    plain = network(noisy, timestep, network.encode(image, None, features))

    def changed(noisy=noisy, timestep=timestep, image=image, features=features):
        return (network(noisy, timestep, network.encode(image, None, features)) - plain).abs().max() > 1e-4

    assert changed(noisy=1 - noisy)
    assert changed(timestep=timestep + 5)
    for channel in range(1 + CLASSES):
        other = image.clone()
        other[:, channel] += 1
        assert changed(image=other)
    for stage in (1, 2):
        assert changed(features=[each + (number == stage) for number, each in enumerate(features)])


def test_without_the_image_input_only_p_and_the_features_count():
    network = build(image_input=False).eval()
    image, noisy, timestep, features = inputs(network)
    plain = network(noisy, timestep, network.encode(image, None, features))
    other = image.clone()
    other[:, 0] += 1
    assert torch.equal(network(noisy, timestep, network.encode(other, None, features)), plain)
    other[:, 1] += 1
    assert not torch.equal(network(noisy, timestep, network.encode(other, None, features)), plain)


def test_samples_share_the_guidance():
    network = build().double().eval()
    image, noisy, timestep, features = (each if isinstance(each, list) else each.double() for each in inputs(network))
    guidance = network.encode(image, None, [each.double() for each in features])
    states = torch.cat((noisy, 1 - noisy)).view(2, 2, *noisy.shape[1:]).transpose(0, 1)
    together = network(states.flatten(0, 1), timestep.repeat_interleave(2), guidance.repeat_interleave(2))
    for sample in range(2):
        alone = network(states[:, sample], timestep, guidance)
        torch.testing.assert_close(together.view(2, 2, *noisy.shape[1:])[:, sample], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_encoder_features_of_nnunets_networks_fit(residual, dimension):
    nnunet = small_unet(residual=residual, dimension=dimension)
    conv_op = nn.Conv2d if dimension == 2 else nn.Conv3d
    network = HiDiffRefiner(1, 2, WIDTHS, [1, 2, 2], [3, 3, 3], conv_op, guide_channels=WIDTHS)
    image = torch.randn(1, 1, *[16] * dimension)
    features = unet.encode(nnunet, image)
    shown = torch.cat((image, torch.rand(1, 2, *[16] * dimension)), 1)
    noisy = torch.zeros(1, 2, *[16] * dimension)
    assert network(noisy, torch.tensor([3]), network.encode(shown, None, features)).shape == noisy.shape


def test_wrong_inputs_are_refused():
    network = build()
    image, _, _, features = inputs(network)
    with pytest.raises(ValueError, match=r"image must have 3 channels, those of p last"):
        network.encode(image[:, :1], None, features)
    with pytest.raises(ValueError, match="features are missing"):
        network.encode(image)
    with pytest.raises(ValueError, match=r"guide_channels must have one entry per stage \(3\), got 2"):
        HiDiffRefiner(1, 2, **PLAIN_2D, guide_channels=[4, 8])
    with pytest.raises(ValueError, match="at least 2 positive integers"):
        HiDiffRefiner(1, 2, [4], [1], [3], nn.Conv2d, guide_channels=[4])
    with pytest.raises(ValueError, match="attention_tokens must be at least 1"):
        build(attention_tokens=0)


def test_a_binarised_convolution_has_two_weights_for_each_output_channel_and_sees_signs():
    torch.manual_seed(1)
    conv = BinaryConv(3, 4, (3, 3), nn.Conv2d, 8)
    features, time = torch.randn(2, 3, 9, 9), torch.zeros(2, 8)
    nn.init.zeros_(conv.shift.project.bias)
    found = conv(features, time)
    weight = conv.conv.weight
    scale = weight.abs().mean((1, 2, 3), keepdim=True)
    wanted = nn.functional.conv2d(features.sign(), scale * weight.sign(), padding=1)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(conv(3 * features, time), found)
    # the shift moves the place where the sign changes
    nn.init.constant_(conv.shift.project.bias, 5.0)
    torch.testing.assert_close(
        conv(features, time)[:, :, 1:-1, 1:-1], conv(torch.ones_like(features), time)[:, :, 1:-1, 1:-1]
    )


def test_the_sign_has_the_gradient_of_a_clamp():
    values = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    signs = straight_through_sign(values)
    assert signs.tolist() == [-1, -1, 1, 1, 1]
    (gradient,) = torch.autograd.grad(signs.sum(), values)
    assert gradient.tolist() == [0, 1, 1, 1, 0]
