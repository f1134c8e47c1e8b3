"""Jumps at the borders of a sliding window's tiles, an artefact of tile-wise prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

NEIGHBOURS = (-2, -1, 1, 2)


@dataclass(frozen=True)
class Jumps:
    """Sums over the planes between voxels at which a tile begins or ends. Jumps of several images can be added.

    Attributes:
        at_borders: Sum of |difference| across these planes.
        around: Sum of the mean |difference| across the planes up to two voxels next to each.
        planes: Number of planes.
    """

    at_borders: float = 0.0
    around: float = 0.0
    planes: int = 0

    def __add__(self, other: Jumps) -> Jumps:
        """Add the sums of another image."""
        return Jumps(self.at_borders + other.at_borders, self.around + other.around, self.planes + other.planes)

    @property
    def ratio(self) -> float:
        """Mean jump at tile borders divided by the mean jump next to them; 1 if tiles leave no artefact."""
        return self.at_borders / self.around


def border_jumps(values: Tensor, tiles: Sequence[tuple[slice, ...]]) -> Jumps:
    """Measure the jumps of one image.

    Args:
        values: (K, *spatial), for example probabilities.
        tiles: nnU-Net's slicers (K, *spatial); an entry is a slice, or an integer (the slice of a volume in 2D).
    """
    found = Jumps()
    for axis in range(1, values.ndim):
        rest = [other for other in range(values.ndim) if other != axis]
        across = values.diff(dim=axis).abs().sum(rest).double()
        ranges = [tile[axis] for tile in tiles if isinstance(tile[axis], slice)]
        edges = {edge for tile in ranges for edge in (tile.start, tile.stop)}
        for plane in sorted(edge - 1 for edge in edges if 0 < edge < values.shape[axis]):
            others = [plane + step for step in NEIGHBOURS if 0 <= plane + step < len(across)]
            found += Jumps(across[plane].item(), across[others].mean().item(), 1)
    return found
