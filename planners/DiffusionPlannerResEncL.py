"""`nnunet_diffusion plan -pl DiffusionPlannerResEncL`: nnU-Net's ResEnc L preset, with room for the denoiser."""

from __future__ import annotations

from typing import Any

from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)

from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning


class DiffusionPlannerResEncL(DiffusionPlanning, nnUNetPlannerResEncL):
    """Plans `nnUNetDiffusionResEncUNetLPlans`: ResidualEncoderUNet, 24 GB."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetDiffusionResEncUNetLPlans",
        **keywords: Any,
    ) -> None:
        """Take nnU-Net's arguments, with another default name of the plans."""
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **keywords)
