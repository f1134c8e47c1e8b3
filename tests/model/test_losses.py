"""Losses with known values."""

import math

import pytest
import torch

from nnunet_diffusion.model import labels, losses
from nnunet_diffusion.model.labels import Target


def test_presence_loss_at_even_odds_is_log_two():
    target = labels.read_target(torch.randint(0, 3, (4, 1, 6, 6)), 3)
    assert losses.presence_loss(torch.zeros(4, 2), target).item() == pytest.approx(math.log(2))


def test_perfect_location_has_no_loss_and_empty_foreground_is_finite():
    label_map = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    label_map[..., :4, :] = 1
    target = labels.read_target(label_map, 2)
    perfect = labels.location(target, (4, 4))[0] * 60 - 30
    assert losses.location_loss(perfect, target).item() == pytest.approx(0, abs=1e-6)
    wrong = losses.location_loss(-perfect, target)
    assert wrong > 10
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    losses.location_loss(logits, Target(torch.zeros(1, 2, 8, 8))).backward()
    assert torch.isfinite(logits.grad).all()


def test_squared_error():
    prediction, target = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    assert losses.squared_error(prediction, target).item() == pytest.approx(2.5)


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_change_no_loss(regions):
    torch.manual_seed(0)
    known = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    known[..., 3:] = False
    masks = (torch.rand(2, 3, 8, 8) < 0.5).float()
    other = torch.where(known, masks, 1 - masks)
    heads = 3 if regions else 2
    location = torch.randn(2, heads, 4, 4)
    location_other = torch.where(torch.arange(4) < 2, location, torch.randn(2, heads, 4, 4))
    prediction = torch.randn(2, 3, 8, 8)
    hidden = [Target(torch.where(known, each, 0.0), known) for each in (masks, other)]
    first, second = (
        losses.location_loss(logits, target, regions)
        for logits, target in zip((location, location_other), hidden, strict=True)
    )
    assert first.item() == pytest.approx(second.item())
    errors = [losses.squared_error(prediction, each, known).item() for each in (masks, other)]
    assert errors[0] == pytest.approx(errors[1])
    assert errors[0] == pytest.approx(((prediction - masks) ** 2)[..., :3].mean().item())


def test_what_may_hide_behind_ignored_voxels_is_no_absence():
    label_map = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    label_map[..., 0], label_map[..., 3] = 1, 3
    target = labels.read_target(label_map, 3, ignore_label=3)
    certain, wrong = torch.tensor([[20.0, 20.0]]), torch.tensor([[-20.0, 20.0]])
    assert losses.presence_loss(certain, target).item() == pytest.approx(0, abs=1e-6)  # class 2 may be there
    assert losses.presence_loss(wrong, target).item() == pytest.approx(20, rel=1e-3)
