"""Label maps, masks, probabilities, logits."""

import pytest
import torch

from nnunet_diffusion.model import labels


@pytest.mark.parametrize("spatial", [(7, 5), (4, 3, 5)])
def test_label_map_to_masks_and_back_is_the_identity(spatial):
    target = torch.randint(0, 4, (2, 1, *spatial))
    masks = labels.labels_to_masks(target, 4)
    assert masks.shape == (2, 4, *spatial)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks.argmax(1), target[:, 0])
    probabilities = labels.normalised(masks.clone())
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, *spatial))
    torch.testing.assert_close(probabilities, masks, atol=5e-6, rtol=0)


def test_probabilities_stay_as_they_are():
    probabilities = torch.rand(2, 3, 5, 5).softmax(1)
    torch.testing.assert_close(labels.normalised(probabilities.clone()), probabilities, atol=1e-6, rtol=0)
    regions = torch.rand(2, 3, 5, 5)
    assert torch.equal(labels.normalised(regions.clone(), regions=True), regions)


def test_estimates_outside_the_range_still_give_probabilities():
    probabilities = labels.normalised(torch.tensor([2.0, -3.0]).view(1, 2, 1, 1))
    assert probabilities.flatten().tolist() == pytest.approx([1.0, 0.0], abs=2e-6)
    assert labels.normalised(torch.tensor([2.0, -3.0]).view(1, 2, 1, 1), regions=True).flatten().tolist() == [1, 0]
    nowhere = labels.normalised(torch.zeros(1, 4, 1, 1))
    assert nowhere.flatten().tolist() == pytest.approx([0.25] * 4)


def test_logits_are_bounded_and_survive_float16_weights_of_ten_with_argmax_kept():
    probabilities = torch.cat([torch.rand(1, 3, 40, 40).pow(8), torch.eye(3).view(1, 3, 3, 1).expand(1, 3, 3, 40)], 2)
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    logits = labels.probabilities_to_logits(probabilities)
    assert logits.min() > -13.9
    assert logits.max() <= 0
    torch.testing.assert_close(logits.softmax(1), probabilities, atol=3e-6, rtol=0)
    stored = (logits * 10).half().float() / 10
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    clear = first - second > 0.01
    assert torch.equal(stored.argmax(1)[clear], probabilities.argmax(1)[clear])


def test_unknown_label_is_refused_with_value_and_case():
    with pytest.raises(ValueError, match=r"Label 3 .*case_7.*0 to 2"):
        labels.check_labels(torch.tensor([0, 1, 3]), 3, ["case_7"])
    with pytest.raises(ValueError, match="Label -1"):
        labels.check_labels(torch.tensor([0, -1]), 3, ["case_7"])
    labels.check_labels(torch.tensor([0, 2]), 3, ["case_7"])
    labels.check_labels(torch.tensor([0, 3]), 3, ["case_7"], ignore_label=3)
    with pytest.raises(ValueError, match="Label 4"):
        labels.check_labels(torch.tensor([3, 4]), 3, ["case_7"], ignore_label=3)


def test_presence_and_location_of_each_class():
    target = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    target[0, 0, :2, :2] = 2
    truth = labels.read_target(target, 3)
    found, certain = labels.presence(truth)
    assert found.tolist() == [[0, 1], [0, 0]] and certain.all()
    assert labels.location(truth, (2, 2))[0][0].tolist() == [[[0, 0], [0, 0]], [[1, 0], [0, 0]]]
    assert labels.location(truth, (1, 1))[0][0, 1].item() == pytest.approx(0.25)


def test_regions_overlap_and_all_of_them_are_foreground():
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 0], masks[0, 1, :2] = 1, 1
    truth = labels.read_target(masks, 2, regions=True)
    assert truth.known is None and torch.equal(truth.masks, masks)
    assert labels.presence(truth, regions=True)[0].tolist() == [[1, 1]]
    assert labels.location(truth, (1, 1), regions=True)[0].flatten().tolist() == [1, 0.5]


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_ignore_label_of_classes_and_of_regions(kind):
    label_map = torch.tensor([0, 1, 2, 3]).view(1, 1, 4, 1)
    truth = labels.read_target(label_map, 3, ignore_label=3)
    assert truth.known.flatten().tolist() == [True, True, True, False]
    assert truth.masks[0, :, 3, 0].tolist() == [0, 0, 0]
    masks = torch.stack([label_map[:, 0] > 0, label_map[:, 0] == 2, label_map[:, 0] == 3], 1).to(kind)
    truth = labels.read_target(masks, 2, regions=True, ignore_label=3)
    assert truth.known.flatten().tolist() == [True, True, True, False]
    assert truth.masks[0, :, :, 0].tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]


def test_location_is_the_share_of_known_voxels():
    label_map = torch.tensor([[1, 3], [0, 3]]).view(1, 1, 2, 2)
    share, certain = labels.location(labels.read_target(label_map, 3, ignore_label=3), (1, 1))
    assert share.flatten().tolist() == [0.5, 0] and certain.item() == 0.5


def test_probabilities_of_regions_and_back():
    logits = (torch.randn(2, 3, 4, 4) * 3).clamp(-6, 6)  # float32 near 1 resolves no larger ones
    probabilities = labels.activate(logits, regions=True)
    assert torch.allclose(labels.probabilities_to_logits(probabilities, regions=True), logits, atol=1e-4)
    extreme = labels.probabilities_to_logits(torch.tensor([[0.0], [1.0]]), regions=True)
    assert 13 < extreme.abs().min() <= extreme.abs().max() < 14
