"""What meets on a GPU must be on the GPU: checked on any machine, by tensors that have a device and no values."""

import dataclasses

import pytest
import torch
from small_hidiff import SETTINGS as HIDIFF
from small_hidiff import hidiff, networks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_diffusion.inference.volume import Tiling, VolumeProcess
from nnunet_diffusion.model.build import build_objective
from nnunet_diffusion.model.objective import PGDiffSegObjective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

SETTINGS = DiffusionSettings(features_per_stage=(8, 8, 16), start_step=300, steps=3, samples=2, eta=0.5)
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which tensors are fake, but for tables made before."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(mode, **settings):
    network = DiffusionSegmenter(nn.Identity(), nn.Identity(), dataclasses.replace(SETTINGS, **settings))
    with mode, GPU:
        network.presegmentor = nn.Conv2d(1, 3, 3, padding=1)
        network.denoiser = PGDiffSeg(
            1, 3, 3, (8, 8, 16), [1, 2, 2], [3, 3, 3], nn.Conv2d, presence_classes=3 - (not network.settings.regions),
            location_classes=3 - (not network.settings.regions), norm="instance",
        )  # fmt: skip
    return network


def test_fake_tensors_of_two_devices_do_not_mix(gpu):
    """Else nothing below could fail."""
    with gpu, pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        torch.ones(2, device=GPU) + torch.ones(2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])  # those of diffusers read values
def test_reverse_process(gpu, sampler):
    network = on_gpu(gpu, sampler=sampler).eval()
    with gpu:
        assert network.sample(torch.zeros(2, 1, 16, 16, device=GPU)).device == GPU


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "x0", "starts": {"corrupted": 0.5, "presegmentation": 0.5}},
        {"prediction_type": "logits", "regions": True},
        {"prediction_type": "epsilon", "starts": {"truth": 1.0}},
        {"prediction_type": "v", "starts": {"truth": 1.0}},
    ],
    ids=lambda settings: settings["prediction_type"],
)
def test_training_losses(gpu, settings):
    network = on_gpu(gpu, **settings).train()
    network.ignore_label = 3
    heads = 4 if network.settings.regions else 1
    with gpu:
        image, target = (torch.zeros(2, channels, 16, 16, device=GPU) for channels in (1, heads))
        turns = PGDiffSegObjective(network).turns(image, target, lambda logits, _: logits.mean(), torch.Generator())
        ((_, terms),) = turns
    assert {term.device for term in terms.values()} == {GPU}


@pytest.mark.parametrize("state_device", [GPU, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("tile_wise", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_volume_whose_state_is_on_either_device(gpu, sampler, tile_wise, state_device):
    network = on_gpu(gpu, sampler=sampler).eval()
    tiles = [(slice(None), slice(start, start + 16), slice(0, 16)) for start in (0, 8)]
    with gpu:
        tiling = Tiling(tiles, torch.ones(16, 16, device=GPU), 4, GPU)
        process = VolumeProcess(network, torch.zeros(1, 24, 16), tiling, torch.zeros(3, 24, 16), 1, state_device)
        found = process.run_tile_wise([0, 1]) if tile_wise else process.run([0, 1])
    assert found.device == state_device


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_hidiffs_reverse_process_and_both_turns(gpu, sampler):
    network = hidiff(dataclasses.replace(HIDIFF, sampler=sampler, steps=3, samples=2, eta=0.5))
    with gpu, GPU:
        network.presegmentor, network.denoiser = networks()
    network.ignore_label = 3
    with gpu:
        image, target = (torch.zeros(2, 1, 16, 16, device=GPU) for _ in range(2))
        assert network.eval().sample(image).device == GPU
        turns = build_objective(network.train()).turns(
            image, target, lambda logits, _: logits.mean(), torch.Generator()
        )
        assert {term.device for _, terms in turns for term in terms.values()} == {GPU}
