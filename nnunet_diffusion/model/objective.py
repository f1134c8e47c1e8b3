"""What training minimises: the terms of PGDiffSeg's loss, and whose turn it is to learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate

from nnunet_diffusion.model import corrupted_truth, labels, losses
from nnunet_diffusion.model.corrupted_truth import UNMEASURED
from nnunet_diffusion.model.segmenter import DiffusionSegmenter

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits, target) -> scalar: nnU-Net's own loss."""
Presegment = Callable[[Tensor, Sequence[str]], Tensor]
"""(image (B, C, *spatial), names of the B cases) -> probabilities (B, K, *spatial)."""
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

    def begin_epoch(self, recycling: bool) -> None:
        """Begin an epoch, with or without the network's own estimates as starts."""

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
        """Yield the terms of each turn; the caller takes the optimizer's step before it asks for the next turn."""


def on_this_rank(name: str) -> str:
    """Return the key under which `turns` finds a network's evaluation that is not distributed, for weights held constant."""
    return f"{name} on this rank"


def evaluate_denoiser(
    denoiser: nn.Module, noisy: Tensor, image: Tensor, timestep: Tensor, features: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """One evaluation that touches every parameter: the prediction, and those of coarser stages in deep supervision."""
    return denoiser.outputs(noisy, timestep, denoiser.encode(image, timestep, features))  # type: ignore[operator]


def evaluate_pgdiffseg(
    denoiser: nn.Module, noisy: Tensor, image: Tensor, timestep: Tensor, features: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """One evaluation that touches every parameter: prediction, presence logits, location logits."""
    condition = denoiser.encode(image, timestep, features)  # type: ignore[operator]
    return denoiser(noisy, timestep, condition), condition.presence_logits, condition.location_logits


class DenoisingObjective:
    """Denoising alone, with nnU-Net's network: one turn, in which the denoiser learns.

    Args:
        segmenter: whose settings, process and pre-segmentor are used.

    Attributes:
        mistakes: of the pre-segmentor, for corrupted truths.
        out_of_fold: segments each case with a network that was not trained on it; None without such networks.
    """

    terms: tuple[str, ...] = ("denoising",)
    evaluations: Mapping[str, Callable[..., Any]] = {"denoiser": evaluate_denoiser}

    def __init__(self, segmenter: DiffusionSegmenter) -> None:
        self.segmenter = segmenter
        self.mistakes = UNMEASURED
        self.out_of_fold: Presegment | None = None
        self._recycling, self._steps = False, 0

    def begin_epoch(self, recycling: bool) -> None:
        """Begin an epoch; its draws depend on the generator's seed alone.

        Args:
            recycling: whether the denoiser's own estimates are starts in it.
        """
        self._recycling, self._steps = recycling, 0

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
        """Yield the denoiser's turn.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            target: as nnU-Net's loader gives it: (B, 1, *spatial) label map, or masks of regions.
            segmentation_loss: needed for `prediction_type` "logits".
            generator: of all randomness, on the image's device; by default one seeded by torch's own.
            evaluate: replaces `evaluations`, bound to their modules: compiled or distributed ones.
            precision: autocast of the networks' evaluations.
            cases: name of each patch's case, needed for starts out of fold.

        Raises:
            ValueError: `segmentation_loss` is missing.
        """
        segmenter, settings = self.segmenter, self.segmenter.settings
        denoise = evaluate["denoiser"] if evaluate else partial(self.evaluations["denoiser"], segmenter.denoiser)
        if settings.prediction_type == "logits" and segmentation_loss is None:
            raise ValueError("prediction_type 'logits' needs a segmentation_loss (logits, target) -> scalar.")
        generator = generator_for(image, generator)
        with precision():
            truth = labels.read_target(
                target, segmenter.denoiser.state_channels, settings.regions, segmenter.ignore_label
            )
            clean = self.clean_state(truth, image)
            start = self.start(clean, image, generator, cases)
            timestep, noise = self.draw_noise(clean, generator)
            # what the reverse process began with, also after its first step
            seen = segmenter.condition_image(image, segmenter.process.to_probabilities(start))
            start = self.recycled(start, image, seen, timestep, generator)
            # Eq. 14, from the start instead of the truth
            noisy = segmenter.process.add_noise(start, noise, timestep)
            prediction, *heads = denoise(noisy, seen, timestep, segmenter.features(image))
            with torch.autocast(image.device.type, enabled=False):
                if segmentation_loss is not None and settings.prediction_type == "logits":
                    denoising = self.segmentation(prediction, heads, target, segmentation_loss)
                else:
                    denoising = self._squared_error(prediction, clean, noisy, timestep, truth.known)
                terms = {"denoising": denoising, **self.supervision(heads, truth)}
        yield "denoiser", terms

    def supervision(self, heads: Sequence[Tensor], truth: labels.Target) -> dict[str, Tensor]:
        """Return further terms, of the outputs beside the prediction."""
        return {}

    def segmentation(
        self, prediction: Tensor, heads: Sequence[Tensor], target: Tensor, loss: SegmentationLoss
    ) -> Tensor:
        """Return nnU-Net's loss of the logits, and of those of coarser decoder stages: see `deeply_supervised`."""
        return deeply_supervised(prediction, heads, target, loss)

    def clean_state(self, truth: labels.Target, image: Tensor) -> Tensor:
        """Return the state of the truth (B, K, *spatial); where that is not known, of the pre-segmentation (METHODS 1)."""
        clean = self.segmenter.process.to_state(truth.masks)
        if truth.known is None:
            return clean
        # the losses leave these voxels out
        return torch.where(truth.known, clean, self.segmenter.process.to_state(self.segmenter.own_start(image)))

    def draw_noise(self, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) and noise of the state's shape."""
        return timestep_and_noise(self.segmenter, clean, generator)

    def start(self, clean: Tensor, image: Tensor, generator: Generator, cases: Sequence[str] = ()) -> Tensor:
        """Return the state each sample's noise is added to, before recycling: of the kinds in `training.starts`, by lot."""
        settings, process = self.segmenter.settings, self.segmenter.process
        makers: dict[str, Callable[[list[int]], Tensor]] = {
            "corrupted": lambda which: corrupted_truth.corrupt(
                labels.hardened(process.to_probabilities(clean[which]), settings.regions),
                generator,
                self.mistakes,
                settings.regions,
            ),
            "presegmentation": lambda which: self.segmenter.own_start(image[which]),
            "out_of_fold": lambda which: self._unseen(image, cases, which),
        }
        shares = {kind: share for kind, share in settings.starts.items() if kind != "recycled"}
        kinds = self._lots(generator).choice(
            list(shares), len(clean), p=np.array(list(shares.values())) / sum(shares.values())
        )
        start = clean.clone()
        for kind, maker in makers.items():
            which = np.flatnonzero(kinds == kind).tolist()
            if which:
                start[which] = process.to_state(maker(which)).to(start)
        return start

    def _lots(self, generator: Generator) -> np.random.Generator:
        """Return a source of random numbers on the CPU: the GPU need not be waited for to know which samples are drawn."""
        self._steps += 1
        return np.random.default_rng((generator.initial_seed(), self._steps))

    def _unseen(self, image: Tensor, cases: Sequence[str], which: list[int]) -> Tensor:
        """Segment some of the images with networks that were not trained on their cases."""
        if self.out_of_fold is None:
            raise ValueError("training.starts has a share of out_of_fold, but the objective has no such networks.")
        return self.out_of_fold(image[which], [str(cases[index]) for index in which] if len(cases) else [])

    def recycled(self, start: Tensor, image: Tensor, seen: Tensor, timestep: Tensor, generator: Generator) -> Tensor:
        """Replace a share of the starts by what the denoiser makes of them at a noisier step (Fu et al. 2023).

        So the denoiser meets its own estimates in training, as it does in a reverse process of several steps. The weights are
        the present ones, in evaluation mode, without a gradient. `seen` is the image as the condition flow sees it.
        """
        segmenter, share = self.segmenter, self.segmenter.settings.starts.get("recycled", 0.0)
        if not (self._recycling and share > 0):
            return start
        which = np.flatnonzero(self._lots(generator).random(len(start)) < share).tolist()
        if not which:
            return start
        part = torch.rand(len(start), generator=generator, device=start.device)
        noise = segmenter.process.draw_noise(start.shape, generator).to(start.device)
        # s uniform in [t, max_train_step)
        earlier = timestep + (part * (segmenter.settings.max_train_step - timestep)).long()
        denoiser, training = segmenter.denoiser, segmenter.denoiser.training
        times = earlier[which]
        denoiser.eval()
        with torch.no_grad():
            noisy = segmenter.process.add_noise(start[which], noise[which], times)
            features = segmenter.features(image[which])
            # not the distributed evaluation: ranks recycle different numbers of samples
            prediction = self.evaluations["denoiser"](denoiser, noisy, seen[which], times, features)[0]
            estimate = segmenter.prediction.to_clean(prediction, noisy, times, segmenter.process)
        denoiser.train(training)
        # earlier versions of torch would take the weights cast here, which have no gradient, for the training step too
        torch.clear_autocast_cache()
        start = start.clone()
        start[which] = estimate.to(start)
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


def generator_for(image: Tensor, generator: Generator | None) -> Generator:
    """Return the generator, or without one a new one on the image's device, seeded by torch's own: a fresh one begins alike."""
    return generator or Generator(image.device).manual_seed(int(torch.randint(2**62, ())))


def timestep_and_noise(segmenter: DiffusionSegmenter, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,) below `max_train_step`, and the process's noise of the state's shape (B, K, *spatial)."""
    limit = segmenter.settings.max_train_step
    timestep = torch.randint(0, limit, (len(clean),), generator=generator, device=generator.device)
    noise = segmenter.process.draw_noise(clean.shape, generator)
    return timestep.to(clean.device), noise.to(clean.device)


def deeply_supervised(prediction: Tensor, heads: Sequence[Tensor], target: Tensor, loss: SegmentationLoss) -> Tensor:
    """Return nnU-Net's loss of logits, with deep supervision as in nnU-Net (its weights, Isensee et al. 2021).

    Args:
        prediction: logits (B, K, *spatial).
        heads: logits of coarser decoder stages, fine to coarse.
        target: as nnU-Net's loader gives it.
        loss: of logits and a target of the same size.
    """
    total, weight, weights = loss(prediction.float(), target), 1.0, 1.0
    for logits in heads:
        # each coarser stage has half of the weight
        weight /= 2
        total, weights = total + weight * loss(logits.float(), _at_size(target, logits.shape[2:])), weights + weight
    return total / weights


def _at_size(target: Tensor, size: torch.Size) -> Tensor:
    return interpolate(target.float(), size, mode="nearest-exact").to(target.dtype)


class PGDiffSegObjective(DenoisingObjective):
    """Denoising and prior supervision (PGDiffSeg Eq. 10)."""

    terms: tuple[str, ...] = ("denoising", "presence", "location")
    evaluations: Mapping[str, Callable[..., Any]] = {"denoiser": evaluate_pgdiffseg}

    def segmentation(
        self, prediction: Tensor, heads: Sequence[Tensor], target: Tensor, loss: SegmentationLoss
    ) -> Tensor:
        """Return nnU-Net's loss of the logits; the other outputs are those of the prior branch."""
        return super().segmentation(prediction, (), target, loss)

    def supervision(self, heads: Sequence[Tensor], truth: labels.Target) -> dict[str, Tensor]:
        """Return the terms of the prior branch: presence and location logits against the truth."""
        (presence, location), settings = heads, self.segmenter.settings
        # Eq. 10: L = L_denoising + lambda_1 L_presence + lambda_2 L_location
        return {
            "presence": settings.presence_weight * losses.presence_loss(presence, truth, settings.regions),
            "location": settings.location_weight * losses.location_loss(location, truth, settings.regions),
        }
