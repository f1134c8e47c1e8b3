"""Losses with known values."""

import math

import pytest
import torch

from nnunet_diffusion import labels, losses


def test_presence_loss_at_even_odds_is_log_two():
    state = labels.labels_to_state(torch.randint(0, 3, (4, 1, 6, 6)), 3)
    assert losses.presence_loss(torch.zeros(4, 2), state).item() == pytest.approx(math.log(2))


def test_perfect_location_has_no_loss_and_empty_foreground_is_finite():
    target = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    target[..., :4, :] = 1
    state = labels.labels_to_state(target, 2)
    perfect = labels.location(state, (4, 4)) * 60 - 30
    assert losses.location_loss(perfect, state).item() == pytest.approx(0, abs=1e-6)
    wrong = losses.location_loss(-perfect, state)
    assert wrong > 10
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    losses.location_loss(logits, -torch.ones(1, 2, 8, 8)).backward()
    assert torch.isfinite(logits.grad).all()


def test_squared_error_and_its_weight():
    prediction, target = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    assert losses.squared_error(prediction, target).item() == pytest.approx(2.5)
    assert losses.squared_error(prediction, target, torch.tensor([[1.0], [0.0]])).item() == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "expected"), [("x0", 5.0), ("epsilon", 5 / 9), ("v", 0.5)])
def test_min_snr_weight_at_snr_nine(kind, expected):
    assert losses.min_snr_weight(torch.tensor(0.9), kind, 5.0).item() == pytest.approx(expected, rel=1e-5)
