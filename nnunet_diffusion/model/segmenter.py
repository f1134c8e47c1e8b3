"""The network nnU-Net sees: pre-segmentor, denoiser and diffusion process in one module (layer 2)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from nnunet_diffusion.diffusion.gaussian import GaussianDiffusion
from nnunet_diffusion.diffusion.samplers import OnStep, sample, start_state
from nnunet_diffusion.diffusion.schedules import noise_schedule
from nnunet_diffusion.model import corrupted_truth, labels, losses
from nnunet_diffusion.model.precision import (
    all_finite,
    denoise,
    encode,
    evaluate_denoiser,
    inference_precision,
    outside_inference_mode,
    refuse_nan,
    run,
)
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.pgdiffseg import Condition, PGDiffSeg

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]
SAMPLES_AT_ONCE = 4
"""Of one patch, in the denoiser at inference; their number is the user's, and all at once may not fit where training does."""


@dataclass(frozen=True)
class _StartNoise:
    key: tuple[tuple[int, ...], int, torch.device]
    field: Tensor
    generator_state: Tensor


class DiffusionSegmenter(nn.Module):
    """PD-DDPM around two networks: a frozen pre-segmentor and a denoiser.

    In evaluation `segmenter(image)` gives logits, as any network of nnU-Net's does; with a target it gives the terms of
    the training loss. `settings` may be replaced at any time by one that differs in inference settings.

    Args:
        presegmentor: image (B, C, *spatial) -> logits (B, K, *spatial), or a list of such (deep supervision), the
            finest first. Frozen here, always in evaluation mode.
        denoiser: `encode(image, timestep) -> condition` and `denoiser(noisy, timestep, condition) -> prediction`.
        settings: validated settings; `prediction_type`, `schedule` and `timesteps` are fixed by the denoiser's training.
    """

    def __init__(self, presegmentor: nn.Module, denoiser: PGDiffSeg, settings: DiffusionSettings) -> None:
        """Freeze the pre-segmentor and build the diffusion process."""
        super().__init__()
        self.presegmentor = presegmentor.requires_grad_(False).eval()
        self.denoiser = denoiser
        self.settings = settings
        self.process = GaussianDiffusion(
            noise_schedule(settings.schedule, settings.timesteps),
            settings.prediction_type,
            activation=lambda logits: labels.activate(logits, settings.regions),
            # near T its error is divided by sqrt(alpha_bar), with the cosine schedule up to 2e4 times (Ho et al. clip too)
            clamp=settings.prediction_type == "epsilon",
        )
        self.ignore_label: int | None = None
        self.evaluations = 0
        self._evaluate, self._encode, self._denoise, self._run = evaluate_denoiser, encode, denoise, run
        self._noise: _StartNoise | None = None

    def train(self, mode: bool = True) -> DiffusionSegmenter:
        """Switch the denoiser's mode; the pre-segmentor stays in evaluation."""
        super().train(mode)
        # autocast keeps its half-precision copies of weights only where they require gradients; in training these must not
        self.presegmentor.eval().requires_grad_(not mode)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as any module does.

        Raises:
            ValueError: if `strict` and they are those of another network; torch would list every tensor of both.
        """
        own = self.state_dict()
        theirs, ours = ({key: str(tuple(value.shape)) for key, value in side.items()} for side in (state_dict, own))
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if strict and differing:
            first = differing[0]
            raise ValueError(
                f"These weights are not of the network that the plans describe: {len(differing)} of {len(own)} tensors differ, "
                f"first {first} (shape {theirs.get(first, 'none')} in the weights, {ours.get(first, 'none')} in the network). "
                "Architecture and `diffusion` section decide: put the plans.json that was written with the checkpoint beside "
                "its fold, or train again with the present plans under another plans_name."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def forward(
        self,
        image: Tensor,
        target: Tensor | None = None,
        segmentation_loss: SegmentationLoss | None = None,
        generator: Generator | None = None,
    ) -> Any:
        """Segment `image`, or, with a target, return the terms of the training loss.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            target: as nnU-Net's loader gives it, for training: (B, 1, *spatial) label map, or masks of regions.
            segmentation_loss: (logits, target) -> scalar, needed for `prediction_type` "logits".
            generator: randomness of training, on the image's device; by default one seeded by torch's own.

        Returns:
            (B, K, *spatial) bounded logits, or a dictionary of scalars whose sum is the loss.
        """
        if target is None:
            # traced only where a caller compiles this module whole, as nnU-Net's predictor does with nnUNet_compile=t
            return self.segment(image, compiled=torch.compiler.is_compiling())
        return self.training_losses(image, target, segmentation_loss, generator)

    @torch.compiler.disable
    def segment(self, image: Tensor, compiled: bool = False) -> Tensor:
        """Return bounded logits (B, K, *spatial), a fresh tensor, same for the same image.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            compiled: compile both networks first (`compile_inference`).

        Raises:
            ValueError: if the image is not finite, or in inference mode what a network makes of it; it would look like a
                segmentation. In the epochs' own validation, which is not in that mode, it costs that epoch's Dice only.
        """
        if compiled:
            self.compile_inference()
        if not all_finite(image):
            raise ValueError(
                "The image has NaN or infinite voxels after preprocessing (one in the file spoils all of it). Replace "
                "them in the case that nnU-Net named last, then predict again."
            )
        probabilities = self.sample(image)
        if torch.is_inference_mode_enabled():
            refuse_nan(probabilities)
        return labels.probabilities_to_logits(probabilities, self.settings.regions)

    def presegment(self, image: Tensor) -> Tensor:
        """Return the pre-segmentor's class probabilities (B, K, *spatial), float32."""
        with torch.no_grad():
            output = self.run_presegmentor(image)
            return labels.activate(output[0] if isinstance(output, (list, tuple)) else output, self.settings.regions)

    def run_presegmentor(self, image: Tensor) -> Any:
        """Return what the pre-segmentor makes of (B, C, *spatial): logits, or a list of such, the finest first."""
        return outside_inference_mode(self._run, self.presegmentor, image)

    def own_start(self, image: Tensor, presegmented: Tensor | None = None) -> Tensor:
        """Return the probabilities (B, K, *spatial) that `settings.start_from` names.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            presegmented: `presegment(image)` where it is at hand already.
        """
        if self.settings.start_from == "previous_stage":
            return labels.foreground_to_probabilities(image[:, 1 - self.denoiser.state_channels :])
        return self.presegment(image) if presegmented is None else presegmented

    def sample(self, image: Tensor, presegmentation: Tensor | None = None, on_step: OnStep | None = None) -> Tensor:
        """Run `settings.samples` reverse processes and return their mean probabilities.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            presegmentation: (B, K, *spatial) probabilities to start from, which are not mixed into the result: a label
                map's certainty means nothing. By default `own_start`, and the pre-segmentor counts as one more member
                with `settings.presegmentation_weight`.
            on_step: called as (timestep, noisy, clean) after each evaluation, for pictures; tensors are
                (B * samples, K, *spatial), those of one image next to each other.

        Returns:
            (B, K, *spatial) probabilities, float32.
        """
        settings = self.settings
        needed = not settings.from_noise or settings.condition_on_presegmentation
        member = None
        if presegmentation is None:
            member = self.presegment(image) if settings.presegmentation_weight > 0 else None
            presegmentation = self.own_start(image, member) if needed else None
        shape = (len(image) * settings.samples, self.denoiser.state_channels, *image.shape[2:])
        start, generator = self._start_noise(shape, image.device)
        if not settings.from_noise and presegmentation is not None:
            repeated = presegmentation.float().repeat_interleave(settings.samples, 0)
            start = start_state(repeated, start, settings.start_step, self.process)
        with torch.no_grad(), inference_precision(image.device):
            clean = sample(
                settings.sampler,
                self._predictor(self.condition_image(image, presegmentation)),
                start,
                settings.start_step,
                settings.steps,
                self.process,
                generator=generator,
                eta=settings.eta,
                on_step=on_step,
            )
        members = labels.state_to_probabilities(clean, settings.regions).view(len(image), settings.samples, *shape[1:])
        mean = members.mean(1)
        return mean if member is None else torch.lerp(mean, member.to(mean), settings.presegmentation_weight)

    def _predictor(self, image: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return the samplers' view of the denoiser: the condition flow is evaluated once a timestep, for all samples."""
        settings = self.settings
        known: dict[int, Condition] = {}

        def predict(noisy: Tensor, timestep: int) -> Tensor:
            key = timestep if settings.time_in_condition_flow else 0
            if key not in known:
                known.clear()
                known[key] = self.encode(image, timestep)
            self.evaluations += settings.samples
            states = noisy.view(len(image), settings.samples, *noisy.shape[1:])
            predictions = []
            for part in states.split(SAMPLES_AT_ONCE, 1):
                times = torch.full((part.shape[0] * part.shape[1],), timestep, device=noisy.device)
                condition = known[key].repeat_interleave(part.shape[1])
                predictions.append(self.denoise(part.flatten(0, 1), times, condition).view(part.shape))
            return torch.cat(predictions, 1).view(noisy.shape)

        return predict

    def encode(self, image: Tensor, timestep: int) -> Condition:
        """Evaluate the condition flow and the prior branch at one timestep; `image` (B, C, *spatial)."""
        times = torch.full((len(image),), timestep, device=image.device)
        return outside_inference_mode(self._encode, self.denoiser, image, times)

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the denoising side; shapes as `PGDiffSeg.forward`'s."""
        return outside_inference_mode(self._denoise, self.denoiser, noisy, timestep, condition)

    def condition_image(self, image: Tensor, presegmentation: Tensor | None) -> Tensor:
        """Return what the condition flow sees: the image, with the start's state below it where the settings say so."""
        if not self.settings.condition_on_presegmentation or presegmentation is None:
            return image
        return torch.cat((image, labels.probabilities_to_state(presegmentation).to(image)), 1)

    def _start_noise(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Generator]:
        """Return the start's noise and the generator that continues after it, both from the settings' seed.

        Every tile and mirror of a volume has the same shape and seed, so the noise is drawn once and kept. It is drawn
        on the CPU: the same on every device.
        """
        key = (shape, self.settings.seed, device)
        if self._noise is None or self._noise.key != key:
            generator = torch.Generator().manual_seed(self.settings.seed)
            field = torch.randn(shape, generator=generator).to(device)
            self._noise = _StartNoise(key, field, generator.get_state())
        generator = torch.Generator()
        generator.set_state(self._noise.generator_state)
        return self._noise.field, generator

    def training_losses(
        self, image: Tensor, target: Tensor, segmentation_loss: SegmentationLoss | None, generator: Generator | None
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the training loss: `denoising`, `presence`, `location`."""
        settings = self.settings
        if generator is None:
            # a fresh one always begins alike
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator(image.device).manual_seed(seed)
        truth = labels.read_target(target, self.denoiser.state_channels, settings.regions, self.ignore_label)
        clean = truth.state
        if truth.known is not None:
            # METHODS 1: where nothing is known the state is the pre-segmentation; the losses leave these voxels out
            clean = torch.where(truth.known, clean, labels.probabilities_to_state(self.own_start(image)))
        start = self._training_start(clean, image, generator)
        timestep, noise = self._training_noise(clean, generator)
        noisy = self.process.add_noise(start, noise, timestep)
        condition_image = self.condition_image(image, (start + 1) / 2)
        prediction, presence, location = self._evaluate(self.denoiser, noisy, condition_image, timestep)
        with torch.autocast(image.device.type, enabled=False):
            if settings.prediction_type != "logits":
                denoising = self._squared_error(prediction, clean, noisy, timestep, truth.known)
            elif segmentation_loss is not None:
                denoising = segmentation_loss(prediction.float(), target)
            else:
                raise ValueError("prediction_type 'logits' needs a segmentation_loss (logits, target) -> scalar.")
            return {
                "denoising": denoising,
                "presence": settings.presence_weight * losses.presence_loss(presence, truth, settings.regions),
                "location": settings.location_weight * losses.location_loss(location, truth, settings.regions),
            }

    def _training_noise(self, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,) and noise of the state's shape."""
        limit, device = self.settings.max_train_step, clean.device
        timestep = torch.randint(0, limit, (len(clean),), generator=generator, device=device)
        return timestep, torch.randn(clean.shape, generator=generator, device=device)

    def _training_start(self, clean: Tensor, image: Tensor, generator: Generator) -> Tensor:
        """Return the state each sample's noise is added to: the truth, a corrupted truth, or the pre-segmentation."""
        settings, start = self.settings, clean
        draw = torch.rand(len(clean), generator=generator, device=clean.device).view(-1, *[1] * (clean.ndim - 1))
        if settings.corruption_probability > 0:
            wrong = labels.probabilities_to_state(corrupted_truth.corrupt(clean, generator, settings.regions))
            start = torch.where(draw < settings.corruption_probability, wrong, start)
        if settings.presegmentation_start_probability > 0:
            own = labels.probabilities_to_state(self.own_start(image))
            start = torch.where(draw > 1 - settings.presegmentation_start_probability, own, start)
        return start

    def _squared_error(
        self, prediction: Tensor, clean: Tensor, noisy: Tensor, timestep: Tensor, known: Tensor | None
    ) -> Tensor:
        settings = self.settings
        wanted = self.process.target(clean, self.process.to_noise(clean, noisy, timestep), timestep)
        weight = None
        if settings.min_snr_gamma > 0:
            alpha_bar = self.process.schedule.at(timestep, clean)
            weight = losses.min_snr_weight(alpha_bar, settings.prediction_type, settings.min_snr_gamma)
        return losses.squared_error(prediction, wanted, weight, known)

    def compile_training(self) -> None:
        """Compile the denoiser's training evaluation (`torch.compile`); weights and their names are untouched."""
        self._evaluate = torch.compile(evaluate_denoiser)

    def compile_inference(self) -> None:
        """Compile what inference evaluates: pre-segmentor, condition flow and denoising side, each for itself.

        The reverse process around them stays as it is, so any sampler works, and its randomness is the same.
        """
        if self._denoise is denoise:
            self._encode, self._denoise, self._run = torch.compile(encode), torch.compile(denoise), torch.compile(run)

    @contextlib.contextmanager
    def overridden(self, **changes: Any) -> Iterator[DiffusionSegmenter]:
        """Use other inference settings inside a `with` block."""
        before = self.settings
        self.settings = dataclasses.replace(before, **changes)
        try:
            yield self
        finally:
            self.settings = before
