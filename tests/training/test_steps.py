"""Optimizer steps with gradients that cannot be used."""

import pytest
import torch

from nnunet_diffusion.training.steps import SKIPPED_IN_A_ROW, SkippedSteps, take_step


@pytest.mark.parametrize(
    ("slope", "taken"),
    [(1.0, True), (3e38, False), (float("inf"), False), (float("nan"), False)],
    ids=["finite", "norm overflows", "infinite", "nan"],
)
def test_a_step_is_taken_where_the_norm_of_the_gradients_is_finite(slope, taken):
    weight = torch.nn.Parameter(torch.zeros(2))  # two gradients of 3e38 are finite in float32, their norm is not
    optimizer = torch.optim.SGD([weight], 1.0)
    assert take_step((weight * slope).sum(), [weight], optimizer) is taken
    assert bool((weight != 0).any()) is taken
    assert bool(torch.isfinite(weight).all())


def test_too_many_skipped_steps_in_a_row_end_the_training_and_one_taken_begins_the_count_anew():
    skipped = SkippedSteps()
    for taken in [False] * SKIPPED_IN_A_ROW + [True] + [False] * SKIPPED_IN_A_ROW:
        skipped.note(taken, 3, ["case"])
    with pytest.raises(FloatingPointError, match=r"21 training steps in a row .*epoch 3, last on cases \['case'\]"):
        skipped.note(False, 3, ["case"])
    assert skipped.told(100).startswith("41 of 100 training steps were skipped")
    assert skipped.told(100) is None
