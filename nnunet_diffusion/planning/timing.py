"""Time of training steps, measured on this machine with random patches."""

from __future__ import annotations

import bisect
import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_diffusion.model.build import build_denoiser
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.planning.steps import Step, build_nnunet, diffusion_step, nnunet_builder, nnunet_step

REPEATS = range(3, 11)  # allowed numbers of repeats of a timed step
TIMED_SECONDS = 0.5  # a step is repeated until this much time has passed
LOAD_SECONDS = 0.05  # duration of one measurement of the free processor share
LOAD_BYTES = bytes(2**20)  # data hashed to keep the processors busy meanwhile
FREE_SHARE = 0.8  # if this process gets a smaller share of processor time, the machine counts as busy
SPREAD = 1.25  # if the median time of a step exceeds the fastest by this factor, the machine counts as busy
LEAST_SHARE = 0.25  # smallest share that is corrected for; less may be the limit of a container, which training has too
PROBE_EDGE = {2: 96, 3: 32}
"""Longest edge (voxels) of the probe patch on which the speed of a width is first measured, by number of axes."""


@dataclass(frozen=True)
class Timing:
    """Timing of a step from a few repeats.

    Attributes:
        seconds: estimated time on a quiet machine.
        spread: ratio of the median time to the fastest.
        share: share of the requested processor time that this process got between the repeats; 1 on a quiet machine.
    """

    seconds: float
    spread: float = 1.0
    share: float = 1.0


def time_nnunet(
    configuration: Mapping[str, Any], channels: int, heads: int, batch: int, patch: Sequence[int], device: torch.device
) -> Timing:
    """Time nnU-Net's training step; `patch` may be smaller than the configuration's."""
    network = build_nnunet(configuration, channels, heads).train().to(device)
    # regions are timed as classes
    return _timed(nnunet_step(network, *_random_batch(batch, channels, heads, patch, device, False)), device)


def time_denoiser(
    configuration: Mapping[str, Any],
    settings: DiffusionSettings,
    channels: int,
    heads: int,
    batch: int,
    patch: Sequence[int],
    device: torch.device,
) -> Timing:
    """Time DiffusionTrainer's training step; `patch` may be smaller than the configuration's."""
    denoiser = build_denoiser(settings, configuration, channels, heads, nnunet_builder(configuration, heads))
    segmenter = DiffusionSegmenter(build_nnunet(configuration, channels, heads), denoiser, settings).to(device)
    data = _random_batch(batch, channels, heads, patch, device, settings.regions)
    return _timed(diffusion_step(segmenter, *data), device)


def probe_patch(patch: Sequence[int], strides: Sequence[Sequence[int] | int]) -> tuple[int, ...]:
    """Return a patch no larger than `patch` on which a step can be timed quickly, with edges of about `PROBE_EDGE` at most.

    Each edge remains a multiple of the product of the axis's strides, so that all stages exist. The deepest stage keeps at
    least two voxels, if `patch` allows, which normalisation needs.
    """
    divisors = [1] * len(patch)
    for stride in strides:
        for axis in range(len(patch)):
            divisors[axis] *= stride if isinstance(stride, int) else stride[axis]
    longest = PROBE_EDGE[len(patch)]
    edges = [min(int(edge), max(longest // by, 1) * by) for edge, by in zip(patch, divisors, strict=True)]
    if all(edge == by for edge, by in zip(edges, divisors, strict=True)):
        axis = min(
            (axis for axis in range(len(patch)) if patch[axis] > edges[axis]), key=divisors.__getitem__, default=0
        )
        edges[axis] = min(int(patch[axis]), 2 * divisors[axis])
    return tuple(edges)


def machine_name() -> str:
    """Return the processor and number of cores, for plans that depend on them."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _random_batch(
    batch: int, channels: int, heads: int, patch: Sequence[int], device: torch.device, regions: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, channels, *patch, generator=generator)
    values, maps = (2, heads) if regions else (heads, 1)
    target = torch.randint(0, values, (batch, maps, *patch), generator=generator)
    return image.to(device), target.to(device)


def _timed(step: Step, device: torch.device) -> Timing:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    threads = torch.get_num_threads()
    walls: list[float] = []
    processor: list[float] = []
    shares = [free_share(threads)]
    while len(walls) < REPEATS.start or (sum(walls) < TIMED_SECONDS and len(walls) < REPEATS.stop - 1):
        synchronize()
        begin, used = time.perf_counter(), time.process_time()
        step()
        synchronize()
        walls.append(time.perf_counter() - begin)
        processor.append((time.process_time() - used) / threads)
        shares.append(free_share(threads))
    spread = statistics.median(walls) / min(walls)
    if device.type != "cpu":
        return Timing(min(walls), spread)
    # the minimum, as timeit advises, because other processes can only add time
    return Timing(min(map(quiet_seconds, walls, processor, shares, shares[1:])), spread, statistics.median(shares))


def quiet_seconds(wall: float, processor: float, before: float, after: float) -> float:
    """Estimate the seconds of a step on a quiet machine.

    Args:
        wall: wall-clock seconds of the step.
        processor: processor seconds per thread, a lower bound on the estimate.
        before: share of the processors available to this process before the step (`free_share`).
        after: the same share after the step.
    """
    return max(processor, wall * max((before + after) / 2, LEAST_SHARE))


def free_share(threads: int) -> float:
    """Return the share of `threads` processors that this process gets under full load, at most 1.

    The processor time of the training step itself does not show this. Even on a quiet machine it is 0.6 to 1 of the total,
    depending on whether waiting threads spin (OMP_WAIT_POLICY).
    """

    def keep_busy(_: int) -> None:
        while time.perf_counter() < end:
            hashlib.sha256(LOAD_BYTES)  # releases the global interpreter lock

    with ThreadPoolExecutor(threads) as pool:
        begin, used = time.perf_counter(), time.process_time()
        end = begin + LOAD_SECONDS
        list(pool.map(keep_busy, range(threads)))
        share = (time.process_time() - used) / (time.perf_counter() - begin) / threads
    return min(share, 1.0)


@dataclass
class StepTimes:
    """Time of a training step as a piecewise linear function of its FLOPs, at one patch and batch.

    Small networks reach fewer FLOP/s because of memory traffic and call overhead, so the rate of one width does not apply
    to another.

    Attributes:
        measured: FLOPs of a step -> its seconds; at least one entry.
    """

    measured: dict[float, float]

    def seconds_of(self, flops: float) -> float:
        """Estimate the seconds of a step by linear interpolation, or in proportion if only one step was measured."""
        known = sorted(self.measured)
        if len(known) == 1:
            return self.measured[known[0]] * flops / known[0]
        right = min(max(bisect.bisect_left(known, flops), 1), len(known) - 1)
        low, high = known[right - 1], known[right]
        slope = (self.measured[high] - self.measured[low]) / (high - low)
        return self.measured[low] + max(slope, 0.0) * (flops - low)
