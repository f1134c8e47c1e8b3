"""Decisions against brute force: all masks of a grid of eight voxels, all thresholds of a few probabilities."""

import itertools

import pytest
import torch

from nnunet_diffusion.inference import fusion
from nnunet_diffusion.inference.decisions import largest_expected_dice, rankseg
from nnunet_diffusion.inference.ensemble import Members
from nnunet_diffusion.model import labels

GRID = (2, 4)
ALL_MASKS = torch.tensor(list(itertools.product((0, 1), repeat=8)), dtype=torch.uint8).view(-1, *GRID)


def expected_dice(masks, samples):
    """Mean Dice of each mask (M, *volume) against samples (N, *volume), both empty: 1."""
    inside, true = masks.flatten(1).double(), samples.flatten(1).double()
    total = inside.sum(1)[:, None] + true.sum(1)
    return torch.where(total > 0, 2 * inside @ true.T / total.clamp(min=1), 1.0).mean(1)


def best_of_all(samples):
    return float(expected_dice(ALL_MASKS, samples).max())


def decide(samples):
    return largest_expected_dice(samples, samples.float().mean(0))


def random_samples(kind, number=200):
    """Sets of one to five samples: of independent voxels, or a noisy field cut at one half."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        members = int(torch.randint(1, 6, (1,), generator=generator))
        noise, field = torch.rand(members, *GRID, generator=generator), torch.rand(GRID, generator=generator)
        share = torch.rand(1, generator=generator)
        yield ((noise < share) if kind == "independent" else (field + noise - 0.5 > 0.5)).to(torch.uint8)


@pytest.mark.parametrize("kind", ["independent", "field"])
def test_no_other_mask_is_much_better(kind):
    """The candidates are not all masks: the result is the best of all in nine of ten cases, and never below 0.9 of it."""
    shares, gains = [], []
    for samples in random_samples(kind):
        found, majority = decide(samples), samples.float().mean(0) > 0.5
        flipped = found.flatten() ^ torch.eye(8, dtype=torch.bool)
        value, other, *changed = expected_dice(
            torch.cat((found[None], majority[None], flipped.view(-1, *GRID))), samples
        ).tolist()
        assert value >= other - 1e-12
        shares.append(value / best_of_all(samples))
        gains.append(max(changed) - value)
    assert min(shares) > 0.9
    assert sum(share > 1 - 1e-12 for share in shares) > 0.9 * len(shares)
    assert max(gains) < 0.04
    assert sum(gain < 1e-12 for gain in gains) > 0.9 * len(gains)


@pytest.mark.parametrize("sizes", [(1, 3, 8), (2, 2, 7, 8), (0, 0, 1, 5), (0, 4), (4, 4, 4, 5, 6)])
def test_of_nested_samples_the_result_is_the_best_of_all_masks(sizes):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).view(GRID)
    samples = torch.stack([(order < size).to(torch.uint8) for size in sizes])
    assert float(expected_dice(decide(samples)[None], samples)) == pytest.approx(best_of_all(samples))


def test_a_lesion_is_found_where_no_voxel_has_a_majority():
    """Four samples of two neighbours on a ring of four voxels: each voxel is in half of them, and the vote is empty."""
    samples = torch.zeros(4, *GRID, dtype=torch.uint8)
    for member in range(4):
        samples[member, 0, [member, (member + 1) % 4]] = 1
    assert not (samples.float().mean(0) > 0.5).any()
    ring = torch.zeros(GRID, dtype=torch.bool)
    ring[0] = True
    # Dice of the ring against each sample: 2 * 2 / (4 + 2)
    assert torch.equal(decide(samples), ring)
    assert best_of_all(samples) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("empty", "full", "found"), [(3, 2, 0), (2, 3, 4), (2, 2, 0), (3, 0, 0)])
def test_the_empty_mask_is_chosen_if_at_least_half_of_the_samples_are_empty(empty, full, found):
    lesion = torch.zeros(GRID, dtype=torch.uint8)
    lesion[0] = 1
    samples = torch.stack([torch.zeros_like(lesion)] * empty + [lesion] * full)
    assert decide(samples).sum() == found


def test_one_sample_is_its_own_decision():
    for mask in ALL_MASKS:
        assert torch.equal(largest_expected_dice(mask[None], torch.full(GRID, 0.3)), mask.bool())


@pytest.mark.parametrize(("mean", "found"), [([0.4, 0.1, 0.6], [0, 2]), ([0.1, 0.4, 0.6], [0, 1, 2])])
def test_the_mean_orders_voxels_of_equally_many_samples(mean, found):
    """Values: voxel 2 alone 5/9, with voxel 0 11/18, with voxel 1 5/9, all three 3/5."""
    samples = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.uint8)
    assert largest_expected_dice(samples, torch.tensor(mean)).nonzero()[:, 0].tolist() == found


def rankseg_value(probability, tau):
    ordered = probability.flatten().double().sort(descending=True).values
    return float(2 * ordered[:tau].sum() / (ordered.sum() + tau + 1))


@pytest.mark.parametrize("power", [0.3, 1, 4, 30])
@pytest.mark.parametrize("seed", range(5))
def test_rankseg_takes_the_best_number_of_the_most_probable_voxels(power, seed):
    probability = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) ** power
    found = rankseg(probability)
    best = max(range(25), key=lambda tau: rankseg_value(probability, tau))
    assert rankseg_value(probability, int(found.sum())) == pytest.approx(rankseg_value(probability, best), rel=1e-12)
    assert not found.any() or found.all() or probability[found].min() >= probability[~found].max()


def test_rankseg_of_certain_voxels_is_these_voxels_and_is_empty_only_without_any_probability():
    certain = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1e-6]])
    assert rankseg(certain).tolist() == [[True, False, True, False, False]]
    assert not rankseg(torch.zeros(3, 4)).any()
    assert rankseg(torch.full((3, 4), 1e-6)).all()


def test_rankseg_accepts_voxels_below_one_half():
    """A lesion of one certain voxel and three of 0.4: argmax has the first, whose value is 2 / (2.2 + 2) = 0.476."""
    probability = torch.tensor([[1.0, 0.4, 0.4, 0.4, 0.0]])
    # all four: 2 * 2.2 / (2.2 + 5) = 0.611
    assert rankseg(probability).tolist() == [[True, True, True, True, False]]


def test_voxels_that_two_classes_claim_go_to_the_more_probable_one():
    """Each sample gives two neighbours on a ring of four voxels to class 1 and the others to class 2; both claim the ring."""
    votes = torch.full((4, 5), 2, dtype=torch.uint8)
    votes[:, 4] = 0
    for member in range(4):
        votes[member, [member, (member + 1) % 4]] = 1
    mean = torch.tensor([[0.6, 0.6, 0.1, 0.3, 0.9], [0.3, 0.1, 0.5, 0.3, 0.1], [0.1, 0.3, 0.4, 0.4, 0.0]])
    for head in (1, 2):
        assert largest_expected_dice((votes == head).to(torch.uint8), mean[head]).tolist() == [True] * 4 + [False]
    fused = fusion.fuse(votes, mean, "dice", False)
    assert fused.argmax(0).tolist() == [1, 2, 1, 2, 0]
    assert torch.equal(fused.sum(0), torch.ones(5))


@pytest.mark.parametrize("name", ["dice", "rankseg"])
def test_regions_are_decided_each_alone_and_may_overlap(name):
    votes = torch.tensor([[[1, 1, 1, 0], [0, 1, 0, 0]], [[1, 1, 0, 0], [0, 1, 1, 0]]], dtype=torch.uint8)
    mean = torch.tensor([[0.9, 0.95, 0.5, 0.0], [0.0, 0.9, 0.45, 0.0]])
    fused = fusion.fuse(votes, mean, name, True)
    for head in (0, 1):
        alone = largest_expected_dice(votes[:, head], mean[head]) if name == "dice" else rankseg(mean[head])
        assert torch.equal(fused[head] > 0.5, alone)
    assert fused[:, 1].tolist() == [1, 1]
    assert torch.equal(labels.hardened(fused[None], True)[0], fused)


@pytest.mark.parametrize("regions", [False, True])
def test_fusion_of_one_sample_by_dice_is_that_sample(regions):
    logits = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    probabilities = labels.activate(logits[None], regions)[0]
    members = Members(regions, fusion.needs_votes("dice"), keep_samples=False)
    members.add(probabilities, 1.0, "sample")
    fused = fusion.fuse(torch.stack(members.votes), members.mean(), "dice", regions)
    assert torch.equal(labels.hardened(fused[None], regions), labels.hardened(probabilities[None], regions))


def test_rankseg_keeps_no_votes_and_leaves_out_a_class_that_is_nowhere_likely():
    members = Members(False, fusion.needs_votes("rankseg"), keep_samples=False)
    members.add(torch.tensor([[0.1, 0.55, 0.9, 0.99], [0.9, 0.4, 0.05, 0.005], [0.0, 0.05, 0.05, 0.005]]), 1.0)
    assert not members.votes
    fused = fusion.fuse(None, members.mean(), "rankseg", False)
    assert fused.argmax(0).tolist() == [1, 1, 0, 0]
    assert rankseg(members.mean()[2]).any() and not fused[2].any()
    assert [name for name in fusion.FUSIONS if fusion.needs_votes(name)] == ["majority", "staple", "dice"]


@pytest.mark.parametrize("name", ["dice", "rankseg"])
def test_fused_probabilities_survive_the_way_through_logits(name):
    logits = 2 * torch.randn(5, 3, 6, 7, generator=torch.Generator().manual_seed(3))
    probabilities = logits.softmax(1)
    fused = fusion.fuse(logits.argmax(1).to(torch.uint8), probabilities.mean(0), name, False)
    returned = labels.activate(labels.probabilities_to_logits(fused[None]))[0]
    assert torch.equal(returned.argmax(0), fused.argmax(0))
    assert torch.equal(fused.amax(0), torch.ones(6, 7))
