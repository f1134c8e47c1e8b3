"""Fusion of a few small masks, by hand."""

from types import SimpleNamespace

import pytest
import torch

from nnunet_diffusion.inference import fusion
from nnunet_diffusion.inference.ensemble import Members
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model import labels


def vote(*label_maps):
    return torch.tensor(label_maps, dtype=torch.uint8)


def test_majority_takes_the_label_with_most_votes():
    votes = vote([0, 1, 2, 1], [0, 1, 2, 2], [1, 1, 0, 2])
    mean = torch.full((3, 4), 1 / 3)
    assert fusion.fuse(votes, mean, "majority", False).argmax(0).tolist() == [0, 1, 2, 2]


def test_mean_probability_decides_a_tie_and_nothing_else():
    mean = torch.tensor([[0.2, 0.9], [0.8, 0.1]])
    fused = fusion.fuse(vote([0, 1], [1, 1]), mean, "majority", False)
    assert fused.argmax(0).tolist() == [1, 1]
    assert torch.allclose(fused.sum(0), torch.ones(2))


def test_majority_of_overlapping_regions():
    votes = torch.tensor([[[1, 1, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.uint8)
    mean = torch.tensor([[0.9, 0.6, 0.0], [0.0, 0.9, 0.4]])
    assert (fusion.fuse(votes, mean, "majority", True) > 0.5).tolist() == [[True, True, False], [False, True, False]]


def test_staple_trusts_the_members_that_agree():
    """Two members segment a square, the third a shifted one: the estimate is the square of the two."""
    square, shifted = torch.zeros(1, 20, 20, dtype=torch.uint8), torch.zeros(1, 20, 20, dtype=torch.uint8)
    square[:, 5:15, 5:15] = 1
    shifted[:, 8:18, 5:15] = 1
    estimate = fusion.staple(torch.stack([square, square, shifted]), torch.full((1, 20, 20), 0.5))
    assert torch.equal(estimate > 0.5, square.bool())


def test_staple_leaves_unanimous_voxels_alone_and_survives_empty_masks():
    empty, one = torch.zeros(3, 1, 6, 6, dtype=torch.uint8), torch.zeros(3, 1, 6, 6, dtype=torch.uint8)
    assert torch.equal(fusion.staple(empty, torch.rand(1, 6, 6)), torch.zeros(1, 6, 6))
    one[0, 0, 3, 3] = 1
    estimate = fusion.staple(one, torch.rand(1, 6, 6))
    assert torch.isfinite(estimate).all()
    assert estimate.flatten()[:7].tolist() == [0.0] * 7


@pytest.mark.parametrize("regions", [False, True])
def test_staple_gives_probabilities(regions):
    torch.manual_seed(0)
    probabilities = torch.rand(5, 3, 1, 12, 12).softmax(1)
    votes = torch.stack(
        [fusion.votes_of(labels.probabilities_to_logits(each[None], regions)[0], regions) for each in probabilities]
    )
    fused = fusion.fuse(votes, probabilities.mean(0), "staple", regions)
    assert fused.shape == (3, 1, 12, 12)
    assert torch.isfinite(fused).all()
    assert regions or torch.allclose(fused.sum(0), torch.ones(1, 12, 12))


def test_unknown_fusion_is_named():
    with pytest.raises(ValueError, match="median.*mean, majority, staple"):
        fusion.fuse(vote([0], [1]), torch.full((2, 1), 0.5), "median", False)


@pytest.mark.parametrize("regions", [False, True])
def test_a_sample_votes_for_what_its_own_file_says_though_that_is_rounded(regions):
    generator = torch.Generator().manual_seed(0)
    near_ties = 0.5 + 1e-5 * torch.randn(2, 10000, generator=generator)
    members = Members(regions, keep_votes=True, keep_samples=True)
    members.add(near_ties, 1.0, "sample")
    kept = members.samples["sample"]
    assert torch.equal(members.votes[0].long(), (kept > 0).long() if regions else kept.argmax(0))


@pytest.mark.parametrize(("regions", "kept"), [(False, [True, True, False]), (True, [False, True, False])])
def test_classes_below_the_threshold_of_presence_are_left_out(regions, kept):
    mean = torch.tensor([[0.3, 0.1, 0.4], [0.1, 0.8, 0.2], [0.6, 0.1, 0.4]])
    found = fusion.leave_out(mean, fusion.absent(mean, 0.7, regions))
    assert found.any(1).tolist() == kept
    assert torch.equal(found[torch.tensor(kept)], mean[torch.tensor(kept)])
    assert not fusion.absent(mean, 0.0, regions).any()


def test_the_user_is_told_of_a_class_that_only_the_threshold_leaves_out():
    run = SimpleNamespace(settings=SimpleNamespace(regions=False, presence_threshold=0.9), notes=[])
    mean = torch.tensor([[0.3, 0.9], [0.6, 0.1], [0.1, 0.0]])
    VolumeRun._tell_what_is_left_out(run, mean, mean, fusion.absent(mean, 0.9, False))
    assert run.notes == ["class 1 is left out: its largest probability, 0.60, is below presence_threshold 0.9"]
