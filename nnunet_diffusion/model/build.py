"""The denoiser that settings and nnU-Net's topology describe, and the objective of its training (layer 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nnunet_diffusion.model.hidiff_objective import HiDiffObjective
from nnunet_diffusion.model.objective import DenoisingObjective, Objective, PGDiffSegObjective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import HIDIFF, DiffusionSettings, topology_of
from nnunet_diffusion.networks.blocks import per_axis, resolve_conv_op
from nnunet_diffusion.networks.hidiff import HiDiffRefiner
from nnunet_diffusion.networks.noisy_unet import NoisyUNet
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg
from nnunet_diffusion.networks.unet import feature_channels


def build_denoiser(
    settings: DiffusionSettings,
    configuration: Mapping[str, Any],
    num_input_channels: int,
    num_output_channels: int,
    nnunet: Callable[[int], nn.Module],
) -> PGDiffSeg | NoisyUNet | HiDiffRefiner:
    """Build the denoiser with random weights.

    Args:
        settings: of the configuration.
        configuration: resolved configuration of the plans, whose topology the denoiser takes over.
        num_input_channels: of the image, in the cascade with those of the previous stage.
        num_output_channels: K.
        nnunet: builds nnU-Net's network, without deep supervision, for a number of input channels.

    Raises:
        NotImplementedError: if a setting needs another network of nnU-Net than the plans'.
        ValueError: if the settings do not fit the plans' network.
    """
    if settings.denoiser == "nnunet":
        network = nnunet(num_input_channels + num_output_channels)
        deep = settings.prediction_type == "logits"
        return NoisyUNet(network, num_input_channels, num_output_channels, deep_supervision=deep)
    topology = topology_of(configuration)
    if len(settings.features_per_stage) != len(topology["strides"]):
        raise ValueError(
            f"diffusion.network.features_per_stage has {len(settings.features_per_stage)} entries, the plans' network has "
            f"{len(topology['strides'])} stages: give one width per stage."
        )
    if settings.is_hidiff:
        return HiDiffRefiner(
            num_input_channels,
            num_output_channels,
            settings.features_per_stage,
            topology["strides"],
            topology["kernel_sizes"],
            topology["conv_op"],
            guide_channels=_presegmentor_topology(settings, topology)["features_per_stage"],
            image_input=settings.image_input,
            binary=settings.binary,
            attention_tokens=settings.attention_tokens,
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
        feature_channels=(
            feature_channels(_presegmentor_topology(settings, topology)["features_per_stage"])
            if settings.uses_features
            else None
        ),
    )


def _presegmentor_topology(settings: DiffusionSettings, topology: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the topology of the pre-segmentor, whose features a denoiser of `topology` takes.

    Raises:
        NotImplementedError: the pre-segmentor's network has other stages.
    """
    if not settings.presegmentor_architecture:
        return topology
    theirs = topology_of({"architecture": settings.presegmentor_architecture})
    strides = [per_axis("strides", each["strides"], resolve_conv_op(each["conv_op"])) for each in (theirs, topology)]
    if strides[0] != strides[1]:
        raise NotImplementedError(
            f"{settings.features_user} supports a pre-segmentor with the strides of these plans ({topology['strides']}); the "
            f"given one has {theirs['strides']}."
        )
    return theirs


def objective_without_data(segmenter: DiffusionSegmenter) -> Objective:
    """Return the objective of a training whose cost is measured: the pre-segmentor stands in for networks out of fold."""
    objective = build_objective(segmenter)
    if isinstance(objective, DenoisingObjective):
        objective.out_of_fold = lambda image, cases: segmenter.presegment(image).probabilities
    return objective


def build_objective(segmenter: DiffusionSegmenter) -> Objective:
    """Return what the training of a segmenter minimises: trainer and planning ask here and know no method."""
    kinds: dict[str, Callable[[DiffusionSegmenter], Objective]] = {
        "pgdiffseg": PGDiffSegObjective,
        "nnunet": DenoisingObjective,
        HIDIFF: HiDiffObjective,
    }
    return kinds[segmenter.settings.denoiser](segmenter)
