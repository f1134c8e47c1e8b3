"""Corrupted label maps for the repair test, which a refiner that only returns its start cannot pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage


def dilate(labels: ArrayLike, voxels: float) -> NDArray:
    """Grow the foreground into the background.

    Args:
        labels: integer label map with background 0, (*spatial).
        voxels: growth in voxels (Euclidean, whatever the spacing), >= 0.

    Returns:
        A new label map of the same shape and dtype: each background voxel at most `voxels` from the foreground takes
        the label of its nearest foreground voxel. Borders between two classes stay; an empty map stays empty.

    Raises:
        ValueError: `voxels` is negative.
    """
    label_map = _checked(labels, voxels)
    if not label_map.any():
        return label_map.copy()
    distance, nearest = ndimage.distance_transform_edt(label_map == 0, return_indices=True)
    return np.where(distance <= voxels, label_map[tuple(nearest)], label_map)


def erode(labels: ArrayLike, voxels: float) -> NDArray:
    """Shrink the foreground away from the background.

    Args:
        labels: integer label map with background 0, (*spatial).
        voxels: loss in voxels (Euclidean, whatever the spacing), >= 0.

    Returns:
        A new label map of the same shape and dtype: each foreground voxel at most `voxels` from the background becomes
        background. Borders between two classes and the array's border stay; a map without background stays as it is.

    Raises:
        ValueError: `voxels` is negative.
    """
    label_map = _checked(labels, voxels)
    if label_map.all():
        return label_map.copy()
    distance = ndimage.distance_transform_edt(label_map != 0)
    return np.where(distance <= voxels, np.zeros_like(label_map), label_map)


def erase_half(labels: ArrayLike, seed: int) -> NDArray:
    """Erase one side of each foreground structure, cut by a random plane (2D: line) through its centroid.

    Args:
        labels: integer label map with background 0, (*spatial).
        seed: seed of the cutting planes; the same seed gives the same cut.

    Returns:
        A new label map of the same shape and dtype. A structure is a face-connected component of one class; voxels on
        the plane stay, so a structure never vanishes.
    """
    erased = np.array(labels, copy=True)
    generator = np.random.default_rng(seed)
    for label in np.unique(erased[erased != 0]):
        components, count = ndimage.label(erased == label)
        for component in range(1, count + 1):
            points = np.argwhere(components == component)
            normal = generator.normal(size=erased.ndim)
            beyond = points[(points - points.mean(axis=0)) @ normal > 0]
            erased[tuple(beyond.T)] = 0
    return erased


def _checked(labels: ArrayLike, voxels: float) -> NDArray:
    if not voxels >= 0:
        raise ValueError(f"voxels must be >= 0, got {voxels}")
    return np.asarray(labels)
