"""Seconds of a training step, measured on this machine with random patches, and plans that keep within a budget."""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnunet_diffusion.model.build import build_denoiser
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings, topology_of
from nnunet_diffusion.planning.costs import denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.steps import Step, build_nnunet, diffusion_step, nnunet_step

REPEATS = range(3, 11)  # of a timed step, as many of these as `TIMED_SECONDS` takes
TIMED_SECONDS = 0.5
LOAD_SECONDS = 0.05  # of one look at how busy the machine is
LOAD_BYTES = bytes(2**20)
FREE_SHARE = 0.8  # of the processor time: with less for this process the machine is called busy
SPREAD = 1.25  # median over fastest time of the same step: with more the machine is called busy
LEAST_SHARE = 0.25  # less is not corrected for: it may be the limit of a container, which training has too
PROBE_EDGE = {2: 96, 3: 32}
"""By number of axes, the longest edge, in voxels, of the patch on which a width's speed is first measured."""
PROBE_BATCH = {2: 8, 3: 2}
"""The batch of that; fewer small slices would measure overhead."""
PROBE_VOXELS = 2**19
"""The batch is smaller where a patch with all stages is so large that more voxels would take minutes."""


@dataclass(frozen=True)
class Timing:
    """A step that was timed a few times.

    Attributes:
        seconds: estimate of what it takes on a quiet machine.
        spread: the median of the times over the fastest.
        share: of the processor time that this process asked for between the repeats, what it got; 1 on a quiet machine.
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
    denoiser = build_denoiser(settings, configuration, channels, heads)
    segmenter = DiffusionSegmenter(build_nnunet(configuration, channels, heads), denoiser, settings).to(device)
    data = _random_batch(batch, channels, heads, patch, device, settings.regions)
    return _timed(diffusion_step(segmenter, *data), device)


def probe_patch(patch: Sequence[int], strides: Sequence[Sequence[int] | int]) -> tuple[int, ...]:
    """Return a patch no larger than `patch` that a step can be timed on quickly: edges of about `PROBE_EDGE` at most.

    An edge stays a multiple of all of the axis's strides, so that every stage remains; and the deepest keeps two voxels,
    which a normalisation needs.
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
    """Processor and number of cores, for a plan that depends on them."""
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
    # the least, as timeit advises: whatever else runs on the machine only ever adds
    return Timing(min(map(quiet_seconds, walls, processor, shares, shares[1:])), spread, statistics.median(shares))


def quiet_seconds(wall: float, processor: float, before: float, after: float) -> float:
    """Estimate the seconds of a step on a quiet machine.

    Args:
        wall: seconds it took.
        processor: seconds that each of its threads had a processor; the estimate is no less.
        before: share of the processors that was free for this process before the step (`free_share`).
        after: the same after it.
    """
    return max(processor, wall * max((before + after) / 2, LEAST_SHARE))


def free_share(threads: int) -> float:
    """Return the share of `threads` processors that this process gets when it asks for all of their time: up to 1.

    The processor seconds of the training step itself do not tell: even on a quiet machine they are 0.6 to 1 of all, depending
    on whether threads that wait for each other spin (OMP_WAIT_POLICY).
    """

    def keep_busy(_: int) -> None:
        while time.perf_counter() < end:
            hashlib.sha256(LOAD_BYTES)  # releases the interpreter's lock

    with ThreadPoolExecutor(threads) as pool:
        begin, used = time.perf_counter(), time.process_time()
        end = begin + LOAD_SECONDS
        list(pool.map(keep_busy, range(threads)))
        share = (time.process_time() - used) / (time.perf_counter() - begin) / threads
    return min(share, 1.0)


@dataclass
class StepTimes:
    """Seconds of a training step against its FLOPs, at one patch and batch: lines through the measured steps.

    Small networks take as long for fewer FLOPs (memory traffic and calls), so a rate of FLOP/s does not carry from one
    width to another.

    Attributes:
        measured: FLOPs of a step -> its seconds; at least one.
    """

    measured: dict[float, float]

    def seconds_of(self, flops: float) -> float:
        """Estimate the seconds of a step of `flops`: in proportion to a single measured one, else on the nearest line."""
        known = sorted(self.measured)
        if len(known) == 1:
            return self.measured[known[0]] * flops / known[0]
        right = min(max(bisect.bisect_left(known, flops), 1), len(known) - 1)
        low, high = known[right - 1], known[right]
        slope = (self.measured[high] - self.measured[low]) / (high - low)
        return self.measured[low] + max(slope, 0.0) * (flops - low)


