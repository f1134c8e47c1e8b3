"""clDice and the recall of thin vessels, on drawn vessels whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.evaluation.tubular import centreline, centreline_dice, thin_vessel_recall


def vessel(row: int, width: int, columns: slice = slice(10, 90)) -> np.ndarray:
    mask = np.zeros((60, 100), bool)
    mask[row : row + width, columns] = True
    return mask


def test_a_thin_branch_lost_costs_cldice_more_than_dice() -> None:
    thick, thin = vessel(10, 9), vessel(40, 1)
    both = thick | thin
    # topology precision is 1; sensitivity the thick vessel's share of both centrelines
    sensitivity = centreline(thick).sum() / centreline(both).sum()
    assert centreline_dice(thick, both) == pytest.approx(2 * sensitivity / (1 + sensitivity))
    assert centreline_dice(thick, both) < 0.7 < 0.9 < dice(thick, both)
    # which of the two is wrong makes no difference
    assert centreline_dice(both, thick) == pytest.approx(centreline_dice(thick, both))
    # borders one pixel further out: the same centrelines
    assert centreline_dice(vessel(9, 11), thick) == pytest.approx(1, abs=0.02)


def test_recall_counts_the_thin_vessels_alone() -> None:
    truth = vessel(10, 9) | vessel(30, 1) | vessel(40, 2) | vessel(50, 3)
    assert thin_vessel_recall(truth, truth) == 1
    # both thin vessels are missed; the thick one and that of three pixels do not count, nor do false alarms
    assert thin_vessel_recall(vessel(10, 9) | vessel(50, 3) | vessel(20, 4), truth) < 0.02
    assert thin_vessel_recall(vessel(30, 1) | vessel(40, 2), truth) > 0.98
    half = vessel(30, 1, slice(10, 50)) | vessel(40, 2, slice(10, 50))
    assert thin_vessel_recall(half, truth) == pytest.approx(0.5, abs=0.02)


def test_a_ragged_border_makes_no_thin_vessel_of_a_thick_one() -> None:
    ragged = vessel(20, 11)
    generator = np.random.default_rng(0)
    ragged[19, 10:90] |= generator.random(80) < 0.3
    ragged[31, 10:90] |= generator.random(80) < 0.3
    thin = centreline(ragged) & ~ndimage.binary_opening(ragged)
    assert thin.sum() < 0.1 * centreline(ragged).sum()
    truth = ragged | vessel(45, 2)
    assert thin_vessel_recall(ragged, truth) < 0.15


def test_diagonal_vessels_of_one_pixel_are_thin() -> None:
    truth = np.eye(50, dtype=bool)
    assert thin_vessel_recall(truth, truth) == 1
    assert thin_vessel_recall(np.tril(truth, -1), truth) == 0


def test_volumes_and_single_slices_are_measured() -> None:
    volume = np.zeros((20, 30, 30), bool)
    volume[:, 10, 10] = True
    volume[:, 17:24, 17:24] = True
    lost = volume.copy()
    lost[:, 10, 10] = False
    assert thin_vessel_recall(lost, volume) < 0.05 and 0.4 < centreline_dice(lost, volume) < 0.9
    slice_of = vessel(30, 1)
    assert centreline_dice(slice_of[None], slice_of[None]) == 1


def test_what_thinning_removes_wholly_keeps_one_voxel() -> None:
    # scikit-image leaves nothing of it
    bar = np.zeros((20, 30, 30), bool)
    bar[:, 18:24, 18:24] = True
    found = centreline(bar)
    assert found.sum() == 1 and (found & bar).any() and centreline_dice(bar, bar) == 1
    bar[3, 3, 3:20] = True
    assert centreline(bar)[3, 3].sum() > 10 and (centreline(bar)[:, 18:24, 18:24]).sum() == 1


def test_empty_masks_and_structures_without_a_thin_part() -> None:
    empty = np.zeros((60, 100), bool)
    assert math.isnan(centreline_dice(empty, empty)) and math.isnan(thin_vessel_recall(vessel(3, 1), empty))
    assert centreline_dice(empty, vessel(3, 1)) == centreline_dice(vessel(3, 1), empty) == 0
    # far from each other
    assert centreline_dice(vessel(3, 1), vessel(50, 1)) == 0
    with pytest.raises(ValueError, match="prediction has shape .* the reference"):
        centreline_dice(empty, empty[1:])
    with pytest.raises(ValueError, match="two or three axes"):
        centreline_dice(np.ones(5, bool), np.ones(5, bool))
