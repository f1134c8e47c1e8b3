"""Label maps, states, probabilities, logits."""

import pytest
import torch

from nnunet_diffusion import labels


@pytest.mark.parametrize("spatial", [(7, 5), (4, 3, 5)])
def test_label_map_to_state_and_back_is_the_identity(spatial):
    target = torch.randint(0, 4, (2, 1, *spatial))
    state = labels.labels_to_state(target, 4)
    assert state.shape == (2, 4, *spatial)
    assert set(state.unique().tolist()) == {-1.0, 1.0}
    probabilities = labels.state_to_probabilities(state)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, *spatial))
    assert torch.equal(probabilities.argmax(1), target[:, 0])


def test_probabilities_to_state_and_back():
    probabilities = torch.rand(2, 3, 5, 5).softmax(1)
    back = labels.state_to_probabilities(labels.probabilities_to_state(probabilities))
    torch.testing.assert_close(back, probabilities, atol=1e-6, rtol=0)


def test_state_outside_the_range_still_gives_probabilities():
    probabilities = labels.state_to_probabilities(torch.tensor([[[3.0]], [[-7.0]]]).view(1, 2, 1, 1))
    assert probabilities.flatten().tolist() == pytest.approx([1.0, 0.0], abs=2e-6)
    nowhere = labels.state_to_probabilities(torch.full((1, 4, 1, 1), -1.0))
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


def test_presence_and_location_of_each_class():
    target = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    target[0, 0, :2, :2] = 2
    state = labels.labels_to_state(target, 3)
    assert labels.presence(state).tolist() == [[0, 1], [0, 0]]
    assert labels.location(state, (2, 2))[0].tolist() == [[[0, 0], [0, 0]], [[1, 0], [0, 0]]]
    assert labels.location(state, (1, 1))[0, 1].item() == pytest.approx(0.25)