@dataclass
class TimeBudget:
    """Seconds that one training step may take on this machine, nnU-Net's and DiffusionTrainer's each.

    A width's FLOP/s are measured on a small patch, nnU-Net's then corrected by the step of the plan itself.

    Attributes:
        seconds: of one training step.
        device: on which it is measured.
        machine: its name, for the plans.
        rates: measured FLOP/s, by network, axes and width at the first stage.
        steps: measured seconds of nnU-Net's steps, by patch, batch and FLOPs.
        timings: all that was measured.
    """

    seconds: float
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine: str = field(default_factory=machine_name)
    rates: dict[tuple[str, int, int], float] = field(default_factory=dict)
    steps: dict[tuple[tuple[int, ...], int, float], float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the budget."""
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"-step_seconds is {self.seconds}, but must be a positive number.")

    def nnunet_rate(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """FLOP/s of nnU-Net's step at the configuration's widths."""
        key = _key("nnunet", configuration, topology_of(configuration)["features_per_stage"])
        if key not in self.rates:
            small, batch = _small(configuration)
            flops = nnunet_cost(small, channels, heads, batch, amp=False, gpu=False).flops
            seconds = self._keep(time_nnunet(small, channels, heads, batch, small["patch_size"], self.device))
            self.rates[key] = flops / seconds
        return self.rates[key]

    def denoiser_rate(
        self, configuration: Mapping[str, Any], settings: DiffusionSettings, channels: int, heads: int
    ) -> float:
        """FLOP/s of DiffusionTrainer's step at the settings' widths."""
        key = _key(f"denoiser {settings.sdb_depth}", configuration, settings.features_per_stage)
        if key not in self.rates:
            small, batch = _small(configuration)
            flops = denoiser_cost(small, settings, channels, heads, batch, amp=False, gpu=False).flops
            timing = time_denoiser(small, settings, channels, heads, batch, small["patch_size"], self.device)
            self.rates[key] = flops / self._keep(timing)
        return self.rates[key]

    def correct_nnunet(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Measure the step of nnU-Net at the configuration's own patch and batch, keep its FLOP/s, return its seconds."""
        batch, patch = int(configuration["batch_size"]), tuple(configuration["patch_size"])
        flops = nnunet_cost(configuration, channels, heads, batch, amp=False, gpu=False).flops
        # nnU-Net's search for a low resolution asks for the same networks again and again
        if (patch, batch, flops) not in self.steps:
            timing = time_nnunet(configuration, channels, heads, batch, patch, self.device)
            self.steps[patch, batch, flops] = self._keep(timing)
        seconds = self.steps[patch, batch, flops]
        self.rates[_key("nnunet", configuration, topology_of(configuration)["features_per_stage"])] = flops / seconds
        return seconds

    def denoiser_step(
        self, configuration: Mapping[str, Any], settings: DiffusionSettings, channels: int, heads: int
    ) -> float:
        """Measure DiffusionTrainer's step at the configuration's own patch and batch: seconds."""
        batch, patch = int(configuration["batch_size"]), configuration["patch_size"]
        return self._keep(time_denoiser(configuration, settings, channels, heads, batch, patch, self.device))

    def _keep(self, timing: Timing) -> float:
        self.timings.append(timing)
        return timing.seconds

    def busy(self) -> str | None:
        """Return what tells that the machine was busy while steps were timed, as part of a sentence; None if it was quiet."""
        if not self.timings:
            return None
        share = statistics.median(timing.share for timing in self.timings)
        spread = statistics.median(timing.spread for timing in self.timings)
        if share < FREE_SHARE:
            return f"this process got only {share:.0%} of the processor time it asked for"
        if spread > SPREAD:
            return f"the same step often took {spread:.1f} times as long as at best"
        return None


def _key(network: str, configuration: Mapping[str, Any], features: Sequence[int]) -> tuple[str, int, int]:
    return network, len(configuration["patch_size"]), int(features[0])


def _small(configuration: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    patch = probe_patch(configuration["patch_size"], topology_of(configuration)["strides"])
    batch = max(1, min(PROBE_BATCH[len(patch)], PROBE_VOXELS // math.prod(patch)))
    return {**configuration, "patch_size": patch}, batch
