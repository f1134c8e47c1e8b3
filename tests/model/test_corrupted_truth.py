"""Corrupted truths: probabilities, repeatable, and as wrong as the network that they imitate."""

import numpy as np
import pytest
import torch

from nnunet_diffusion.evaluation.uncertainty import auroc
from nnunet_diffusion.model import corrupted_truth, labels
from nnunet_diffusion.model.corrupted_truth import Mistakes, corrupt, measure


def disc(count, size=64, radius=14):
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()
    inside = ((grid - size / 2) ** 2).sum(0) < radius**2
    return labels.labels_to_masks(inside.long().expand(count, 1, size, size), 2)


def shapes(count, seed):
    """Ellipses of two classes, one of them sometimes missing."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(48), indexing="ij")).astype(float)
    found = np.zeros((count, 1, 40, 48), dtype=int)
    for image in found:
        for label in (1, 2):
            if random.random() < 0.8:
                centre, radii = random.uniform(12, 28, 2), random.uniform(3, 11, 2)
                image[0][(((grid - centre[:, None, None]) / radii[:, None, None]) ** 2).sum(0) < 1] = label
    return labels.labels_to_masks(torch.from_numpy(found), 3)


def of(dice, softness=0.4, false_alarms=0.0):
    dice = torch.as_tensor(dice, dtype=torch.float32).reshape(-1)
    return Mistakes(dice, torch.full_like(dice, softness), false_alarms)


def energy_auc(one, other):
    """Probability that a state of one kind has more energy than one of the other kind."""
    energies = torch.cat([((2 * each - 1) ** 2).flatten(1).mean(1) for each in (one, other)])
    return auroc(energies.numpy(), np.arange(len(energies)) < len(one))


@pytest.mark.parametrize("shape", [(3, 1, 17, 33), (2, 1, 6, 16, 9), (1, 1, 1, 4)])
def test_result_is_probabilities_of_the_same_shape(shape):
    masks = labels.labels_to_masks(torch.randint(0, 4, shape), 4)
    wrong = corrupt(masks, torch.Generator().manual_seed(0))
    assert wrong.shape == masks.shape
    assert wrong.dtype == torch.float32
    torch.testing.assert_close(wrong.sum(1), torch.ones_like(wrong[:, 0]))
    assert wrong.min() >= 0


def test_same_generator_state_gives_the_same_mistakes():
    first, second = (corrupt(disc(2), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, corrupt(disc(2), torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("dice", [0.5, 0.8, 0.95])
def test_each_sample_has_the_dice_and_the_softness_asked_for(dice):
    masks = shapes(200, seed=1)
    found = measure([(corrupt(masks, torch.Generator().manual_seed(3), of(dice, softness=0.3)), masks)])
    # small shapes have few voxels to lose, and parts vanish at once
    assert (found.dice - dice).abs().median() < 0.02
    assert (found.softness - 0.3).abs().median() < 0.03


def test_mistakes_of_a_network_are_imitated_so_that_neither_dice_nor_energy_tells_them_apart():
    # a stand-in for a network: the truth blurred and moved at random, by more in some images than in others
    random = torch.Generator().manual_seed(5)
    masks = shapes(600, seed=2)
    moved = torch.stack([
        torch.roll(mask, tuple(int(v) for v in torch.randint(-3, 4, (2,), generator=random)), (1, 2)) for mask in masks
    ])  # fmt: skip
    blurred = torch.nn.functional.avg_pool2d(moved, 5, stride=1, padding=2, count_include_pad=False)
    network = (4 * (blurred + 1e-3).log()).softmax(1)
    mistakes = measure([(network[:300], masks[:300])])
    wrong = corrupt(masks[300:], random, mistakes)
    found, wanted = measure([(wrong, masks[300:])]), measure([(network[300:], masks[300:])])
    at = torch.tensor([0.25, 0.5, 0.75])
    assert (found.dice.quantile(at) - wanted.dice.quantile(at)).abs().max() < 0.05
    assert 0.3 < energy_auc(wrong, network[300:]) < 0.7
    # the truth itself is told apart at once
    assert energy_auc(masks[300:], network[300:]) > 0.95


def test_a_class_that_a_sample_lacks_is_not_invented_everywhere():
    found = corrupt(disc(100), torch.Generator().manual_seed(0), of(0.8)).argmax(1)
    three = torch.cat((disc(100), torch.zeros(100, 1, 64, 64)), 1)
    share = (corrupt(three, torch.Generator().manual_seed(0), of(0.8)).argmax(1) == 2).float().mean((1, 2))
    assert (found > 0).float().mean() > 0.05
    assert share.median() == 0 and share.max() > 0


def test_regions_are_spoiled_one_by_one():
    truth = torch.cat((disc(200)[:, 1:], disc(200, radius=8)[:, 1:]), 1)  # one inside the other
    mistakes = of(0.8)
    found = corrupt(truth, torch.Generator().manual_seed(1), mistakes, regions=True)
    assert found.shape == truth.shape and found.min() >= 0 and found.max() <= 1
    wrong, right = (found > 0.5).flatten(2), (truth > 0).flatten(2)
    overlap = 2 * (wrong & right).sum(2) / (wrong.sum(2) + right.sum(2))
    assert (overlap.median(0).values - 0.8).abs().max() < 0.05
    measured = measure([(found, truth)], regions=True)
    assert len(measured.dice) == 400
    assert measured.dice.median().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_parts_are_invented_in_the_measured_share_of_the_patches_without_foreground(rate):
    empty = labels.labels_to_masks(torch.zeros(400, 1, 32, 32), 3)
    wrong = corrupt(empty, torch.Generator().manual_seed(2), of(0.8, false_alarms=rate))
    assert measure([(wrong, empty)]).false_alarms == pytest.approx(rate, abs=0.1)
    # as soft at their own border as mistakes beside a true one
    found = wrong[(wrong.argmax(1) > 0).flatten(1).any(1)]
    if rate:
        assert measure([(found, labels.hardened(found))]).softness.median().item() == pytest.approx(0.4, abs=0.05)


def test_measure_knows_a_perfect_network_and_one_that_finds_nothing():
    masks = shapes(20, seed=4)
    perfect = measure([(masks, masks)])
    assert perfect.dice.min() == 1 and perfect.softness.max() == 0
    nothing = torch.zeros_like(masks)
    nothing[:, 0] = 1
    assert measure([(nothing, masks)]).dice.max() == 0
    half = disc(1)
    half[0, :, :, 32:] = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    kept, whole = half[:, 1].sum(), disc(1)[:, 1].sum()
    assert measure([(half, disc(1))]).dice.item() == pytest.approx(float(2 * kept / (kept + whole)))


def test_without_any_foreground_or_any_other_patch_the_usual_mistakes_are_taken():
    empty = labels.labels_to_masks(torch.zeros(4, 1, 8, 8), 2)
    assert torch.equal(measure([(empty, empty)]).dice, corrupted_truth.UNMEASURED.dice)
    # and the other way round
    assert measure([(disc(2), disc(2))]).false_alarms == corrupted_truth.UNMEASURED.false_alarms
