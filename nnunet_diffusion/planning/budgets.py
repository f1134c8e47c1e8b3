"""What limits a plan: the memory of a GPU, or memory and the time of a training step on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nnunet_diffusion.model.settings import DENOISERS, DiffusionSettings, topology_of
from nnunet_diffusion.planning.costs import Cost, denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.rules import Sized, narrowest_sized, sized
from nnunet_diffusion.planning.timing import (
    FREE_SHARE,
    SPREAD,
    StepTimes,
    Timing,
    machine_name,
    probe_patch,
    time_denoiser,
    time_nnunet,
)

CPU_WIDTHS = (32, 16, 8)
"""Widths of nnU-Net's first stage that planning for a time budget tries, in this order."""
NNUNET_SHARE = 0.5
"""Share of the time budget for nnU-Net's step; a smaller nnU-Net costs more accuracy than a narrower denoiser
(documentation/experiments/cpu_plans.md)."""
CORRECTIONS = 3
"""Largest number of corrections of a plan by measured steps."""
TOLERANCE = 1.25
"""Accepted ratio of a measured step time to its target."""
PROBE_BATCH = {2: 8, 3: 2}
"""Batch of the probe, by number of axes; with fewer small slices, overhead would dominate."""
PROBE_VOXELS = 2**19
"""Largest number of voxels of the probe's batch; a step with more could take minutes."""


