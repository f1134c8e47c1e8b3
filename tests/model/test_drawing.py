"""Draws have the probabilities that they are drawn from, and chains decide at every step but the last."""

import pytest
import torch

from nnunet_diffusion.diffusion.gaussian import GaussianProcess
from nnunet_diffusion.diffusion.schedules import noise_schedule
from nnunet_diffusion.model.drawing import DRAWS, LEVEL, NOTHING, VOXELS, deciding, draw

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
