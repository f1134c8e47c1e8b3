from __future__ import annotations

import pytest
import torch

from nnunet_diffusion.evaluation.seams import Jumps, border_jumps

EVERYTHING = slice(None)


def tiles_along_width(*ranges: tuple[int, int]) -> list[tuple[slice, ...]]:
    return [(EVERYTHING, slice(0, 4), slice(*span)) for span in ranges]


def test_a_step_at_a_border_is_told_from_the_slope_beside_it() -> None:
    ramp = torch.arange(10.0).expand(1, 4, 10).clone()
    ramp[..., 5:] += 2
    found = border_jumps(ramp, tiles_along_width((0, 5), (5, 10)))
    # one plane of 4 pixels: a difference of 1 + 2 there, of 1 on the planes beside it
    assert found == Jumps(at_borders=12.0, around=4.0, planes=1)
    assert found.ratio == 3


def test_overlapping_tiles_have_two_borders_and_images_add_up() -> None:
    ramp = torch.arange(10.0).expand(1, 4, 10)
    found = border_jumps(ramp, tiles_along_width((0, 6), (4, 10)))
    assert (found.planes, found.ratio) == (2, 1)
    assert (found + found).at_borders == 2 * found.at_borders


def test_slices_of_a_volume_and_single_tiles_have_no_border_along_their_axis() -> None:
    volume = torch.rand(2, 3, 8, 8)
    tiles = [(EVERYTHING, z, slice(0, 8), slice(0, 8)) for z in range(3)]
    found = border_jumps(volume, tiles)
    assert found == Jumps()
    with pytest.raises(ZeroDivisionError):
        _ = found.ratio
