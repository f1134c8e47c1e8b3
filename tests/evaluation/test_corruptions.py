from __future__ import annotations

import numpy as np
import pytest

from nnunet_diffusion.evaluation.corruptions import dilate, erase_half, erode


def disc(radius: float, shape: tuple[int, ...] = (21, 21)) -> np.ndarray:
    grid = np.indices(shape) - np.array(shape).reshape(-1, *[1] * len(shape)) // 2
    return (np.sqrt((grid**2).sum(0)) <= radius).astype(np.uint8)


@pytest.mark.parametrize("shape", [(21, 21), (15, 15, 15)])
@pytest.mark.parametrize("voxels", [0, 1, 2, 3.5])
def test_dilated_voxel_is_a_ball(shape: tuple[int, ...], voxels: float) -> None:
    np.testing.assert_array_equal(dilate(disc(0, shape), voxels), disc(voxels, shape))


def brute_nearest_label(labels: np.ndarray, point: np.ndarray, voxels: float) -> set[int]:
    """All labels that a background voxel may take: those of its nearest foreground voxels within reach."""
    foreground = np.argwhere(labels > 0)
    distance = np.sqrt(((foreground - point) ** 2).sum(1))
    if distance.min() > voxels:
        return {0}
    return {int(labels[tuple(near)]) for near in foreground[distance == distance.min()]}


@pytest.mark.parametrize("shape", [(18, 15), (9, 8, 7)])
def test_dilate_equals_brute_force(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(1, 4, size=shape) * (generator.random(shape) < 0.03)
    dilated = dilate(labels, 2)
    for point in np.argwhere(labels == 0):
        assert int(dilated[tuple(point)]) in brute_nearest_label(labels, point, 2)
    np.testing.assert_array_equal(dilated[labels > 0], labels[labels > 0])


def test_erode_is_dilation_of_the_background() -> None:
    generator = np.random.default_rng(1)
    labels = (generator.random((30, 30)) < 0.97).astype(np.int16)
    np.testing.assert_array_equal(erode(labels, 2), 1 - dilate(1 - labels, 2))


def test_borders_between_classes_stay() -> None:
    labels = np.zeros((12, 20), np.uint8)
    labels[3:9, 4:10], labels[3:9, 10:16] = 1, 2
    grown, shrunk = dilate(labels, 2), erode(labels, 2)
    assert set(np.unique(grown[:, :10])) == {0, 1} and set(np.unique(grown[:, 10:])) == {0, 2}
    np.testing.assert_array_equal(np.argwhere(shrunk == 1).min(0), [5, 6])
    np.testing.assert_array_equal(np.argwhere(shrunk == 2).max(0), [6, 13])
    assert shrunk[5, 9] == 1 and shrunk[5, 10] == 2


def test_empty_and_full_maps_stay() -> None:
    empty, full = np.zeros((5, 6), np.uint8), np.full((5, 6), 2, np.uint8)
    for corruption in (dilate, erode):
        np.testing.assert_array_equal(corruption(empty, 2), empty)
        np.testing.assert_array_equal(corruption(full, 2), full)
    np.testing.assert_array_equal(erase_half(empty, 0), empty)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(41, 41), (1, 41, 41), (21, 21, 21)])
def test_half_of_a_disc_goes(shape: tuple[int, ...], seed: int) -> None:
    radius = 9 if len(shape) == 3 and shape[0] > 1 else 16
    labels = disc(radius, shape)
    kept = erase_half(labels, seed)
    assert set(np.unique(kept)) <= {0, 1}
    # The disc is its own mirror image through the centre: only voxels on the plane break the tie.
    on_plane = 2 * kept.sum() - labels.sum()
    assert 1 <= on_plane <= (2 * radius + 1) ** (labels.squeeze().ndim - 1)
    np.testing.assert_array_equal(kept | np.flip(kept), labels)


def test_every_structure_is_cut_and_none_vanishes() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[2:12, 2:12], labels[2:12, 12:22], labels[25:35, 5:15], labels[38, 38] = 1, 2, 1, 3
    kept = erase_half(labels, 7)
    for part in (np.s_[2:12, 2:12], np.s_[2:12, 12:22], np.s_[25:35, 5:15]):
        assert 40 <= np.count_nonzero(kept[part]) <= 60
    assert kept[38, 38] == 3
    assert np.all((kept == labels) | (kept == 0))


def test_cuts_are_set_by_the_seed_and_inputs_stay() -> None:
    labels = disc(8)
    before = labels.copy()
    np.testing.assert_array_equal(erase_half(labels, 3), erase_half(labels, 3))
    assert any(np.any(erase_half(labels, seed) != erase_half(labels, 3)) for seed in range(4))
    dilate(labels, 2), erode(labels, 2)
    np.testing.assert_array_equal(labels, before)


def test_dtype_is_kept_and_bad_values_are_named() -> None:
    labels = disc(4).astype(np.int16)
    assert dilate(labels, 1).dtype == erode(labels, 1).dtype == erase_half(labels, 0).dtype == np.int16
    with pytest.raises(ValueError, match="voxels must be >= 0, got -1"):
        dilate(labels, -1)
    with pytest.raises(ValueError, match="voxels must be >= 0, got nan"):
        erode(labels, float("nan"))
