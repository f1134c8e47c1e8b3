"""HiDiff's prediction of patches: its start, its steps, and that they come from the seed alone."""

import dataclasses

import pytest
import torch
from small_hidiff import SETTINGS, hidiff
from torch import nn

from nnunet_diffusion.model import labels


class KnownRefiner(nn.Module):
    """Knows the clean state: flips what differs from it, and remembers what it saw."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.state_channels, self.image_channels, self.seen = clean, clean.shape[1], 1, []

    def encode(self, image, timestep, features):
        self.encoded, self.features = image, features
        return self

    def repeat_interleave(self, samples):
        self.prior = self.encoded[:, 1:].repeat_interleave(samples, 0)
        return self

    def forward(self, noisy, timestep, condition):
        self.seen.append((int(timestep[0]), noisy))
        clean = self.clean.repeat_interleave(len(noisy) // len(self.clean), 0)
        return 80 * (2 * (noisy - clean).abs() - 1)


def known(**settings):
    network = hidiff(dataclasses.replace(SETTINGS, presegmentation_weight=0.0, **settings)).eval()
    clean = labels.labels_to_masks(torch.randint(0, 3, (2, 1, 16, 16)), 3)
    network.denoiser = KnownRefiner(clean)
    return network, torch.randn(2, 1, 16, 16), clean


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_a_perfect_refiner_finds_the_truth_from_a_draw_of_p(steps, sampler):
    network, image, clean = known(steps=steps, samples=3, sampler=sampler)
    found = network.sample(image)
    assert torch.allclose(found, clean, atol=1e-4)
    assert network.evaluations == 3 * steps and len(network.denoiser.seen) == steps
    timestep, start = network.denoiser.seen[0]
    assert timestep == 9 and set(start.unique().tolist()) == {0, 1}
    # it sees the image, p beside it, and one tensor of the encoder for each stage
    probabilities = network.presegment(image).probabilities
    assert torch.allclose(network.denoiser.encoded, torch.cat((image, probabilities), 1))
    assert [each.shape[1] for each in network.denoiser.features] == [4, 6, 8]


@pytest.mark.parametrize("steps", [1, 3])
def test_level_draws_start_from_level_sets_of_p_and_find_the_truth(steps):
    network, image, clean = known(steps=steps, samples=4, draw="level")
    assert torch.allclose(network.sample(image), clean, atol=1e-4)
    probabilities = network.presegment(image).probabilities.repeat_interleave(4, 0)
    _, start = network.denoiser.seen[0]
    sizes = set()
    for state, probability in zip(start[:, 1], probabilities[:, 1], strict=True):
        inside = state.bool()
        sizes.add(int(inside.sum()))
        if inside.any() and not inside.all():
            assert probability[inside].min() >= probability[~inside].max()
    assert len(sizes) > 1  # each sample has a level of its own
    plain, _, _ = known(steps=steps, samples=4)
    plain.presegmentor = network.presegmentor
    plain.sample(image)
    assert not torch.equal(plain.denoiser.seen[0][1], start)


def test_the_start_has_the_segmentors_probabilities_as_mean():
    network, image, _ = known(steps=1, samples=500)
    network.sample(image[:1].expand(2, -1, -1, -1))
    start = torch.cat([noisy for _, noisy in network.denoiser.seen])
    wanted = network.presegment(image[:1]).probabilities[0]
    assert (start.mean(0) - wanted).abs().max() < 0.1
    assert (start.mean(0) - wanted).abs().mean() < 0.02


def test_the_same_image_and_seed_give_the_same_bits_and_another_seed_gives_others():
    network = hidiff(dataclasses.replace(SETTINGS, steps=5, samples=2, presegmentation_weight=0.0)).eval()
    image = torch.randn(2, 1, 16, 16)
    first = network(image)
    assert torch.equal(first, network(image)) and torch.isfinite(first).all()
    with network.overridden(seed=7):
        assert not torch.equal(first, network(image))


def test_a_weight_of_one_is_the_segmentor_alone():
    network = hidiff(dataclasses.replace(SETTINGS, presegmentation_weight=1.0)).eval()
    image = torch.randn(2, 1, 16, 16)
    assert torch.equal(network.sample(image), network.presegment(image).probabilities)
    assert network.evaluations == 0


def test_half_precision_gives_finite_probabilities_near_those_of_float32():
    network = hidiff(dataclasses.replace(SETTINGS, steps=10, presegmentation_weight=0.0)).eval()
    nn.init.normal_(network.denoiser.output[-1].weight, std=0.1)  # 0 before training
    image = torch.randn(2, 1, 16, 16)
    exact = network.sample(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network.sample(image)
    assert torch.isfinite(half).all() and half.dtype == torch.float32
    assert (half - exact).abs().mean() < 0.1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_segmentor_is_evaluated_once_per_patch(weight):
    network, calls = hidiff(dataclasses.replace(SETTINGS, steps=5, presegmentation_weight=weight)).eval(), []
    network.presegmentor.encoder.stages[0].register_forward_hook(lambda *_: calls.append(1))
    network.sample(torch.randn(2, 1, 16, 16))
    assert len(calls) == 1


def test_training_changes_the_mode_of_both_networks():
    network = hidiff()
    assert network.train().presegmentor.training and not network.eval().presegmentor.training
    assert any(parameter.requires_grad for parameter in network.presegmentor.parameters())


@pytest.mark.parametrize("steps", [1, 10])
def test_an_untrained_refiner_says_what_the_segmentor_says(steps):
    network = hidiff(dataclasses.replace(SETTINGS, steps=steps, samples=400, presegmentation_weight=0.0)).eval()
    image = torch.randn(1, 1, 8, 8)
    wanted = network.presegment(image).probabilities
    found = network.sample(image)
    # one step gives p itself, whatever was drawn; a chain of draws has it as mean, where the voxels' channels agree
    if steps == 1:
        assert torch.allclose(found, wanted, atol=1e-5)
    assert (found - wanted).abs().mean() < 0.06
