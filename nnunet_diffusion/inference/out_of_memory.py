"""Fallbacks on a GPU that is too small for the plans: no kept conditions, fewer patches at once, the state on the CPU."""

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
    """Run a group of samples; if GPU memory runs out, retry with less in it.

    First no conditions are kept, then fewer patches are evaluated at once, then the state moves to the CPU.

    Args:
        process: reverse process of the volume.
        group: numbers of the samples.
        joint: True for one reverse process per volume; False for one per tile.
        notes: list to which notes on the fallbacks are added.

    Returns:
        The process with the settings that fitted, for the next group, and its result.

    Raises:
        MemoryError: not even a single patch fits.
    """
    device = process.tiling.device
    while True:
        run = process.run if joint else process.run_tile_wise
        found = unless_out_of_memory(partial(run, group), device)
        if found is not None:
            return process, found
        if process.forget_conditions():
            empty_cache(device)
            continue
        batch, cpu = process.tiling.batch, torch.device("cpu")
        if batch > 1:
            tell(notes, f"{batch} patches at once do not fit on {device}: {batch // 2}")
            tiling = dataclasses.replace(process.tiling, batch=batch // 2)
            process = dataclasses.replace(process, tiling=tiling, condition_bytes=0)
        elif process.state_device != cpu:
            tell(notes, f"the state does not fit on {device} beside one patch: it is on the CPU")
            process = dataclasses.replace(process, state_device=cpu, condition_bytes=0)
        else:
            raise MemoryError(
                f"The denoiser does not fit on {device} for one patch of {list(process.tiling.weight.shape)}: take a "
                "larger GPU, or -device cpu."
            )


def unless_out_of_memory(run: Callable[[], Tensor], device: torch.device) -> Tensor | None:
    """Return the result of `run`, or None if GPU memory ran out; in that case cached memory is freed."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:  # do not retry here: the traceback keeps the tensors alive
        pass
    empty_cache(device)
    return None


def tell(notes: list[str], note: str) -> None:
    """Add a note unless it is empty or already present (from another fold)."""
    if note and note not in notes:
        notes.append(note)
