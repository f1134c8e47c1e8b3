"""Extension of nnU-Net's planners: memory for the denoiser's training step, and its settings in the plans."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.model.settings import DENOISERS, PLANS_KEY
from nnunet_diffusion.planning.budgets import MemoryBudget
from nnunet_diffusion.planning.costs import Cost, denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.data_reuse import shared_identifier
from nnunet_diffusion.planning.record import GB, RECORD_KEY, PlanRecord
from nnunet_diffusion.planning.rules import Sized, narrowest

STOCK_FEATURES = 32
CPU_BATCH = {2: 8, 3: 2}
"""Smallest batch, by dimension; planning for a time budget narrows the network before it reduces the batch further."""
CPU_PATCH_VOXELS = {2: 64**2, 3: 32**3}
"""Smallest patch (voxels) that planning for a time budget may choose, by dimension. If a step still takes longer, the plan
is kept and a note is printed."""


class TargetTooSmall(ValueError):
    """No patch fits. The message gives the smallest memory target that works."""


class _TooSlow(Exception):
    """At this width a step with nnU-Net's own patch exceeds the time budget."""


@dataclass(frozen=True)
class Candidate:
    """A patch that nnU-Net's loop tried.

    Attributes:
        configuration: configuration with this patch.
        channels: number of input channels of the network.
        stock_gb: memory target in GB at which nnU-Net's own estimate accepts the patch.
    """

    configuration: Mapping[str, Any]
    channels: int
    stock_gb: float


def _patch_key(patch: Sequence[int], arch_kwargs: Mapping[str, Any]) -> tuple[str, str]:
    return str([int(edge) for edge in patch]), str([[int(step) for step in stage] for stage in arch_kwargs["strides"]])


