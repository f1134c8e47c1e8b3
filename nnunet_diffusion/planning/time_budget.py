"""Seconds of a training step, measured on this machine with random patches, and plans that keep within a budget."""

from __future__ import annotations

import bisect
import math
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnunet_diffusion.denoiser import build_denoiser
from nnunet_diffusion.planning.costs import denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.steps import Step, build_nnunet, diffusion_step, nnunet_step
from nnunet_diffusion.segmenter import DiffusionSegmenter
from nnunet_diffusion.settings import DiffusionSettings, topology_of

REPEATS = 3
PROBE_EDGE = {2: 96, 3: 32}
"""By number of axes, the longest edge, in voxels, of the patch on which a width's speed is first measured."""
PROBE_BATCH = {2: 8, 3: 2}
"""The batch of that; fewer small slices would measure overhead."""
PROBE_VOXELS = 2**19
"""The batch is smaller where a patch with all stages is so large that more voxels would take minutes."""


def nnunet_seconds(
    configuration: Mapping[str, Any], channels: int, heads: int, batch: int, patch: Sequence[int], device: torch.device
) -> float:
    """Return the fastest seconds of nnU-Net's training step; `patch` may be smaller than the configuration's."""
    network = build_nnunet(configuration, channels, heads).train().to(device)
    # regions are timed as classes
    return _seconds(nnunet_step(network, *_random_batch(batch, channels, heads, patch, device, False)), device)


def denoiser_seconds(
    configuration: Mapping[str, Any],
    settings: DiffusionSettings,
    channels: int,
    heads: int,
    batch: int,
    patch: Sequence[int],
    device: torch.device,
) -> float:
    """Return the fastest seconds of DiffusionTrainer's training step; `patch` may be smaller than the configuration's."""
    denoiser = build_denoiser(settings, configuration, channels, heads)
    segmenter = DiffusionSegmenter(build_nnunet(configuration, channels, heads), denoiser, settings).to(device)
    data = _random_batch(batch, channels, heads, patch, device, settings.regions)
    return _seconds(diffusion_step(segmenter, *data), device)


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


def _seconds(step: Step, device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    times = []
    for _ in range(REPEATS):
        synchronize()
        begin = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - begin)
    # the fastest, as timeit advises: whatever else runs on the machine only ever adds
    return min(times)


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
    """

    seconds: float
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine: str = field(default_factory=machine_name)
    rates: dict[tuple[str, int, int], float] = field(default_factory=dict)
    steps: dict[tuple[tuple[int, ...], int, float], float] = field(default_factory=dict)

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
            seconds = nnunet_seconds(small, channels, heads, batch, small["patch_size"], self.device)
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
            seconds = denoiser_seconds(small, settings, channels, heads, batch, small["patch_size"], self.device)
            self.rates[key] = flops / seconds
        return self.rates[key]

    def correct_nnunet(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Measure the step of nnU-Net at the configuration's own patch and batch, keep its FLOP/s, return its seconds."""
        batch, patch = int(configuration["batch_size"]), tuple(configuration["patch_size"])
        flops = nnunet_cost(configuration, channels, heads, batch, amp=False, gpu=False).flops
        # nnU-Net's search for a low resolution asks for the same networks again and again
        if (patch, batch, flops) not in self.steps:
            seconds = nnunet_seconds(configuration, channels, heads, batch, patch, self.device)
            self.steps[patch, batch, flops] = seconds
        seconds = self.steps[patch, batch, flops]
        self.rates[_key("nnunet", configuration, topology_of(configuration)["features_per_stage"])] = flops / seconds
        return seconds

    def denoiser_step(
        self, configuration: Mapping[str, Any], settings: DiffusionSettings, channels: int, heads: int
    ) -> float:
        """Measure DiffusionTrainer's step at the configuration's own patch and batch: seconds."""
        batch, patch = int(configuration["batch_size"]), configuration["patch_size"]
        return denoiser_seconds(configuration, settings, channels, heads, batch, patch, self.device)


def _key(network: str, configuration: Mapping[str, Any], features: Sequence[int]) -> tuple[str, int, int]:
    return network, len(configuration["patch_size"]), int(features[0])


def _small(configuration: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    patch = probe_patch(configuration["patch_size"], topology_of(configuration)["strides"])
    batch = max(1, min(PROBE_BATCH[len(patch)], PROBE_VOXELS // math.prod(patch)))
    return {**configuration, "patch_size": patch}, batch
