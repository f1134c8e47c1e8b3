"""nnU-Net's network as denoiser, and the features of nnU-Net's stages."""

import pytest
import torch
from small_unets import WIDTHS, small_unet
from torch import nn

from nnunet_diffusion.networks import unet
from nnunet_diffusion.networks.noisy_unet import NoisyUNet

CASES = [(False, 2), (False, 3), (True, 2), (True, 3)]


def denoiser_of(nnunet, residual=False, dimension=2, classes=3):
    denoiser = NoisyUNet(small_unet(1 + classes, classes, residual, dimension), 1, classes)
    denoiser.start_from(nnunet.state_dict())
    return denoiser.eval()


@pytest.mark.parametrize(("residual", "dimension"), CASES)
def test_before_training_the_denoiser_is_nnunet(residual, dimension):
    nnunet = small_unet(residual=residual, dimension=dimension).eval()
    denoiser = denoiser_of(nnunet, residual, dimension)
    image = torch.randn(2, 1, *[16] * dimension)
    for timestep in (0, 999):
        noisy = 5 * torch.randn(2, 3, *[16] * dimension)
        found = denoiser(noisy, torch.full((2,), timestep), denoiser.encode(image))
        torch.testing.assert_close(found, nnunet(image))


def test_training_reaches_the_state_and_the_timestep():
    """After a few steps against a target, both noise and timestep change the output; nnU-Net's own part has gradients too."""
    torch.manual_seed(0)
    denoiser = denoiser_of(small_unet()).train()
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    image, noisy = torch.randn(2, 1, 16, 16), torch.randn(2, 3, 16, 16)
    for _ in range(4):
        optimizer.zero_grad()
        logits = denoiser(noisy, torch.tensor([10, 900]), denoiser.encode(image))
        (logits - noisy).square().mean().backward()
        optimizer.step()
    without = [name for name, p in denoiser.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    condition = denoiser.encode(image)
    with torch.no_grad():
        first = denoiser(noisy, torch.tensor([10, 10]), condition)
        assert (first - denoiser(noisy, torch.tensor([900, 900]), condition)).abs().max() > 1e-3
        assert (first - denoiser(-noisy, torch.tensor([10, 10]), condition)).abs().max() > 1e-3


def test_samples_share_the_image():
    denoiser = denoiser_of(small_unet())
    image = torch.randn(2, 1, 16, 16)
    repeated = denoiser.encode(image).repeat_interleave(3).image
    torch.testing.assert_close(repeated, image.repeat_interleave(3, 0))


def test_other_weights_and_other_networks_are_refused():
    denoiser = NoisyUNet(small_unet(4), 1, 3)
    with pytest.raises(ValueError, match="are not of the denoiser's nnU-Net: decoder.*has shape"):
        denoiser.start_from(small_unet(classes=2).state_dict())
    with pytest.raises(NotImplementedError, match="not Conv2d"):
        NoisyUNet(nn.Conv2d(4, 3, 1), 1, 3)


@pytest.mark.parametrize(("residual", "dimension"), CASES)
def test_features_are_those_that_nnunet_segments_with(residual, dimension):
    nnunet = small_unet(residual=residual, dimension=dimension).eval()
    image = torch.randn(2, 1, *[16] * dimension)
    logits, features = unet.logits_and_features(nnunet, image)
    torch.testing.assert_close(logits, nnunet(image))
    assert tuple(each.shape[1] for each in features) == unet.feature_channels(WIDTHS)
    assert [each.shape[2] for each in features] == [16, 8, 4]
    # the second half of the first stage's features is the decoder's: the last layer gives the logits
    torch.testing.assert_close(nnunet.decoder.seg_layers[-1](features[0][:, WIDTHS[0] :]), logits)
    torch.testing.assert_close(features[-1], nnunet.encoder(image)[-1])


def test_a_network_that_was_trained_before_keeps_its_weights_but_for_the_last_layers():
    """As nnU-Net's -pretrained_weights leaves them: without the layers that depend on the labels."""
    pretrained, nnunet = denoiser_of(small_unet()), small_unet()
    pretrained.scale_and_shift[0].bias.data += 1
    before = {key: value.clone() for key, value in pretrained.network.state_dict().items()}
    assert not pretrained.start_from(nnunet.state_dict())
    for key, value in pretrained.network.state_dict().items():
        assert torch.equal(value, nnunet.state_dict()[key] if ".seg_layers." in key else before[key]), key


@pytest.mark.parametrize(("residual", "dimension"), CASES)
def test_outputs_of_deep_supervision_are_those_of_nnunet_but_for_the_coarsest(residual, dimension):
    nnunet = small_unet(residual=residual, dimension=dimension, deep_supervision=True).eval()
    denoiser = NoisyUNet(small_unet(4, 3, residual, dimension), 1, 3, deep_supervision=True).eval()
    denoiser.start_from(nnunet.state_dict())
    image, noisy = torch.randn(2, 1, *[16] * dimension), torch.randn(2, 3, *[16] * dimension)
    found, wanted = denoiser.outputs(noisy, torch.zeros(2), denoiser.encode(image)), nnunet(image)
    assert len(found) == len(wanted) - 1  # nnU-Net gives the coarsest the weight 0
    for one, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(one, other)
    sum(each.square().mean() for each in denoiser.outputs(noisy, torch.zeros(2), denoiser.encode(image))).backward()
    assert [name for name, p in denoiser.named_parameters() if p.requires_grad and p.grad is None] == []
