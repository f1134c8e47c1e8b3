"""Grad-CAM of networks whose maps are known, on tiles, and against captum."""

import dataclasses

import pytest
import torch
from captum.attr import LayerGradCam
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import nn

from nnunet_diffusion.explain.grad_cam import channel_weights, class_logits, heat_maps, heat_of
from nnunet_diffusion.explain.units import NO_ATTENTION, NO_PRIOR, Unit, ablated, ablations_of, recorded, units_of
from nnunet_diffusion.inference.volume import Tiling, VolumeProcess
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import HIDIFF_DENOISER, DiffusionSettings
from nnunet_diffusion.networks.hidiff import HiDiffRefiner
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

CPU = torch.device("cpu")
SETTINGS = DiffusionSettings((8,), start_step=300, steps=1, starts={"truth": 1.0}, prediction_type="logits")


@dataclasses.dataclass
class Seen:
    image: torch.Tensor

    def repeat_interleave(self, samples):
        return Seen(self.image.repeat_interleave(samples, 0))


class TwoLayers(nn.Module):
    """Features of the image by one layer, logits by a second; both see one voxel each."""

    def __init__(self, first, second, conv=nn.Conv2d):
        super().__init__()
        self.state_channels = len(second)
        self.first = conv(1, len(first), 1, bias=False)
        self.second = conv(len(first), len(second), 1, bias=False)
        shape = (1,) * (2 if conv is nn.Conv2d else 3)
        self.first.weight.data = torch.tensor(first).reshape(-1, 1, *shape)
        self.second.weight.data = torch.tensor(second).reshape(len(second), -1, *shape)

    def encode(self, image, timestep=None, features=None):
        return Seen(self.first(image))

    def forward(self, noisy, timestep, condition):
        return self.second(condition.image)


def process_of(denoiser, image, tiles=None, patch=None, settings=SETTINGS):
    network = DiffusionSegmenter(nn.Identity(), denoiser, settings).eval()
    whole = tuple(image.shape[1:])
    tiles = [(slice(None), *(slice(0, edge) for edge in whole))] if tiles is None else tiles
    patch = patch or whole
    weight = compute_gaussian(patch, dtype=torch.float32, device=CPU)
    start = torch.full((denoiser.state_channels, *whole), 1 / denoiser.state_channels)
    return VolumeProcess(network, image, Tiling(tiles, weight, 2, CPU), start, 1, CPU)


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.Conv3d])
def test_map_of_two_layers_is_known(conv):
    # logit of class 1 minus that of class 0: 3 a_1 - 1 a_2, over half of the voxels; a = (x, 2 x)
    denoiser = TwoLayers([1.0, 2.0], [[0.0, 0.0], [3.0, -1.0]], conv)
    image = torch.rand(1, 6, 4) if conv is nn.Conv2d else torch.rand(1, 6, 4, 2)
    target = torch.zeros(image.shape[1:])
    target[:3] = 1
    unit = Unit("flow", 1, denoiser.first, True)
    found = heat_maps(process_of(denoiser, image), [unit], 1, target, torch.zeros(1, 2, *image.shape[1:]), 299)
    assert torch.allclose(found[unit.key], 0.5 * (3 * image[0] - 2 * image[0]).relu(), atol=1e-6)
    # against the class: its features speak for nothing
    against = heat_maps(process_of(denoiser, image), [unit], 1, -target, torch.zeros(1, 2, *image.shape[1:]), 299)
    assert not against[unit.key].any()


def test_map_of_tiles_is_that_of_the_whole_if_the_network_sees_single_voxels():
    denoiser = TwoLayers([1.0, 2.0, -1.0], [[1.0, 0.0, 2.0], [3.0, -1.0, 0.5]])
    image = torch.rand(1, 12, 8)
    target = (torch.rand(12, 8) > 0.7).float()
    corners = [(a, b) for a in (0, 3, 6) for b in (0, 2)]
    tiles = [(slice(None), slice(a, a + 6), slice(b, b + 6)) for a, b in corners]
    unit = Unit("flow", 1, denoiser.first, True)
    noisy = torch.zeros(1, 2, 12, 8)
    whole = heat_maps(process_of(denoiser, image), [unit], 1, target, noisy, 299)[unit.key]
    tiled = heat_maps(process_of(denoiser, image, tiles, (6, 6)), [unit], 1, target, noisy, 299)[unit.key]
    assert whole.any() and torch.allclose(tiled / tiled.max(), whole / whole.max(), atol=1e-5)


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.Conv3d])
def test_maps_agree_with_captum(conv):
    torch.manual_seed(0)
    network = nn.Sequential(conv(2, 5, 3, padding=1), nn.Tanh(), conv(5, 3, 3, padding=1))
    image = torch.rand(1, 2, 9, 7) if conv is nn.Conv2d else torch.rand(1, 2, 9, 7, 5)

    def score(image):
        return network(image)[:, 1].flatten(1).sum(1, keepdim=True)

    expected = LayerGradCam(score, network[1]).attribute(image, target=0, relu_attributions=True)[:, 0]
    unit = Unit("flow", 1, network[1], False)
    with recorded([unit], False) as found:
        total = score(image).sum()
    features = found[unit.key][1]
    weights = channel_weights(torch.autograd.grad(total, features)[0])
    assert expected.any() and torch.allclose(heat_of(features, weights), expected, atol=1e-5)


