"""The segmenter as the plans describe it: all that inference has to build it from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg
from nnunet_diffusion.segmenter import DiffusionSegmenter
from nnunet_diffusion.settings import DiffusionSettings, topology_of
from nnunet_diffusion.training.presegmentor import build_presegmentor


def build_segmenter(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    default_presegmentor: str,
) -> DiffusionSegmenter:
    """Build pre-segmentor and denoiser with random weights.

    Args:
        plans_manager: of the plans.
        configuration_manager: of the configuration; its `diffusion` section may be absent or partial.
        num_input_channels: of the image, in the cascade with those of the previous stage.
        num_output_channels: K.
        default_presegmentor: trainer of the pre-segmentor where the settings name none.

    Raises:
        ValueError: if the settings are wrong or do not fit the plans' network.
    """
    settings = DiffusionSettings.from_plans(configuration_manager.configuration)
    presegmentor = build_presegmentor(
        settings.presegmentor_trainer or default_presegmentor,
        plans_manager,
        configuration_manager,
        num_input_channels,
        num_output_channels,
        settings.presegmentor_architecture,
    )
    denoiser = build_denoiser(settings, configuration_manager.configuration, num_input_channels, num_output_channels)
    return DiffusionSegmenter(presegmentor, denoiser, settings)


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
            f"diffusion.features_per_stage has {len(settings.features_per_stage)} entries, the plans' network has "
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
    )
