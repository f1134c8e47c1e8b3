"""Building the segmenter from the plans alone, for training and inference."""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_diffusion.model.build import build_denoiser
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.unet import refuse_other_architectures
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
        plans_manager: manager of the plans.
        configuration_manager: manager of the configuration, whose `diffusion` section may be absent or partial.
        num_input_channels: number of image channels, in the cascade including those of the previous stage.
        num_output_channels: K.
        default_presegmentor: trainer of the pre-segmentor if the settings name none.

    Raises:
        NotImplementedError: the settings need another architecture of nnU-Net.
        ValueError: the settings are not valid or do not fit the plans' network.
    """
    settings = DiffusionSettings.from_plans(configuration_manager.configuration)

    def nnunet(channels: int) -> nn.Module:
        return build_presegmentor(
            settings.presegmentor_trainer or default_presegmentor,
            plans_manager,
            configuration_manager,
            channels,
            num_output_channels,
            settings.presegmentor_architecture,
        )

    presegmentor = nnunet(num_input_channels)
    if settings.uses_features:
        refuse_other_architectures(presegmentor, settings.features_user)
    configuration = configuration_manager.configuration
    denoiser = build_denoiser(settings, configuration, num_input_channels, num_output_channels, nnunet)
    return DiffusionSegmenter(presegmentor, denoiser, settings)
