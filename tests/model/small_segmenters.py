"""Segmenters around small networks, some with a known answer, and the terms of one training step."""

import torch
from torch import nn

from nnunet_diffusion.model import labels
from nnunet_diffusion.model.objective import PGDiffSegObjective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

SETTINGS = DiffusionSettings(
    features_per_stage=(8, 8, 16), prediction_type="logits", start_step=300, steps=3, presegmentation_weight=0.0
)


def clean_state(label_map, classes):
    """The state in -1 and 1 of a label map (B, 1, *spatial)."""
    return 2 * labels.labels_to_masks(label_map, classes) - 1


def probabilities_of(state):
    return labels.normalised((state + 1) / 2)


def cross_entropy(logits, target):
    return nn.functional.cross_entropy(logits, target[:, 0].long())


def pgdiffseg(settings=SETTINGS, classes=3, dimension=2):
    return PGDiffSeg(
        1 + classes * settings.condition_on_presegmentation,
        classes,
        classes,
        settings.features_per_stage,
        [1, 2, 2],
        [3, 3, 3],
        nn.Conv2d if dimension == 2 else nn.Conv3d,
        presence_classes=classes - 1,
        location_classes=classes - 1,
        sdb_depth=2,
        attention_tokens=64,
        norm="instance",
        time_in_condition_flow=settings.time_in_condition_flow,
    )


def segmenter(settings=SETTINGS, classes=3, dimension=2):
    torch.manual_seed(0)
    conv = nn.Conv2d if dimension == 2 else nn.Conv3d
    return DiffusionSegmenter(conv(1, classes, 3, padding=1), pgdiffseg(settings, classes, dimension), settings).eval()


class KnownDenoiser(nn.Module):
    """Predicts logits from the noisy state by a given function; counts its calls."""

    def __init__(self, classes, answer):
        super().__init__()
        self.state_channels, self.answer = classes, answer
        self.encoded, self.evaluated = [], []

    def encode(self, image, timestep, features=None):
        self.encoded.append(int(timestep[0]))
        return self

    def repeat_interleave(self, samples):
        return self

    def forward(self, noisy, timestep, condition):
        self.evaluated.append((int(timestep[0]), len(noisy)))
        return self.answer(noisy)


def known(answer, settings=SETTINGS, presegmentor=None):
    return DiffusionSegmenter(presegmentor or nn.Conv2d(1, 3, 1), KnownDenoiser(3, answer), settings).eval()


def terms_of(network, image, target, segmentation_loss=cross_entropy, generator=None):
    """The terms of the objective's only turn."""
    ((name, terms),) = PGDiffSegObjective(network).turns(image, target, segmentation_loss, generator)
    assert name == "denoiser"
    return terms
