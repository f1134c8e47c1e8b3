"""What training minimises: the terms of PGDiffSeg's loss, and whose turn it is to learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from nnunet_diffusion.model import corrupted_truth, labels, losses
from nnunet_diffusion.model.segmenter import DiffusionSegmenter

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits, target) -> scalar: nnU-Net's own loss."""
Turn = tuple[str, dict[str, Tensor]]
"""Name of the segmenter's module that learns, and the terms whose sum it minimises."""


class Objective(Protocol):
    """What a method owes its trainer.

    Attributes:
        terms: names of the terms of all turns.
        evaluations: module of the segmenter that learns -> how it is evaluated in training, as a function of the module.
    """

    terms: tuple[str, ...]
    evaluations: Mapping[str, Callable[..., Any]]

    def turns(
        self,
        image: Tensor,
        target: Tensor,
        segmentation_loss: SegmentationLoss | None = None,
        generator: Generator | None = None,
        evaluate: Mapping[str, Callable[..., Any]] | None = None,
        precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> Iterator[Turn]:
        """Yield the terms of each turn; the caller takes the optimizer's step before it asks for the next turn."""


def evaluate_denoiser(
    denoiser: nn.Module, noisy: Tensor, image: Tensor, timestep: Tensor, features: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """One evaluation that touches every parameter: the prediction."""
    return (denoiser(noisy, timestep, denoiser.encode(image, timestep, features)),)  # type: ignore[operator]


def evaluate_pgdiffseg(
    denoiser: nn.Module, noisy: Tensor, image: Tensor, timestep: Tensor, features: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """One evaluation that touches every parameter: prediction, presence logits, location logits."""
    condition = denoiser.encode(image, timestep, features)  # type: ignore[operator]
    return denoiser(noisy, timestep, condition), condition.presence_logits, condition.location_logits


class DenoisingObjective:
    """Denoising alone: one turn, in which the denoiser learns.

    Args:
        segmenter: whose settings, process and pre-segmentor are used.
    """

    terms: tuple[str, ...] = ("denoising",)
    evaluations: Mapping[str, Callable[..., Any]] = {"denoiser": evaluate_denoiser}

    def __init__(self, segmenter: DiffusionSegmenter) -> None:
        self.segmenter = segmenter

    def turns(
        self,
        image: Tensor,
        target: Tensor,
        segmentation_loss: SegmentationLoss | None = None,
        generator: Generator | None = None,
        evaluate: Mapping[str, Callable[..., Any]] | None = None,
        precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> Iterator[Turn]:
        """Yield the denoiser's turn.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            target: as nnU-Net's loader gives it: (B, 1, *spatial) label map, or masks of regions.
            segmentation_loss: needed for `prediction_type` "logits".
            generator: of all randomness, on the image's device; by default one seeded by torch's own.
            evaluate: replaces `evaluations`, bound to their modules: compiled or distributed ones.
            precision: autocast of the networks' evaluations.

        Raises:
            ValueError: `segmentation_loss` is missing.
        """
        segmenter, settings = self.segmenter, self.segmenter.settings
        denoise = evaluate["denoiser"] if evaluate else partial(self.evaluations["denoiser"], segmenter.denoiser)
        if settings.prediction_type == "logits" and segmentation_loss is None:
            raise ValueError("prediction_type 'logits' needs a segmentation_loss (logits, target) -> scalar.")
        if generator is None:
            # a fresh one always begins alike
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator(image.device).manual_seed(seed)
        with precision():
            truth = labels.read_target(
                target, segmenter.denoiser.state_channels, settings.regions, segmenter.ignore_label
            )
            clean = self.clean_state(truth, image)
            start = self.start(clean, image, generator)
            timestep, noise = self.draw_noise(clean, generator)
            # Eq. 14, from the start instead of the truth
            noisy = segmenter.process.add_noise(start, noise, timestep)
            seen = segmenter.condition_image(image, segmenter.process.to_probabilities(start))
            prediction, *heads = denoise(noisy, seen, timestep, segmenter.features(image))
            with torch.autocast(image.device.type, enabled=False):
                if segmentation_loss is not None and settings.prediction_type == "logits":
                    denoising = segmentation_loss(prediction.float(), target)
                else:
                    denoising = self._squared_error(prediction, clean, noisy, timestep, truth.known)
                terms = {"denoising": denoising, **self.supervision(heads, truth)}
        yield "denoiser", terms

    def supervision(self, heads: Sequence[Tensor], truth: labels.Target) -> dict[str, Tensor]:
        """Return further terms, of the outputs beside the prediction."""
        return {}

    def clean_state(self, truth: labels.Target, image: Tensor) -> Tensor:
        """Return the state of the truth (B, K, *spatial); where that is not known, of the pre-segmentation (METHODS 1)."""
        clean = self.segmenter.process.to_state(truth.masks)
        if truth.known is None:
            return clean
        # the losses leave these voxels out
        return torch.where(truth.known, clean, self.segmenter.process.to_state(self.segmenter.own_start(image)))

    def draw_noise(self, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) and noise of the state's shape."""
        limit, device = self.segmenter.settings.max_train_step, clean.device
        timestep = torch.randint(0, limit, (len(clean),), generator=generator, device=device)
        return timestep, torch.randn(clean.shape, generator=generator, device=device)

    def start(self, clean: Tensor, image: Tensor, generator: Generator) -> Tensor:
        """Return the state each sample's noise is added to: the truth, a corrupted truth, or the pre-segmentation."""
        segmenter, settings, start = self.segmenter, self.segmenter.settings, clean
        draw = torch.rand(len(clean), generator=generator, device=clean.device).view(-1, *[1] * (clean.ndim - 1))
        if settings.corruption_probability > 0:
            masks = segmenter.process.to_probabilities(clean)
            wrong = segmenter.process.to_state(corrupted_truth.corrupt(masks, generator, settings.regions))
            start = torch.where(draw < settings.corruption_probability, wrong, start)
        if settings.presegmentation_start_probability > 0:
            own = segmenter.process.to_state(segmenter.own_start(image))
            start = torch.where(draw > 1 - settings.presegmentation_start_probability, own, start)
        return start

    def _squared_error(
        self, prediction: Tensor, clean: Tensor, noisy: Tensor, timestep: Tensor, known: Tensor | None
    ) -> Tensor:
        process = self.segmenter.process
        # a start other than the truth is noise too
        noise = process.to_noise(clean, noisy, timestep)
        target = self.segmenter.prediction.target(clean, noise, timestep, process)
        # Eq. 19, on the chosen target
        return losses.squared_error(prediction, target, known)


class PGDiffSegObjective(DenoisingObjective):
    """Denoising and prior supervision (PGDiffSeg Eq. 10)."""

    terms: tuple[str, ...] = ("denoising", "presence", "location")
    evaluations: Mapping[str, Callable[..., Any]] = {"denoiser": evaluate_pgdiffseg}

    def supervision(self, heads: Sequence[Tensor], truth: labels.Target) -> dict[str, Tensor]:
        """Return the terms of the prior branch: presence and location logits against the truth."""
        (presence, location), settings = heads, self.segmenter.settings
        # Eq. 10: L = L_denoising + lambda_1 L_presence + lambda_2 L_location
        return {
            "presence": settings.presence_weight * losses.presence_loss(presence, truth, settings.regions),
            "location": settings.location_weight * losses.location_loss(location, truth, settings.regions),
        }
