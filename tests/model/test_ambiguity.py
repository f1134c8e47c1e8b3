"""A denoiser that is trained on one of two raters at a time draws whole masks of either, about as often as the raters do."""

import pytest
import torch
from torch import nn

from nnunet_diffusion.model.objective import PGDiffSegObjective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks import PGDiffSeg

SIZE, SMALL, LARGE = 16, 4 * 4, 12 * 12
SETTINGS = DiffusionSettings(
    features_per_stage=(8, 16), starts={"truth": 1.0}, from_noise=True, start_step=1000, steps=20, sampler="ddpm",
    samples=60, presegmentation_weight=0.0,
)  # fmt: skip


def two_raters(number, generator):
    """A bright square, which one rater outlines and the other takes for the core of a larger one."""
    image, target = torch.randn(number, 1, SIZE, SIZE, generator=generator) * 0.1, torch.zeros(number, 1, SIZE, SIZE)
    image[:, 0, 6:10, 6:10] += 1
    for mask, large in zip(target[:, 0], torch.rand(number, generator=generator) < 0.5, strict=True):
        margin = 2 if large else 6
        mask[margin : SIZE - margin, margin : SIZE - margin] = 1
    return image, target


@pytest.mark.slow
def test_samples_are_masks_of_both_raters_with_their_frequencies():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = PGDiffSeg(
        1, 2, 2, (8, 16), [1, 2], [3, 3], nn.Conv2d, presence_classes=1, location_classes=1, attention_tokens=64
    )
    segmenter = DiffusionSegmenter(nn.Conv2d(1, 2, 1), network, SETTINGS).train()
    objective, optimizer = PGDiffSegObjective(segmenter), torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(300):
        for _, terms in objective.turns(*two_raters(16, generator), None, generator):
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
    states = []
    image, _ = two_raters(1, generator)
    segmenter.eval().sample(image, on_step=lambda timestep, noisy, clean: states.append(clean))
    areas = (states[-1].argmax(1) == 1).flatten(1).sum(1)
    small, large = (abs(areas - area) < 0.2 * area for area in (SMALL, LARGE))
    # whole masks, nothing between them
    assert (small | large).float().mean() > 0.9
    # standard error of 60 draws: 0.065; the rest is what so short a training leaves
    assert 0.25 < large.float().mean() < 0.75
