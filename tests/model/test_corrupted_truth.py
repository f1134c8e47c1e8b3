"""Corrupted truths: probabilities, repeatable, wrong in the ways they should be."""

import pytest
import torch

from nnunet_diffusion.model import corrupted_truth, labels


def disc(count, size=64, radius=14):
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()
    inside = ((grid - size / 2) ** 2).sum(0) < radius**2
    return labels.labels_to_masks(inside.long().expand(count, 1, size, size), 2)


@pytest.mark.parametrize("shape", [(3, 1, 17, 33), (2, 1, 6, 16, 9), (1, 1, 1, 4)])
def test_result_is_probabilities_of_the_same_shape(shape):
    masks = labels.labels_to_masks(torch.randint(0, 4, shape), 4)
    wrong = corrupted_truth.corrupt(masks, torch.Generator().manual_seed(0))
    assert wrong.shape == masks.shape
    assert wrong.dtype == torch.float32
    torch.testing.assert_close(wrong.sum(1), torch.ones_like(wrong[:, 0]))
    assert wrong.min() >= 0


def test_same_generator_state_gives_the_same_mistakes():
    first, second = (corrupted_truth.corrupt(disc(2), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, corrupted_truth.corrupt(disc(2), torch.Generator().manual_seed(8)))


def test_mistakes_are_common_but_the_segmentation_stays_recognisable():
    truth = disc(200) > 0
    found = corrupted_truth.corrupt(disc(200), torch.Generator().manual_seed(1)) > 0.5
    overlap = (
        2 * (truth & found)[:, 1].flatten(1).sum(1) / (truth[:, 1].flatten(1).sum(1) + found[:, 1].flatten(1).sum(1))
    )
    assert 0.5 < overlap.median() < 0.97
    sizes = found[:, 1].flatten(1).sum(1) / truth[:, 1].flatten(1).sum(1)
    assert (sizes < 0.8).float().mean() > 0.1  # eroded or cut
    assert (sizes > 1.2).float().mean() > 0.1  # dilated or invented


def test_regions_are_spoiled_one_by_one_and_stay_recognisable():
    truth = torch.cat((disc(200)[:, 1:], disc(200, radius=8)[:, 1:]), 1)  # one inside the other
    found = corrupted_truth.corrupt(truth, torch.Generator().manual_seed(1), regions=True)
    assert found.shape == truth.shape and found.min() >= 0 and found.max() <= 1
    wrong, right = (found > 0.5).flatten(2), (truth > 0).flatten(2)
    overlap = 2 * (wrong & right).sum(2) / (wrong.sum(2) + right.sum(2))
    assert overlap.median(0).values.min() > 0.5 and overlap.median(0).values.max() < 0.99


def test_parts_are_invented_where_there_is_no_foreground():
    empty = labels.labels_to_masks(torch.zeros(100, 1, 32, 32), 3)
    found = corrupted_truth.corrupt(empty, torch.Generator().manual_seed(2))[:, 1:].amax((1, 2, 3)) > 0.9
    assert 0.05 < found.float().mean() < 0.5
