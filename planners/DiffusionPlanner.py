"""`nnunet_diffusion plan -pl DiffusionPlanner`: nnU-Net's default planner, with room for the denoiser."""

from __future__ import annotations

from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning


class DiffusionPlanner(DiffusionPlanning, ExperimentPlanner):
    """Plans `nnUNetDiffusionPlans`: PlainConvUNet, 8 GB."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetDiffusionPlans",
        **keywords: Any,
    ) -> None:
        """Take nnU-Net's arguments, with another default name of the plans."""
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **keywords)