class DiffusionPlanning(ExperimentPlanner):
    """Mixin for one of nnU-Net's planners, to be placed before it among the bases; it leaves all other decisions to it.

    Patch and batch are nnU-Net's own at the same memory target, unless its network or the narrowest denoiser needs more
    memory than the target by the estimate in `costs`. In that case the batch is reduced. If not even the smallest batch
    fits, nnU-Net's loop reduces the patch. The denoiser is as wide as fits with this patch and batch (`rules`).

    Attributes:
        budget: what limits the plans beside the memory target.
        sized: configuration -> chosen denoiser, after `plan_experiment`.
        candidates: number of axes -> patches that nnU-Net's loop tried.
    """

    UNet_base_num_features: int

    def __init__(
        self, *arguments: Any, budget: MemoryBudget | None = None, denoiser: str = DENOISERS[0], **keywords: Any
    ) -> None:
        """Take nnU-Net's arguments, a budget (without, memory alone is limited) and the denoiser to plan for."""
        super().__init__(*arguments, **keywords)
        self.budget, self.denoiser = budget or MemoryBudget(), denoiser
        self.sized: dict[str, Sized] = {}
        self.candidates: dict[int, list[Candidate]] = {2: [], 3: []}
        self._stock_alone, self._keep_patch, self._voxels = False, False, dict[str, float]()
        self._stock_estimates: dict[tuple[str, str], float] = {}
        self._dataset_voxels, self._previous_channels = 0.0, 0
        self._median_shape: Sequence[float] = ()
        self._fitting: dict[tuple[int, tuple[str, str]], int] = {}
        labels = LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))
        self.heads, self.regions = labels.num_segmentation_heads, labels.has_regions
        self.previous_stage_channels = len(labels.foreground_labels)

    # the patch and batch -----------------------------------------------------------------------------------------------

    def static_estimate_VRAM_usage(  # nnU-Net's is static, but called through self
        self,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: Mapping[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> float:
        """Return nnU-Net's own estimate if the smallest batch also fits by the estimate in `costs`, else infinity.

        nnU-Net's loop reduces the patch while the estimate is too large. The largest batch that fits is stored for
        `get_plans_for_configuration`.

        Raises:
            TargetTooSmall: the patch has become too small for a network.
            ValueError: the images are too small for a network.
        """
        axes, patch = len(patch_size), tuple(int(edge) for edge in patch_size)
        if int(arch_kwargs["n_stages"]) < 2 or min(patch) < 1:
            raise self._target_too_small(axes, patch)
        key = str(patch), str(arch_kwargs)
        if key not in self._stock_estimates:
            self._stock_estimates[key] = super().static_estimate_VRAM_usage(
                patch_size, input_channels, output_channels, arch_class_name, arch_kwargs, arch_kwargs_req_import
            )
        # rescale to the stock width, so that a narrower network does not get a larger patch
        stock = self._stock_estimates[key] * STOCK_FEATURES / self.UNet_base_num_features
        configuration = {
            "architecture": {
                "network_class_name": arch_class_name,
                "arch_kwargs": dict(arch_kwargs),
                "_kw_requires_import": tuple(arch_kwargs_req_import),
            },
            "patch_size": patch,
            "batch_size": self.UNet_min_batch_size,
        }
        channels, target = input_channels + self._previous_channels, self.UNet_vram_target_GB
        stock_gb = stock / self._leeway(axes) / self._reference(axes) * target
        self.candidates[axes].append(Candidate(configuration, channels, stock_gb))
        if self._stock_alone or stock > self._reference(axes) * self._leeway(axes):
            return stock
        most = min(round(self._reference(axes) / stock * self._reference_batch(axes)), self._dataset_batch(patch))
        most = max(self.UNet_min_batch_size, most)
        most = self._batch_in_time(configuration, input_channels, most)
        if most < self.UNet_min_batch_size:
            return math.inf
        fitting = self._largest_batch(configuration, channels, most)
        self._fitting[self._previous_channels, _patch_key(patch, arch_kwargs)] = fitting
        return stock if fitting >= self.UNet_min_batch_size else math.inf

    def _dataset_batch(self, patch: Sequence[int]) -> int:
        """Return the batch that covers the largest share of the dataset that nnU-Net allows."""
        return round(self._dataset_voxels * self.max_dataset_covered / math.prod(patch))

    def _batch_in_time(self, configuration: Mapping[str, Any], channels: int, most: int) -> int:
        """Return the batch, at most `most`, for which nnU-Net's step is fast enough; 0 if the patch is too large.

        Raises:
            _TooSlow: no batch keeps it, and the width is to be reduced before the patch.
        """
        axes, fitting = (
            len(configuration["patch_size"]),
            self.budget.nnunet_batch(configuration, channels, self.heads, most),
        )
        fewest = min(CPU_BATCH[axes], most) if self._keep_patch else self.UNet_min_batch_size
        if fitting >= fewest:
            return fitting
        if self._keep_patch:
            raise _TooSlow
        patch = configuration["patch_size"]  # an axis of one voxel cannot shrink, but nnU-Net's loop would try
        return 0 if self._next_voxels(configuration) >= CPU_PATCH_VOXELS[axes] and min(patch) > 1 else fewest

    def _next_voxels(self, configuration: Mapping[str, Any]) -> int:
        """Return the voxels of the next patch of nnU-Net's loop, or slightly fewer if its step is smaller."""
        patch = [int(edge) for edge in configuration["patch_size"]]
        axis = int(np.argsort([edge / of for edge, of in zip(patch, self._median_shape, strict=False)])[-1])
        patch[axis] -= math.prod(stage[axis] for stage in configuration["architecture"]["arch_kwargs"]["strides"])
        return math.prod(patch)

    def _costs(self, configuration: Mapping[str, Any], channels: int) -> tuple[Callable[[int], Cost], ...]:
        """Return two functions of the batch: the costs of nnU-Net's and of the narrowest denoiser's training step."""
        gpu, (narrow, _) = self.budget.gpu, narrowest(configuration, channels, self.heads, self.regions, self.denoiser)
        return (
            lambda batch: nnunet_cost(configuration, channels, self.heads, batch, amp=gpu, gpu=gpu),
            lambda batch: denoiser_cost(configuration, narrow, channels, self.heads, batch, amp=gpu, gpu=gpu),
        )

    def _largest_batch(self, configuration: Mapping[str, Any], channels: int, most: int) -> int:
        """Return the largest batch, at most `most`, with which both networks fit into memory; 0 if none fits."""
        for cost_at in self._costs(configuration, channels):
            most = self._fitting_batch(cost_at, most)
            if most == 0:
                break
        return most

    def _fitting_batch(self, cost_at: Callable[[int], Cost], most: int) -> int:
        """As `_largest_batch`, for one network."""
        limit, low, high = self.UNet_vram_target_GB * GB, self.UNet_min_batch_size, most
        if (above := cost_at(high).total) <= limit:
            return high
        if (below := cost_at(low).total) > limit:
            return 0
        # memory is a convex function of the batch. Chords lie above it, so the batch at which a chord meets the limit fits
        while high - low > 1:
            guess = low + math.floor((limit - below) * (high - low) / (above - below))
            guess = min(max(guess, low + 1), high - 1)
            if (need := cost_at(guess).total) <= limit:
                low, below = guess, need
            else:
                high, above = guess, need
        return low

    def _reference(self, axes: int) -> float:
        value = self.UNet_reference_val_2d if axes == 2 else self.UNet_reference_val_3d
        return value * self.UNet_vram_target_GB / self.UNet_reference_val_corresp_GB

    def _reference_batch(self, axes: int) -> int:
        return self.UNet_reference_val_corresp_bs_2d if axes == 2 else self.UNet_reference_val_corresp_bs_3d

    def _leeway(self, axes: int) -> float:
        """Return by which factor nnU-Net's estimate may exceed its reference; the plain planner needs a batch of two to fit."""
        return 1.0 if isinstance(self, ResEncUNetPlanner) else self._reference_batch(axes) / 2

    def _target_too_small(self, axes: int, patch: tuple[int, ...]) -> ValueError:
        """Return the error for the case that nnU-Net's loop finds no patch."""
        tried = sorted(self.candidates[axes], key=lambda candidate: candidate.stock_gb)
        if not tried:
            return ValueError(
                f"The images are too small for a network of two stages: the patch would be {list(patch)} voxels. Enlarge "
                "them, or plan for a finer spacing (-overwrite_target_spacing)."
            )
        least, needed = tried[0], math.inf
        for candidate in tried:
            if candidate.stock_gb >= needed:
                break
            costs = self._costs(candidate.configuration, candidate.channels)
            exact = max(candidate.stock_gb, *(cost(self.UNet_min_batch_size).total / GB for cost in costs))
            if exact < needed:
                least, needed = candidate, exact
        return TargetTooSmall(
            f"-gpu_memory_target {self.UNet_vram_target_GB:g} is too small for any {axes}D patch: the smallest, "
            f"{list(least.configuration['patch_size'])}, needs {math.ceil(needed * 100) / 100:g} GB."
        )

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict[str, Any]:
        """Return nnU-Net's plan of a configuration; with a time budget, for the widest network whose step keeps it.

        If a step takes too long, the batch is reduced to `CPU_BATCH`, then nnU-Net's width, then the batch further, then the
        patch.
        """
        arguments = (spacing, median_shape, data_identifier, approximate_n_voxels_dataset)
        self._voxels[data_identifier] = self._dataset_voxels = approximate_n_voxels_dataset
        self._median_shape = median_shape
        plan = self._plan(*arguments)
        covered = math.prod(plan["patch_size"]) / math.prod(float(edge) for edge in median_shape)
        if data_identifier == self.generate_data_identifier("3d_fullres") and covered < self.lowres_creation_threshold:
            # nnU-Net will add a cascade, whose networks also take the previous stage as input
            self._previous_channels = self.previous_stage_channels
            try:
                plan = self._plan(*arguments)
            finally:
                self._previous_channels = 0
        return plan

    def _plan(self, *arguments: Any) -> dict[str, Any]:
        widths = self.budget.widths or (self.UNet_base_num_features,)
        for features in widths:
            self.UNet_base_num_features, self._keep_patch = features, features != widths[-1]
            with contextlib.suppress(_TooSlow):
                return self.budget.corrected(lambda: self._with_fitting_batch(arguments), self.channels, self.heads)
        raise AssertionError("the narrowest network gives up no patch")

    def _with_fitting_batch(self, arguments: Sequence[Any]) -> dict[str, Any]:
        # without nnU-Net's cache: what fits also depends on the size of the dataset
        plan = super().get_plans_for_configuration(*arguments, {})
        key = self._previous_channels, _patch_key(plan["patch_size"], plan["architecture"]["arch_kwargs"])
        fitting = self._fitting[key]
        return {**plan, "batch_size": min(int(plan["batch_size"]), fitting)}

    def _stock_plan(self, *arguments: Any) -> dict[str, Any]:
        """Return the plan that nnU-Net's own rules choose at the same target."""
        features, self.UNet_base_num_features, self._stock_alone = self.UNet_base_num_features, STOCK_FEATURES, True
        try:
            return super().get_plans_for_configuration(*arguments, {})
        finally:
            self.UNet_base_num_features, self._stock_alone = features, False

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.dataset_json.get("channel_names", self.dataset_json.get("modality")))

    # the plans ---------------------------------------------------------------------------------------------------------

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Add the denoiser's settings and the identifier of the data to each configuration, then save as nnU-Net.

        Raises:
            ValueError: the folder of the preprocessed data holds data from different preprocessing.
        """
        for name, configuration in plans["configurations"].items():
            if "inherits_from" not in configuration:
                self._add_denoiser(name, configuration, cascaded=self._next_stage_of(plans, name))
                configuration["data_identifier"] = shared_identifier(self.dataset_name, plans, name)
        super().save_plans(plans)

    @staticmethod
    def _next_stage_of(plans: Mapping[str, Any], name: str) -> bool:
        return any(other.get("inherits_from") == name for other in plans["configurations"].values())

    def _memory_share(self, cost: Cost) -> float:
        return cost.total / (self.UNet_vram_target_GB * GB)

    def _add_denoiser(self, name: str, configuration: dict[str, Any], cascaded: bool) -> None:
        channels = self.channels + self.previous_stage_channels * cascaded  # the cascade uses the same widths
        gpu, size = self.budget.gpu, (channels, self.heads)
        found, seconds = self.budget.denoiser(configuration, *size, self.regions, self._memory_share, self.denoiser)
        nnunet_seconds = self.budget.nnunet_seconds(configuration, self.channels, self.heads)
        self.sized[name] = found
        batch = int(configuration["batch_size"])
        stock = self._stock_plan(
            configuration["spacing"],
            configuration["median_image_size_in_voxels"],
            "",
            self._voxels[configuration["data_identifier"]],
        )
        configuration[PLANS_KEY] = found.settings.to_plans()

        def gigabytes(cost: Cost) -> float:
            return round(cost.total / GB, 3)

        configuration[RECORD_KEY] = PlanRecord(
            planner=type(self).__name__,
            memory_target_gb=float(self.UNet_vram_target_GB),
            step_seconds=self.budget.seconds,
            machine=self.budget.machine,
            nnunet_step_seconds=round(nnunet_seconds, 3),
            denoiser_step_seconds=round(seconds, 3),
            nnunet_gb=gigabytes(nnunet_cost(configuration, *size, batch, amp=gpu, gpu=gpu)),
            denoiser_gb=gigabytes(found.cost),
            nnunet_fp32_gb=gigabytes(nnunet_cost(configuration, *size, batch, amp=False, gpu=gpu)),
            denoiser_fp32_gb=gigabytes(denoiser_cost(configuration, found.settings, *size, batch, amp=False, gpu=gpu)),
            stock_patch_size=tuple(int(edge) for edge in stock["patch_size"]),
            stock_batch_size=int(stock["batch_size"]),
        ).to_plans()
