"""Warning if a training needs more memory than the target of its plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nnunet_diffusion.files import DEFAULT_PLANNER, PLAN_OPTIONS, PLANS_OF, hidiff_plans
from nnunet_diffusion.model.settings import DiffusionSettings, topology_of
from nnunet_diffusion.planning.costs import denoiser_cost
from nnunet_diffusion.planning.record import GB, memory_target_gb

BYTES_PER_CHANNEL, BYTES_PER_HEAD, BYTES_OF_WEIGHTS = 400, 60, GB
"""Upper bounds on bytes per voxel and channel, per voxel and head, and of all weights.

If the memory they give is below the target, the step is not traced."""

OURS = {
    "nnUNetPlannerResEncM": "DiffusionPlannerResEncM",
    "DiffusionPlannerResEncM": "DiffusionPlannerResEncM",
    "nnUNetPlannerResEncL": "DiffusionPlannerResEncL",
    "nnUNetPlannerResEncXL": "DiffusionPlannerResEncL",
    "DiffusionPlannerResEncL": "DiffusionPlannerResEncL",
}
"""Planner of the plans -> planner to plan again with, if it is not the default."""


def memory_warning(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], settings: DiffusionSettings, channels: int, heads: int
) -> str | None:
    """Return a warning with a better planning command if DiffusionTrainer needs more memory than the plans' target.

    Args:
        plans: the complete plans.
        configuration: resolved configuration.
        settings: settings of the denoiser.
        channels: number of image channels, in the cascade including those of the previous stage.
        heads: K.

    Returns:
        None if the training fits, or if the target is not known.
    """
    target = memory_target_gb(plans, configuration)
    batch = int(configuration["batch_size"])
    voxels = batch * math.prod(int(edge) for edge in configuration["patch_size"])
    width = settings.features_per_stage[0]
    if settings.is_hidiff:  # nnU-Net learns too
        width += int(topology_of(configuration)["features_per_stage"][0])
    bound = voxels * (BYTES_PER_CHANNEL * width + BYTES_PER_HEAD * heads) + BYTES_OF_WEIGHTS
    if target is None or bound <= target * GB:
        return None
    needed = denoiser_cost(configuration, settings, channels, heads, batch).total / GB
    if needed <= target:
        return None
    number = int(plans["dataset_name"][7:10])
    planner = OURS.get(plans.get("experiment_planner_used", ""), DEFAULT_PLANNER)
    name = hidiff_plans(PLANS_OF[planner]) if settings.is_hidiff else PLANS_OF[planner]
    return (
        f"WARNING: on a GPU this training needs about {needed:.1f} GB, {needed - target:.1f} GB more than the {target:g} GB "
        f"these plans were made for. Plans in which both networks fit: nnunet_diffusion plan -d {number}"
        f"{PLAN_OPTIONS[name]} -gpu_memory_target {target:g} --preprocess; then train with -p {name}"
    )