class MemoryBudget:
    """Limit of plans for a GPU: its memory, which nnU-Net's planner knows as its target.

    Attributes:
        gpu: True if the networks will train on a GPU, in half precision and with a workspace.
        widths: widths of nnU-Net's first stage to try, in this order; empty for nnU-Net's own.
        seconds: budget of one training step; 0 for none.
        machine: name of the machine on which steps are timed; empty for none.
    """

    gpu = True
    widths: tuple[int, ...] = ()
    seconds: float = 0.0
    machine: str = ""

    def nnunet_batch(self, configuration: Mapping[str, Any], channels: int, heads: int, most: int) -> int:
        """Return the largest batch, at most `most`, that the time of nnU-Net's step allows."""
        return most

    def corrected(self, plan: Callable[[], dict[str, Any]], channels: int, heads: int) -> dict[str, Any]:
        """Return nnU-Net's plan of a configuration.

        Args:
            plan: has nnU-Net plan the configuration by what the budget knows of this machine.
            channels: number of image channels.
            heads: K.
        """
        return plan()

    def nnunet_seconds(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Return the measured seconds of nnU-Net's step; 0 if it was not measured."""
        return 0.0

    def denoiser(
        self,
        configuration: Mapping[str, Any],
        channels: int,
        heads: int,
        regions: bool,
        memory_share: Callable[[Cost], float],
        denoiser: str = DENOISERS[0],
    ) -> tuple[Sized, float]:
        """Return the widest denoiser that fits with the configuration's patch and batch.

        Args:
            configuration: resolved configuration of the plans.
            channels: number of image channels, in the cascade including those of the previous stage.
            heads: K.
            regions: whether the heads are regions.
            memory_share: returns the share of the memory target that a cost takes; at most 1 fits.
            denoiser: which one.

        Returns:
            The denoiser, and the measured seconds of its training step; 0 if not measured.
        """
        found = sized(configuration, channels, heads, regions, lambda cost, _: memory_share(cost), denoiser=denoiser)
        return found, 0.0

    def busy(self) -> str | None:
        """Return the sign that the machine was busy while steps were timed, as part of a sentence; None if it was not."""
        return None


@dataclass
class TimeBudget(MemoryBudget):
    """Limit of plans for a CPU: memory, and the time of one training step, for nnU-Net and DiffusionTrainer each.

    FLOP/s of a width are measured on a small patch. nnU-Net's are then corrected with a step at the plan's own patch.

    Attributes:
        seconds: budget of one training step.
        device: device on which steps are timed.
        machine: name of the machine, for the plans.
        rates: measured FLOP/s, by network, axes and width at the first stage.
        steps: measured seconds of nnU-Net's steps, by patch, batch and FLOPs.
        timings: all measured timings.
        flops_per_voxel: FLOPs of nnU-Net's step per voxel, by topology.
    """

    seconds: float
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine: str = field(default_factory=machine_name)
    rates: dict[tuple[str, int, int], float] = field(default_factory=dict)
    steps: dict[tuple[tuple[int, ...], int, float], float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    flops_per_voxel: dict[str, float] = field(default_factory=dict)
    gpu = False
    widths = CPU_WIDTHS

    def __post_init__(self) -> None:
        """Check the budget."""
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"-step_seconds is {self.seconds}, but must be a positive number.")

    def nnunet_batch(self, configuration: Mapping[str, Any], channels: int, heads: int, most: int) -> int:
        """Return the largest batch, at most `most`, whose nnU-Net step takes its share of the budget; 0 if none does."""
        rate = self.nnunet_rate(configuration, channels, heads)
        return min(
            most, math.floor(NNUNET_SHARE * self.seconds * rate / self._nnunet_flops(configuration, channels, heads))
        )

    def _nnunet_flops(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Return the FLOPs of nnU-Net's step per patch; for one topology they are proportional to the voxels."""
        voxels, topology = math.prod(configuration["patch_size"]), str(configuration["architecture"]["arch_kwargs"])
        if topology not in self.flops_per_voxel:
            cost = nnunet_cost(configuration, channels, heads, 2, amp=False, gpu=False)
            self.flops_per_voxel[topology] = cost.flops / 2 / voxels
        return self.flops_per_voxel[topology] * voxels

    def corrected(self, plan: Callable[[], dict[str, Any]], channels: int, heads: int) -> dict[str, Any]:
        """Time nnU-Net's step of its plan and have it planned again, until the step takes about its share of the budget."""
        share, before, found = NNUNET_SHARE * self.seconds, None, {}
        for _ in range(CORRECTIONS):
            found = plan()
            sizes = tuple(found["patch_size"]), found["batch_size"]
            if sizes == before:
                break
            before = sizes
            if share / TOLERANCE < self.correct_nnunet(found, channels, heads) < share * TOLERANCE:
                break
        return found

    def denoiser(
        self,
        configuration: Mapping[str, Any],
        channels: int,
        heads: int,
        regions: bool,
        memory_share: Callable[[Cost], float],
        denoiser: str = DENOISERS[0],
    ) -> tuple[Sized, float]:
        """Return the largest measured denoiser whose step keeps the budget (else the smallest), and its seconds."""
        smallest = narrowest_sized(configuration, channels, heads, regions, gpu=False, denoiser=denoiser)
        seconds = self.denoiser_step(configuration, smallest.settings, channels, heads)
        times, measured = StepTimes({smallest.cost.flops: seconds}), [(smallest, seconds)]

        def need(cost: Cost, settings: DiffusionSettings) -> float:
            in_time = 0.0 if settings == smallest.settings else times.seconds_of(cost.flops) / self.seconds
            return max(memory_share(cost), in_time)

        for _ in range(CORRECTIONS if seconds < self.seconds else 0):
            found = sized(configuration, channels, heads, regions, need, gpu=False, denoiser=denoiser)
            if found.cost.flops in times.measured:
                break
            seconds = self.denoiser_step(configuration, found.settings, channels, heads)
            times.measured[found.cost.flops] = seconds
            if seconds < TOLERANCE * self.seconds and found.cost.flops > measured[-1][0].cost.flops:
                measured.append((found, seconds))
            if self.seconds / TOLERANCE < seconds < self.seconds * TOLERANCE:
                break
        return measured[-1]

    def nnunet_rate(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Return the FLOP/s of nnU-Net's step at the configuration's widths."""
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
        """Return the FLOP/s of DiffusionTrainer's step at the settings' widths."""
        key = _key(f"{settings.denoiser} {settings.sdb_depth}", configuration, settings.features_per_stage)
        if key not in self.rates:
            small, batch = _small(configuration)
            flops = denoiser_cost(small, settings, channels, heads, batch, amp=False, gpu=False).flops
            timing = time_denoiser(small, settings, channels, heads, batch, small["patch_size"], self.device)
            self.rates[key] = flops / self._keep(timing)
        return self.rates[key]

    def correct_nnunet(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Time nnU-Net's step at the configuration's own patch and batch, update its FLOP/s and return its seconds."""
        key = self._step(configuration, channels, heads)
        patch, batch, flops = key
        # nnU-Net's search for a low resolution tries the same networks repeatedly
        if key not in self.steps:
            self.steps[key] = self._keep(time_nnunet(configuration, channels, heads, batch, patch, self.device))
        seconds = self.steps[key]
        self.rates[_key("nnunet", configuration, topology_of(configuration)["features_per_stage"])] = flops / seconds
        return seconds

    def nnunet_seconds(self, configuration: Mapping[str, Any], channels: int, heads: int) -> float:
        """Return the measured seconds of nnU-Net's step at the configuration's own patch and batch; 0 if not measured."""
        return self.steps.get(self._step(configuration, channels, heads), 0.0)

    @staticmethod
    def _step(configuration: Mapping[str, Any], channels: int, heads: int) -> tuple[tuple[int, ...], int, float]:
        batch, patch = int(configuration["batch_size"]), tuple(configuration["patch_size"])
        return patch, batch, nnunet_cost(configuration, channels, heads, batch, amp=False, gpu=False).flops

    def denoiser_step(
        self, configuration: Mapping[str, Any], settings: DiffusionSettings, channels: int, heads: int
    ) -> float:
        """Time DiffusionTrainer's step at the configuration's own patch and batch and return its seconds."""
        batch, patch = int(configuration["batch_size"]), configuration["patch_size"]
        return self._keep(time_denoiser(configuration, settings, channels, heads, batch, patch, self.device))

    def _keep(self, timing: Timing) -> float:
        self.timings.append(timing)
        return timing.seconds

    def busy(self) -> str | None:
        """Return the sign that the machine was busy during timing, as part of a sentence; None if it was quiet."""
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