def test_logits_of_a_softmax_are_those_of_its_probabilities():
    prediction = torch.randn(2, 3, 4, 4)
    network = DiffusionSegmenter(nn.Identity(), TwoLayers([1.0], [[1.0]] * 3), SETTINGS)
    found = class_logits(network, prediction, torch.zeros_like(prediction), 299, None)
    assert torch.allclose(found, prediction.softmax(1).logit(), atol=1e-4)
    # so large that probabilities would be 0 and 1 in float32
    assert class_logits(network, 100 * prediction, torch.zeros_like(prediction), 299, None).isfinite().all()


def small_pgdiffseg(**changes):
    torch.manual_seed(0)
    arguments = {
        "presence_classes": 1, "location_classes": 1, "norm": "instance", "sdb_depth": 1, "attention_tokens": 64, **changes
    }  # fmt: skip
    network = PGDiffSeg(1, 2, 2, (8, 8, 16), (1, 2, 2), (3, 3, 3), nn.Conv2d, **arguments).eval()
    for part in network.attention.values():
        for weight in part.eta.values():
            weight.data.fill_(0.5)
    return network


def test_units_of_pgdiffseg_are_its_figures():
    units = units_of(small_pgdiffseg())
    assert [unit.key for unit in units] == [
        ("condition flow", 1, False), ("condition flow", 1, True), ("condition flow", 2, False), ("condition flow", 2, True),
        ("denoising flow", 1, False), ("denoising flow", 1, True), ("denoising flow", 2, False), ("denoising flow", 2, True),
        ("condition flow before downsampling", 1, False), ("condition flow before downsampling", 2, False),
        ("denoising flow before downsampling", 1, False), ("denoising flow before downsampling", 2, False),
        ("decoder", 1, False), ("decoder", 2, False), ("prior branch", 1, False),
    ]  # fmt: skip
    without = units_of(small_pgdiffseg(attention_stages=(2,)))
    assert [unit.key for unit in without if unit.attended] == [("condition flow", 2, True), ("denoising flow", 2, True)]
    with pytest.raises(NotImplementedError, match="explain knows no units of Linear"):
        units_of(nn.Linear(1, 1))


def test_both_flows_have_features_of_their_own():
    network = small_pgdiffseg()
    units = units_of(network)
    process = process_of(network, torch.rand(1, 16, 16), settings=dataclasses.replace(SETTINGS, prediction_type="x0"))
    target = torch.zeros(16, 16)
    target[4:8, 4:8] = 1
    found = heat_maps(process, units, 1, target, torch.randn(1, 2, 16, 16), 299)
    assert {key for key, heat in found.items() if heat.any()} >= {
        ("condition flow", 1, True),
        ("denoising flow", 1, True),
    }
    assert all(heat.shape == (16, 16) and (heat >= 0).all() for heat in found.values())
    pair = [found[flow, 1, True] for flow in ("condition flow", "denoising flow")]
    assert not torch.allclose(pair[0] / pair[0].max(), pair[1] / pair[1].max(), atol=0.05)


def test_maps_change_with_the_weights():
    """The sanity check of Adebayo et al. 2018: a map that ignored the weights would explain nothing."""
    process_settings = dataclasses.replace(SETTINGS, prediction_type="x0")
    image, noisy = torch.rand(1, 16, 16), torch.randn(1, 2, 16, 16)
    target = torch.zeros(16, 16)
    target[4:8, 4:8] = 1
    found = []
    for seed in (0, 1):
        network = small_pgdiffseg()
        torch.manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        maps = heat_maps(
            process_of(network, image, settings=process_settings), units_of(network), 1, target, noisy, 299
        )
        found.append(torch.cat([heat.flatten() / heat.max().clamp_min(1e-9) for heat in maps.values()]))
    assert abs(torch.corrcoef(torch.stack(found))[0, 1]) < 0.7


def test_parts_are_taken_away_and_come_back():
    network = small_pgdiffseg()
    assert ablations_of(network) == [NO_PRIOR, NO_ATTENTION]
    image, noisy, times = torch.rand(1, 1, 16, 16), torch.randn(1, 2, 16, 16), torch.tensor([5])
    with torch.no_grad():
        whole = network(noisy, times, network.encode(image, times))
        with ablated(network, NO_PRIOR):
            assert not network.encode(image, times).prior.any()
            without_prior = network(noisy, times, network.encode(image, times))
        with ablated(network, NO_ATTENTION):
            without_attention = network(noisy, times, network.encode(image, times))
        for part in network.attention.values():
            for weight in part.eta.values():
                weight.data.zero_()
        assert torch.equal(network(noisy, times, network.encode(image, times)), without_attention)
        for part in network.attention.values():
            for weight in part.eta.values():
                weight.data.fill_(0.5)
        assert torch.equal(network(noisy, times, network.encode(image, times)), whole)
    assert not torch.allclose(whole, without_prior) and not torch.allclose(whole, without_attention)


def test_units_of_hidiff_have_maps():
    torch.manual_seed(0)
    refiner = HiDiffRefiner(1, 1, (8, 8, 16), (1, 2, 2), (3, 3, 3), nn.Conv2d, guide_channels=(4, 4, 4)).eval()
    nn.init.normal_(refiner.output[-1].weight)
    settings = DiffusionSettings((8, 8, 16), **HIDIFF_DENOISER, denoiser="hidiff", starts={"truth": 1.0}, regions=True)
    process = process_of(refiner, torch.rand(1, 16, 16), settings=settings)
    process.segmenter.features = lambda image: tuple(torch.ones(len(image), 4, 16 // k, 16 // k) for k in (1, 2, 4))
    found = heat_maps(process, units_of(refiner), 0, torch.ones(16, 16), torch.zeros(1, 1, 16, 16), 9)
    assert {flow for flow, _, _ in found} == {"encoder", "decoder"} and any(heat.any() for heat in found.values())
