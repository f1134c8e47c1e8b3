"""Prior guidance reaches the output of a briefly trained network if its terms are normalised (PGDiffSeg, Eq. 6)."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunet_diffusion.evaluation.diagnostic import ablations
from nnunet_diffusion.model.objective import PGDiffSegObjective
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks import PGDiffSeg

SIZE = 32


def faint_squares(number, generator):
    """Noise with one brighter square in each image, and the label map: local evidence is weak."""
    image, target = torch.randn(number, 1, SIZE, SIZE, generator=generator), torch.zeros(number, 1, SIZE, SIZE)
    for index in range(number):
        row, column = torch.randint(0, SIZE - 12, (2,), generator=generator)
        edge = int(torch.randint(6, 12, (1,), generator=generator))
        target[index, 0, row : row + edge, column : column + edge] = 1
    return image + 0.8 * target, target


def trained(guidance, steps=100):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    settings = DiffusionSettings(features_per_stage=(8, 16, 32), signal_scale=0.1, guidance=guidance)
    network = PGDiffSeg(
        1, 2, 2, (8, 16, 32), [1, 2, 2], [3, 3, 3], nn.Conv2d, presence_classes=1, location_classes=1,
        attention_tokens=64, guidance=guidance,
    )  # fmt: skip
    segmenter = DiffusionSegmenter(nn.Conv2d(1, 2, 1), network, settings).train()
    objective, optimizer = PGDiffSegObjective(segmenter), torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(steps):
        for _, terms in objective.turns(*faint_squares(8, generator), None, generator):
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
    return segmenter.eval(), generator


def change_without_prior(segmenter, generator, timestep=499):
    """Return the mean change of the lesion's probability where the location map says lesion."""
    image, target = faint_squares(16, generator)
    clean = segmenter.process.to_state(torch.cat((1 - target, target), 1))
    noisy = segmenter.process.add_noise(clean, torch.randn(clean.shape, generator=generator), timestep)

    def estimate():
        condition = segmenter.encode(image, timestep)
        found = segmenter.clean_estimate(noisy[:, None], timestep, condition, 1)[:, 0]
        return segmenter.process.to_probabilities(found)[:, 1], condition

    with torch.no_grad():
        intact, condition = estimate()
        with ablations(segmenter.denoiser)["prior branch"]():
            without, _ = estimate()
    lesion = functional.interpolate(condition.location_logits, size=(SIZE, SIZE))[:, 0] > 0
    assert lesion.sum() > 500
    return (intact - without).abs()[lesion].mean().item()


@pytest.mark.slow
def test_the_normalised_prior_changes_the_estimate_where_it_sees_a_lesion_and_the_papers_does_not():
    assert change_without_prior(*trained("normalised")) > 0.05
    assert change_without_prior(*trained("paper")) < 0.01
