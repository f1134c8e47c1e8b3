from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_diffusion.evaluation.case_metrics import class_numbers
from nnunet_diffusion.evaluation.metrics import (
    dice,
    hd95,
    surface_dice,
    voxels_corrected_and_broken,
)


def cube(shape: tuple[int, ...], start: tuple[int, ...], size: int) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(first, first + size) for first in start)] = True
    return mask


def brute_surface(mask: np.ndarray) -> np.ndarray:
    """Points (N, D) of mask voxels with a face neighbour outside mask or array, by loops."""
    points = []
    for point in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                neighbour = point.copy()
                neighbour[axis] += step
                inside = 0 <= neighbour[axis] < mask.shape[axis]
                if not inside or not mask[tuple(neighbour)]:
                    points.append(tuple(point))
    return np.array(sorted(set(points)), dtype=np.float64)


def brute_hd95(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> float:
    a, b = brute_surface(first) * spacing, brute_surface(second) * spacing
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_dice_of_half_overlapping_cubes_is_one_half(dimensions: int) -> None:
    first = cube((12,) * dimensions, (2,) * dimensions, 4)
    second = np.roll(first, 2, axis=0)
    assert dice(first, second) == 0.5
    assert dice(first, first) == 1.0


def test_dice_of_empty_masks() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert math.isnan(dice(empty, empty))
    assert dice(empty, full) == 0.0
    assert dice(full, empty) == 0.0


def test_hd95_of_empty_masks() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert math.isnan(hd95(empty, empty, (1, 1)))
    assert hd95(empty, full, (1, 1)) == math.inf
    assert hd95(full, empty, (1, 1)) == math.inf


@pytest.mark.parametrize(("axis", "expected"), [(0, 2.5), (1, 0.5), (2, 5.0)])
def test_hd95_of_single_voxels_is_the_offset_in_mm(axis: int, expected: float) -> None:
    spacing = (1.25, 0.25, 2.5)
    first, second = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    first[4, 4, 4] = True
    second[tuple(4 + 2 * (index == axis) for index in range(3))] = True
    assert hd95(first, second, spacing) == pytest.approx(expected, abs=1e-12)


def test_hd95_of_cubes_offset_by_a_known_distance() -> None:
    # Flat plates one voxel thick: every surface voxel of one is exactly 3 voxels of 2 mm from the other.
    first, second = np.zeros((10, 8, 8), bool), np.zeros((10, 8, 8), bool)
    first[2], second[5] = True, True
    assert hd95(first, second, (2.0, 1.0, 1.0)) == pytest.approx(6.0, abs=1e-12)
    # Distant cubes, offset along one axis by more than their size: 5 % of the far face is cut off, its distance stays.
    near, far = cube((40, 12, 12), (2, 2, 2), 6), cube((40, 12, 12), (22, 2, 2), 6)
    assert hd95(near, far, (0.5, 1, 1)) == pytest.approx(20 * 0.5, abs=1e-12)


def test_hd95_ignores_one_percent_of_outliers() -> None:
    mask = np.zeros((60, 200), bool)
    mask[10:12, :100] = True
    spoiled = mask.copy()
    spoiled[50, 150] = True
    assert hd95(spoiled, mask, (1, 1)) == 0.0


@pytest.mark.parametrize("shape", [(14, 11), (9, 8, 7)])
@pytest.mark.parametrize("seed", range(6))
def test_hd95_equals_brute_force_over_point_sets(shape: tuple[int, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = (generator.random(shape) < density for density in (0.2, 0.5))
    first[: shape[0] // 3] = False
    spacing = tuple(generator.uniform(0.3, 3.0, len(shape)))
    expected = brute_hd95(first, second, spacing)
    assert hd95(first, second, spacing) == pytest.approx(expected, abs=1e-9)
    assert hd95(second, first, spacing) == pytest.approx(expected, abs=1e-9)


def test_hd95_of_one_slice_volume_equals_the_image() -> None:
    first, second = cube((20, 20), (3, 3), 6), cube((20, 20), (5, 8), 7)
    assert hd95(first[None], second[None], (999, 1, 2)) == pytest.approx(hd95(first, second, (1, 2)), abs=1e-12)
    assert hd95(np.ones((1, 1)), np.ones((1, 1)), (1, 1)) == 0.0


def test_corrected_and_broken_count_single_voxels() -> None:
    reference = np.array([0, 1, 2, 2, 1, 0])
    start = np.array([1, 1, 1, 2, 0, 0])
    result = np.array([0, 2, 2, 2, 2, 0])
    changes = voxels_corrected_and_broken(start, result, reference)
    assert (changes.corrected, changes.broken) == (2, 1)
    unchanged = voxels_corrected_and_broken(start, start, reference)
    assert (unchanged.corrected, unchanged.broken) == (0, 0)


def test_changes_balance_the_number_of_wrong_voxels() -> None:
    generator = np.random.default_rng(0)
    start, result, reference = generator.integers(0, 4, size=(3, 16, 16, 5))
    changes = voxels_corrected_and_broken(start, result, reference)
    assert changes.broken - changes.corrected == np.sum(result != reference) - np.sum(start != reference)


def numbers(prediction: np.ndarray, reference: np.ndarray, known: np.ndarray | None = None) -> dict[str, float]:
    known = np.ones(reference.shape, bool) if known is None else known
    return class_numbers(prediction & known, reference & known, known, (1.0, 1.0), 1.0)


def test_a_class_that_is_absent_or_missed_has_its_own_rule() -> None:
    reference, empty = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    reference[2:4, 2:4] = True
    found = numbers(reference, reference)
    assert (found["dice"], found["hd95_mm"]) == (1.0, 0.0)
    absent = numbers(empty, empty)
    assert math.isnan(absent["dice"]) and math.isnan(absent["hd95_mm"])
    missed = numbers(empty, reference)
    assert (missed["dice"], missed["hd95_mm"], missed["predicted_mm3"], missed["true_mm3"]) == (0.0, math.inf, 0, 4)


def test_what_the_reference_ignores_counts_for_nothing() -> None:
    reference = np.zeros((8, 8), bool)
    reference[1:4, 1:4] = True
    prediction, known = reference.copy(), np.ones((8, 8), bool)
    prediction[6:] = True
    known[6:] = False
    found = numbers(prediction, reference, known)
    assert (found["dice"], found["hd95_mm"], found["predicted_mm3"], found["true_mm3"]) == (1.0, 0.0, 9, 9)
    assert numbers(prediction, reference)["dice"] < 0.6


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 3\)"):
        dice(np.zeros((3, 3)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="spacing_mm must be 2 positive"):
        hd95(np.ones((3, 3)), np.ones((3, 3)), (1, 1, 1))
    with pytest.raises(ValueError, match="spacing_mm must be 2 positive"):
        hd95(np.ones((3, 3)), np.ones((3, 3)), (0, 1))
    with pytest.raises(ValueError, match="start has shape"):
        voxels_corrected_and_broken(np.zeros(3), np.zeros(4), np.zeros(4))


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_surface_dice_agrees_with_loops(tolerance: float, dimensions: int) -> None:
    generator = np.random.default_rng(dimensions)
    spacing = (1.0, 0.7, 2.0)[:dimensions]
    first, second = (generator.random((9, 8, 7)[:dimensions]) > 0.7 for _ in range(2))
    a, b = brute_surface(first) * spacing, brute_surface(second) * spacing
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    near = (distances.min(1) <= tolerance).sum() + (distances.min(0) <= tolerance).sum()
    assert surface_dice(first, second, spacing, tolerance) == pytest.approx(near / (len(a) + len(b)))


def test_surface_dice_of_empty_masks_and_shifted_plates() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert math.isnan(surface_dice(empty, empty, (1, 1), 1))
    assert surface_dice(empty, full, (1, 1), 1) == 0
    # two plates, three voxels of 2 mm apart
    first, second = np.zeros((10, 8, 8), bool), np.zeros((10, 8, 8), bool)
    first[2], second[5] = True, True
    assert surface_dice(first, second, (2, 1, 1), 5.9) == 0
    assert surface_dice(first, second, (2, 1, 1), 6) == 1
    with pytest.raises(ValueError, match="tolerance_mm is -1"):
        surface_dice(first, second, (2, 1, 1), -1)
