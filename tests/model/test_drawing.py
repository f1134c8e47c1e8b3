"""Draws have the probabilities that they are drawn from, and chains decide at every step but the last."""

import pytest
import torch

from nnunet_diffusion.diffusion.bernoulli import BernoulliProcess
from nnunet_diffusion.diffusion.gaussian import GaussianProcess
from nnunet_diffusion.diffusion.schedules import bernoulli_schedule, noise_schedule
from nnunet_diffusion.model.drawing import DRAWS, LEVEL, NOTHING, VOXELS, deciding, draw, level_noise

SHARES = torch.tensor([0.5, 0.3, 0.2])


def generators(number):
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


@pytest.mark.parametrize("kind", [VOXELS, LEVEL])
def test_frequencies_are_the_probabilities(kind):
    probabilities = SHARES.view(1, 3, 1, 1).expand(4000, 3, 1, 1)
    masks = draw(probabilities, kind, False, torch.Generator().manual_seed(0))
    assert torch.equal(masks.sum(1), torch.ones(4000, 1, 1))
    # standard error of a share: 0.008
    assert masks.mean((0, 2, 3)) == pytest.approx(SHARES, abs=0.03)


@pytest.mark.parametrize("kind", [VOXELS, LEVEL])
def test_frequencies_of_regions_are_their_probabilities(kind):
    probabilities = torch.tensor([0.9, 0.4]).view(1, 2, 1, 1).expand(4000, 2, 1, 1)
    masks = draw(probabilities, kind, True, torch.Generator().manual_seed(0))
    assert masks.mean((0, 2, 3)) == pytest.approx(torch.tensor([0.9, 0.4]), abs=0.03)
    # the inner region lies in the outer one
    assert (masks[:, 1] <= masks[:, 0]).all()


def test_a_level_set_contains_every_voxel_that_is_more_probable():
    foreground = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    probabilities = torch.cat((1 - foreground, foreground), 1)
    for generator in generators(20):
        inside = draw(probabilities, LEVEL, False, generator)[:, 1:].bool()
        if inside.any() and not inside.all():
            assert foreground[inside].min() > foreground[~inside].max()
    single = draw(probabilities, VOXELS, False, generators(1)[0])[:, 1:].bool()
    assert foreground[single].min() < foreground[~single].max()


@pytest.mark.parametrize("regions", [False, True])
def test_level_noise_is_one_number_for_all_voxels_of_an_image(regions):
    noise = level_noise(regions)((2000, 3, 4, 5), torch.Generator().manual_seed(0))
    assert noise.shape == (2000, 3, 4, 5) and noise.is_contiguous()
    assert noise.min() >= 0 and noise.max() < 1
    assert torch.equal(noise, noise[:, :, :1, :1].expand_as(noise))
    # uniform in each channel: standard error of the mean 0.006
    assert noise[:, :, 0, 0].mean(0) == pytest.approx(torch.full((3,), 0.5), abs=0.03)
    assert torch.equal(noise[:, 1], noise[:, 2])
    assert torch.equal(noise[:, 0], noise[:, 1]) == regions
    if not regions:
        assert torch.allclose(noise[:, 0], 1 - noise[:, 1], atol=1e-6)


def test_level_draws_of_a_bernoulli_process_have_its_probabilities_and_one_class_of_two():
    foreground = torch.tensor([0.1, 0.5, 0.8]).view(1, 1, 3, 1)
    prior = torch.cat((1 - foreground, foreground), 1).expand(4000, 2, 3, 1)
    process = BernoulliProcess(bernoulli_schedule("linear", 10), prior, level_noise(regions=False))
    generator = torch.Generator().manual_seed(0)
    states = process.start(prior, 10, process.draw_noise(prior.shape, generator))
    assert torch.equal(states.sum(1), torch.ones(4000, 3, 1))
    assert states[:, 1, :, 0].mean(0) == pytest.approx(foreground.flatten(), abs=0.03)
    # a more probable voxel is never out where a less probable one is in
    assert (states[:, 1].diff(dim=1) >= 0).all()
    # a step to the middle keeps the probabilities, too
    stepped = process.step(prior, states, 9, 4, generator=generator)
    assert stepped[:, 1, :, 0].mean(0) == pytest.approx(foreground.flatten(), abs=0.03)


def test_each_sample_has_a_generator_of_its_own():
    probabilities = torch.full((2, 2, 30, 30), 0.5)
    together = draw(probabilities, VOXELS, False, generators(2))
    alone = draw(probabilities[1:], VOXELS, False, generators(2)[1:])
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


def test_chains_decide_at_every_step_but_the_last():
    process = GaussianProcess(noise_schedule("linear", 1000))
    soft = process.to_state(torch.full((1, 2, 8, 8), 0.5))
    for kind in DRAWS:
        estimate = deciding(lambda noisy, timestep: soft, kind, 9, process, False, torch.Generator().manual_seed(0))
        assert torch.equal(estimate(soft, 9), soft)
        first = process.to_probabilities(estimate(soft, 99))
        decided = first.unique().tolist() == [0, 1] and torch.equal(first.sum(1), torch.ones(1, 8, 8))
        assert decided == (kind != NOTHING)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind is 'all'"):
        draw(torch.ones(1, 1, 1), "all", False)
