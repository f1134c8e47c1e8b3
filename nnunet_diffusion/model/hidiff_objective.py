"""What HiDiff's training minimises (Chen et al. 2024): refiner and segmentor learn in turns, each with the other's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_diffusion.diffusion.bernoulli import LEAST, BernoulliProcess
from nnunet_diffusion.diffusion.predictions import Flip
from nnunet_diffusion.model import labels, losses
from nnunet_diffusion.model.objective import (
    SegmentationLoss,
    Turn,
    deeply_supervised,
    generator_for,
    on_this_rank,
    timestep_and_noise,
)
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.networks import unet

FOCUS = 2.0
"""gamma of the focal loss (Lin et al. 2017), the published setting."""

AT_THE_BEGINNING = 0.5
"""Share of the training samples that have the last timestep, where every reverse process begins, beside the uniform ones."""


def evaluate_refiner(
    refiner: nn.Module, noisy: Tensor, image: Tensor, timestep: Tensor, features: tuple[Tensor, ...]
) -> Tensor:
    """One evaluation that touches every parameter: what is added to the logit of a flip; `image` has p beside it."""
    return refiner(noisy, timestep, refiner.encode(image, timestep, features))  # type: ignore[operator]


def evaluate_segmentor(segmentor: nn.Module, image: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One evaluation of nnU-Net: logits of the finest and of coarser decoder stages, and the encoder's features."""
    features = unet.encode(segmentor, image)
    logits, decoded = unet.decode(segmentor, features)
    return (logits, *unet.deep_logits(segmentor, decoded)), tuple(features)


class HiDiffObjective:
    """Alternate-collaborative training: the refiner's turn, then the segmentor's.

    Args:
        segmenter: whose settings, process and networks are used.
    """

    evaluations: Mapping[str, Callable[..., Any]] = {"denoiser": evaluate_refiner, "presegmentor": evaluate_segmentor}

    def __init__(self, segmenter: DiffusionSegmenter) -> None:
        self.segmenter = segmenter
        together = ("collaboration",) if segmenter.settings.collaboration_weight > 0 else ()
        self.terms: tuple[str, ...] = ("posterior", "flip", "overlap", "segmentation", *together)
        unet.freeze_unused_outputs(segmenter.presegmentor, deep_supervision=True)

    def begin_epoch(self, recycling: bool) -> None:
        """Do nothing: there are no starts to choose from."""

    def draw_noise(self, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,), half of them the last, the others uniform; and uniform noise of the state's shape."""
        timestep, noise = timestep_and_noise(self.segmenter, clean, generator)
        begins = torch.rand(len(clean), generator=generator, device=generator.device) < AT_THE_BEGINNING
        return torch.where(begins.to(clean.device), self.segmenter.settings.timesteps - 1, timestep), noise

    def turns(
        self,
        image: Tensor,
        target: Tensor,
        segmentation_loss: SegmentationLoss | None = None,
        generator: Generator | None = None,
        evaluate: Mapping[str, Callable[..., Any]] | None = None,
        precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        cases: Sequence[str] = (),
    ) -> Iterator[Turn]:
        """Yield the refiner's turn, then the segmentor's; both see the same noisy states.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            target: as nnU-Net's loader gives it: (B, 1, *spatial) label map, or masks of regions.
            segmentation_loss: nnU-Net's own loss.
            generator: of all randomness, on the image's device; by default one seeded by torch's own.
            evaluate: replaces `evaluations`, bound to their modules: compiled or distributed ones; with `on_this_rank`,
                compiled ones that are not distributed.
            precision: autocast of the networks' evaluations.
            cases: without effect.

        Raises:
            ValueError: `segmentation_loss` is missing.
        """
        segmenter, settings = self.segmenter, self.segmenter.settings
        if segmentation_loss is None:
            raise ValueError("HiDiff needs a segmentation_loss (logits, target) -> scalar.")
        own = {name: partial(each, getattr(segmenter, name)) for name, each in self.evaluations.items()}
        given = evaluate or own
        refine, segment = given["denoiser"], given["presegmentor"]
        refine_alone = given.get(on_this_rank("denoiser"), own["denoiser"])
        generator = generator_for(image, generator)
        truth = labels.read_target(target, segmenter.denoiser.state_channels, settings.regions, segmenter.ignore_label)

        def seen(probabilities: Tensor) -> Tensor:
            return segmenter.condition_image(image, probabilities)

        with precision():
            # one evaluation serves both turns, as the refiner's step does not change the segmentor
            (logits, *coarser), features = segment(image)
            probabilities = labels.activate(logits, settings.regions)
            prior = probabilities.detach()
            process = segmenter.process.towards(prior)
            clean = truth.masks if truth.known is None else torch.where(truth.known, truth.masks, prior)
            timestep, noise = self.draw_noise(clean, generator)
            noisy = process.add_noise(clean, noise, timestep)
            added = refine(noisy, seen(prior), timestep, tuple(each.detach() for each in features))
        yield "denoiser", refinement(added, noisy, clean, timestep, process, truth, settings.regions)

        with precision():
            terms = {"segmentation": deeply_supervised(logits, coarser, target, segmentation_loss)}
            if settings.collaboration_weight > 0:
                with _constant(segmenter.denoiser):
                    # through p and the features into the segmentor; not the distributed evaluation, as the refiner's weights
                    # have no gradient now
                    added = refine_alone(noisy, seen(probabilities), timestep, features)
        if settings.collaboration_weight > 0:
            found = refinement(added, noisy, clean, timestep, process, truth, settings.regions)
            terms["collaboration"] = settings.collaboration_weight * torch.stack(list(found.values())).sum()
        yield "presegmentor", terms


