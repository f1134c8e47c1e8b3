"""Denoisers that stand on nnU-Net: its features as the condition, or its own network."""

import dataclasses

import pytest
import torch
from small_segmenters import cross_entropy
from small_unets import WIDTHS, small_unet
from torch import nn

from nnunet_diffusion.model.build import build_denoiser, build_objective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings

CONFIGURATION = {
    "architecture": {
        "network_class_name": "PlainConvUNet",
        "arch_kwargs": {
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "strides": [1, 2, 2],
            "kernel_sizes": [3, 3, 3],
            "features_per_stage": list(WIDTHS),
        },
    }
}
FEATURES = DiffusionSettings((8, 8, 16), condition="presegmentor", norm="instance", sdb_depth=2)
UNET = DiffusionSettings((8, 8, 16), denoiser="nnunet", prediction_type="logits")


def segmenter(settings):
    torch.manual_seed(0)
    denoiser = build_denoiser(settings, CONFIGURATION, 1, 3, lambda channels: small_unet(channels))
    return DiffusionSegmenter(small_unet(), denoiser, settings).eval()


@pytest.mark.parametrize("settings", [FEATURES, UNET], ids=["features", "nnunet"])
def test_training_and_prediction(settings):
    """Every trained weight gets a gradient, the frozen nnU-Net none; prediction is reproducible and valid."""
    network = segmenter(settings).train()
    image, target = torch.randn(2, 1, 16, 16), torch.randint(0, 3, (2, 1, 16, 16))
    objective = build_objective(network)
    for _ in range(2):  # the scale and shift of the timestep begin at 0, so the embedding has no gradient at first
        ((name, terms),) = objective.turns(image, target, cross_entropy, torch.Generator().manual_seed(0))
        network.zero_grad()
        sum(terms.values()).backward()
        with torch.no_grad():
            for parameter in network.denoiser.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert name == "denoiser"
    assert set(terms) == set(objective.terms)
    lost = [each for each, p in network.denoiser.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []
    assert all(parameter.grad is None for parameter in network.presegmentor.parameters())
    network.eval()
    with network.overridden(start_step=100, steps=3, samples=2, presegmentation_weight=0.0):
        found = network.sample(image)
        assert torch.equal(found, network.sample(image))
    torch.testing.assert_close(found.sum(1), torch.ones(2, 16, 16))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_one_evaluation_gives_the_start_and_the_condition_of_all_steps(weight):
    network, calls = segmenter(FEATURES), []
    network.presegmentor.encoder.stages[0].register_forward_hook(lambda *_: calls.append(1))
    image = torch.randn(1, 1, 16, 16)
    with network.overridden(steps=4, samples=3, presegmentation_weight=weight):
        found = network.sample(image)
        assert len(calls) == 1
        # the same as with features computed by themselves
        start = network.presegment(image).probabilities
        alone = network.sample(image, start)
    torch.testing.assert_close(found, torch.lerp(alone, start, weight))


def test_the_image_reaches_the_output_through_the_features():
    """The prior branch sees the image too, so it is kept as it is."""
    network = segmenter(FEATURES)
    image, noisy = torch.randn(1, 1, 16, 16), torch.randn(1, 3, 16, 16)
    times = torch.tensor([100])
    features = network.features(image)
    seen = network.denoiser(noisy, times, network.denoiser.encode(image, times, features))
    blind = network.denoiser(
        noisy, times, network.denoiser.encode(image, times, [torch.zeros_like(f) for f in features])
    )
    assert (seen - blind).abs().max() > 1e-3
    with pytest.raises(ValueError, match="features are missing"):
        network.denoiser.encode(image, times)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="condition_on_presegmentation"):
        dataclasses.replace(FEATURES, condition_on_presegmentation=True, starts={"corrupted": 1.0})
    with pytest.raises(NotImplementedError, match="attention 'cross' needs a condition flow"):
        dataclasses.replace(FEATURES, attention="cross")
    other = {
        "network_class_name": "PlainConvUNet",
        "_kw_requires_import": [],
        "arch_kwargs": {**CONFIGURATION["architecture"]["arch_kwargs"], "strides": [1, 2, 4]},
    }
    with pytest.raises(NotImplementedError, match="supports a pre-segmentor with the strides of these plans"):
        segmenter(dataclasses.replace(FEATURES, presegmentor_architecture=other))


def test_defaults_of_nnunets_network():
    configuration = {**CONFIGURATION, "batch_size": 2, "diffusion": {"network": {"denoiser": "nnunet"}}}
    settings = DiffusionSettings.from_plans(configuration)
    assert (settings.denoiser, settings.prediction_type, settings.signal_scale) == ("nnunet", "logits", 0.1)
    plain = DiffusionSettings.from_plans({**configuration, "diffusion": {}})
    assert (plain.denoiser, plain.prediction_type, plain.signal_scale) == ("pgdiffseg", "x0", 1.0)
    assert DiffusionSettings.from_plans({**configuration, "diffusion": settings.to_plans()}) == settings


def test_nnunet_is_not_the_denoiser_of_other_architectures():
    with pytest.raises(
        NotImplementedError, match="supports nnU-Net's PlainConvUNet and ResidualEncoderUNet, not Conv2d"
    ):
        build_denoiser(UNET, CONFIGURATION, 1, 3, lambda channels: nn.Conv2d(channels, 3, 1))
