"""The denoiser that settings and nnU-Net's topology describe, and the objective of its training (layer 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_diffusion.model.objective import Objective, PGDiffSegObjective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings, topology_of
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg


def build_denoiser(
    settings: DiffusionSettings,
    configuration: Mapping[str, Any],
    num_input_channels: int,
    num_output_channels: int,
) -> PGDiffSeg:
    """Build the denoiser with random weights.

    Args:
        settings: of the configuration.
        configuration: resolved configuration of the plans, whose topology the denoiser takes over.
        num_input_channels: of the image, in the cascade with those of the previous stage.
        num_output_channels: K.

    Raises:
        ValueError: if the settings do not fit the plans' network.
    """
    topology = topology_of(configuration)
    if len(settings.features_per_stage) != len(topology["strides"]):
        raise ValueError(
            f"diffusion.network.features_per_stage has {len(settings.features_per_stage)} entries, the plans' network has "
            f"{len(topology['strides'])} stages: give one width per stage."
        )
    return PGDiffSeg(
        num_input_channels + num_output_channels * settings.condition_on_presegmentation,
        num_output_channels,
        num_output_channels,
        settings.features_per_stage,
        topology["strides"],
        topology["kernel_sizes"],
        topology["conv_op"],
        presence_classes=num_output_channels - (not settings.regions),
        location_classes=num_output_channels - (not settings.regions),
        sdb_depth=settings.sdb_depth,
        attention_tokens=settings.attention_tokens,
        attention_stages=settings.attention_stages or None,
        norm=settings.norm,
        time_in_condition_flow=settings.time_in_condition_flow,
        guidance=settings.guidance,
        attention=settings.attention,
    )


def build_objective(segmenter: DiffusionSegmenter) -> Objective:
    """Return what the training of a segmenter minimises: trainer and planning ask here and know no method."""
    return PGDiffSegObjective(segmenter)