def refinement(
    added: Tensor,
    noisy: Tensor,
    clean: Tensor,
    timestep: Tensor,
    process: BernoulliProcess,
    truth: labels.Target,
    regions: bool = False,
) -> dict[str, Tensor]:
    """Return the terms of the refiner's loss, of one evaluation.

    Args:
        added: what the refiner adds to the logit of a flip, (B, K, *spatial).
        noisy: y_t, (B, K, *spatial), 0 and 1.
        clean: y_0, same shape.
        timestep: (B,).
        process: the Bernoulli process, with its prior.
        truth: of the batch; voxels that are not known do not count.
        regions: whether the heads are regions.

    Returns:
        `posterior`, `flip` and `overlap`: scalars.
    """
    logit = Flip().clean_logit(added, noisy, timestep, process)
    estimate = logit.sigmoid()
    last = (timestep == 0).view(-1, *[1] * (noisy.ndim - 1))
    wanted, found = (
        torch.where(last, each, process.posterior(each, noisy, timestep, timestep - 1).probability)
        for each in (clean, estimate)
    )
    # KL(q(y_{t-1} | y_t, y_0, p) || q(y_{t-1} | y_t, estimate, p)); at t = 0 -log of the estimate's probability of y_0
    divergence = bernoulli_divergence(wanted, found)
    # -log q, q the probability given to what is true: of the clean state, and so of the flip
    surprise = binary_cross_entropy_with_logits(logit, clean, reduction="none")
    # focal loss: (1 - q)^gamma (-log q)
    focal = (1 - torch.exp(-surprise)) ** FOCUS * surprise
    return {
        "posterior": losses.mean(divergence, truth.known),
        "flip": losses.mean(focal, truth.known),
        # soft Dice, as in nnU-Net's loss: so a small structure counts as much as a large one
        "overlap": losses.soft_dice_loss(
            labels.foreground(estimate, regions), labels.foreground(clean, regions), truth.known
        ),
    }


def bernoulli_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of two Bernoulli distributions, voxel by voxel, in nats."""
    wanted, found = wanted.clamp(0, 1), found.clamp(LEAST, 1 - LEAST)
    # sum over both values of q log(q / q'), 0 log 0 = 0
    entropy = torch.special.entr(wanted) + torch.special.entr(1 - wanted)
    return -(wanted * found.log() + (1 - wanted) * (1 - found).log()) - entropy


@contextlib.contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Let a module's weights have no gradients for a `with` block."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
