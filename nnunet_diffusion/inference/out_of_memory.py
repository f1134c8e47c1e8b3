"""A GPU smaller than the plan's: fewer patches at once, then the state on the CPU, instead of failing every case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor

from nnunet_diffusion.inference.volume import VolumeProcess


def run_group(
    process: VolumeProcess, group: Sequence[int], joint: bool, notes: list[str]
) -> tuple[VolumeProcess, Tensor]:
    """Run a group of samples; where the GPU's memory ends, with fewer patches at once, then with the state on the CPU.

    Args:
        process: of the volume.
        group: numbers of the samples.
        joint: one reverse process for the volume; False for one per tile.
        notes: takes what gave way.

    Returns:
        The process as it ran, for the next group, and what its run returned.

    Raises:
        MemoryError: one patch at a time does not fit either.
    """
    device = process.tiling.device
    while True:
        run = process.run if joint else process.run_tile_wise
        found = unless_out_of_memory(partial(run, group), device)
        if found is not None:
            return process, found
        batch, cpu = process.tiling.batch, torch.device("cpu")
        if batch > 1:
            tell(notes, f"{batch} patches at once do not fit on {device}: {batch // 2}")
            process = dataclasses.replace(process, tiling=dataclasses.replace(process.tiling, batch=batch // 2))
        elif process.state_device != cpu:
            tell(notes, f"the state does not fit on {device} beside one patch: it is on the CPU")
            process = dataclasses.replace(process, state_device=cpu)
        else:
            raise MemoryError(
                f"The denoiser does not fit on {device} for one patch of {list(process.tiling.weight.shape)}: take a "
                "larger GPU, or -device cpu."
            )


def unless_out_of_memory(run: Callable[[], Tensor], device: torch.device) -> Tensor | None:
    """Return what `run` returns, or None where the GPU's memory does not suffice; what it left there is given back."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:  # its traceback keeps the tensors alive: nothing is tried again in here
        pass
    empty_cache(device)
    return None


def tell(notes: list[str], note: str) -> None:
    """Add a note unless it is empty or was said before, for another fold."""
    if note and note not in notes:
        notes.append(note)
