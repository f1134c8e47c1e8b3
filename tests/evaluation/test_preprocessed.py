"""Dice on the grid of preprocessed cases."""

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.evaluation.preprocessed import mean_dice


def test_mean_dice_by_hand():
    manager = LabelManager({"background": 0, "a": 1, "b": 2, "absent": 3, "ignore": 4}, None)
    truth = np.array([[-1, 1, 1, 2, 4, 4]])
    segmentation = np.array([[0, 1, 2, 2, 1, 2]])
    # a: 2 * 1 / (1 + 2), b: 2 * 1 / (2 + 1), absent from both: left out; the last two voxels do not count
    assert mean_dice(segmentation, truth, manager) == pytest.approx(2 / 3)
    assert np.isnan(mean_dice(np.zeros((1, 2)), np.zeros((1, 2)), manager))
