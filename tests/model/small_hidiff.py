"""HiDiff around small networks."""

import torch
from small_unets import WIDTHS, small_unet
from torch import nn

from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import HIDIFF_DENOISER, DiffusionSettings
from nnunet_diffusion.networks.hidiff import HiDiffRefiner

SETTINGS = DiffusionSettings((4, 4, 8), denoiser="hidiff", starts={"truth": 1}, **HIDIFF_DENOISER)


def networks(settings=SETTINGS, classes=3, **options):
    """Segmentor and refiner."""
    torch.manual_seed(0)
    refiner = HiDiffRefiner(
        1, classes, settings.features_per_stage, [1, 2, 2], [3, 3, 3], nn.Conv2d, guide_channels=WIDTHS, **options
    )
    return small_unet(classes=classes), refiner


def hidiff(settings=SETTINGS, classes=3, **options):
    return DiffusionSegmenter(*networks(settings, classes, **options), settings)
