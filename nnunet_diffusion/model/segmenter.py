"""The network nnU-Net sees: pre-segmentor, denoiser and diffusion process in one module (layer 2).

With HiDiff the pre-segmentor is the segmentor, and the denoiser the refiner.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from nnunet_diffusion.diffusion.bernoulli import BernoulliProcess
from nnunet_diffusion.diffusion.gaussian import GaussianProcess
from nnunet_diffusion.diffusion.predictions import prediction_of
from nnunet_diffusion.diffusion.process import Process
from nnunet_diffusion.diffusion.samplers import OnStep, sample, timestep_grid
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.drawing import LEVEL, deciding, level_noise
from nnunet_diffusion.model.precision import all_finite, inference_precision, outside_inference_mode, refuse_nan
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks import unet
from nnunet_diffusion.networks.denoiser import Condition, Denoiser

SAMPLES_PER_CALL = 4  # samples of one patch denoised together; more may exceed the memory that training needs


@dataclass(frozen=True)
class Presegmentation:
    """What the pre-segmentor makes of images.

    Attributes:
        probabilities: of each class or region, (B, K, *spatial), float32.
        features: those that the denoiser's condition comes from; None if not asked for, or if it has no use for them.
    """

    probabilities: Tensor
    features: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class _StartNoise:
    key: tuple[tuple[int, ...], int, str, torch.device]
    field: Tensor
    generator_state: Tensor


class DiffusionSegmenter(nn.Module):
    """A reverse process around two networks: a pre-segmentor, frozen but for HiDiff, and a denoiser.

    `segmenter(image)` gives logits, as any network of nnU-Net's does; what training minimises is an objective's
    (`model/objective.py`). `settings` may be replaced at any time by one that differs in inference settings.

    Args:
        presegmentor: image (B, C, *spatial) -> logits (B, K, *spatial), or a list of such (deep supervision), the
            finest first. Frozen here and always in evaluation mode, but for HiDiff.
        denoiser: `encode(image, timestep) -> condition` and `denoiser(noisy, timestep, condition) -> prediction`.
        settings: validated settings; the denoiser's training fixes the section `process`.
    """

    def __init__(self, presegmentor: nn.Module, denoiser: Any, settings: DiffusionSettings) -> None:
        """Freeze the pre-segmentor, unless it is trained too, and build the diffusion process."""
        super().__init__()
        self.presegmentor, self.denoiser, self.settings = presegmentor, denoiser, settings
        if not settings.is_hidiff:
            presegmentor.requires_grad_(False).eval()
        kind = BernoulliProcess if settings.is_hidiff else GaussianProcess
        self.process: Any = kind(settings.noise_schedule)
        self.prediction = prediction_of(
            settings.prediction_type, lambda logits: labels.activate(logits, settings.regions)
        )
        self.ignore_label: int | None = None
        self.evaluations = 0
        self._encode, self._denoise, self._run = _encode, _denoise, _run
        # for an image, logits and features; of tiles whose logits are known, features alone
        self._run_with_features = unet.logits_and_encoder if settings.is_hidiff else unet.logits_and_features
        self._run_to_features = unet.encode if settings.is_hidiff else _to_all_features
        self._noise: _StartNoise | None = None

    def train(self, mode: bool = True) -> DiffusionSegmenter:
        """Switch the denoiser's mode; a frozen pre-segmentor stays in evaluation."""
        super().train(mode)
        if self.settings.is_hidiff:
            return self
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

    def forward(self, image: Tensor) -> Tensor:
        """Return bounded logits (B, K, *spatial) of preprocessed patches (B, C, *spatial); see `segment`."""
        # traced only where a caller compiles this module whole, as nnU-Net's predictor does with nnUNet_compile=t
        return self.segment(image, compiled=torch.compiler.is_compiling())

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

    def presegment(self, image: Tensor, with_features: bool = False) -> Presegmentation:
        """Return what the pre-segmentor makes of images (B, C, *spatial), on demand with the features that are needed."""
        with torch.no_grad():
            features = None
            if with_features and self.settings.uses_features:
                with self._segmentor_precision(image.device):
                    output, features = outside_inference_mode(self._run_with_features, self.presegmentor, image)
            else:
                output = self.run_presegmentor(image)
            logits = output[0] if isinstance(output, (list, tuple)) else output
            return Presegmentation(labels.activate(logits, self.settings.regions), features)

    def features(self, image: Tensor) -> tuple[Tensor, ...] | None:
        """Return the pre-segmentor's features of images if the denoiser's condition comes from them.

        Args:
            image: (B, C, *spatial), or with what the condition sees beside it (`condition_image`).
        """
        if not self.settings.uses_features:
            return None
        with torch.no_grad():
            image = image[:, : self.denoiser.image_channels] if self.settings.shows_presegmentation else image
            with self._segmentor_precision(image.device):
                return tuple(outside_inference_mode(self._run_to_features, self.presegmentor, image))

    def run_presegmentor(self, image: Tensor) -> Any:
        """Return what the pre-segmentor makes of (B, C, *spatial): logits, or a list of such, the finest first."""
        with self._segmentor_precision(image.device):
            return outside_inference_mode(self._run, self.presegmentor, image)

    def _segmentor_precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        # a frozen nnU-Net is evaluated as nnU-Net does; one that was trained here, as it was trained
        return inference_precision(device) if self.settings.is_hidiff else contextlib.nullcontext()

    def own_start(self, image: Tensor, presegmented: Tensor | None = None) -> Tensor:
        """Return the probabilities (B, K, *spatial) that `settings.start_from` names.

        Args:
            image: (B, C, *spatial) preprocessed patch.
            presegmented: the pre-segmentor's probabilities where they are at hand already.
        """
        if self.settings.start_from == "previous_stage":
            return labels.foreground_to_probabilities(image[:, 1 - self.denoiser.state_channels :])
        return self.presegment(image).probabilities if presegmented is None else presegmented

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
        needed = not settings.from_noise or settings.shows_presegmentation
        own = member = None
        if presegmentation is None:
            if settings.presegmentation_weight > 0 or (needed and settings.start_from == "presegmentor"):
                own = self.presegment(image, with_features=True)
            if own is not None and settings.presegmentation_weight > 0:
                member = own.probabilities
                if settings.presegmentation_weight == 1:
                    return member
            presegmentation = self.own_start(image, None if own is None else own.probabilities) if needed else None
        shape = (len(image) * settings.samples, self.denoiser.state_channels, *image.shape[2:])
        process = self.reverse_process
        start, generator = self._start_noise(process, shape, image.device)
        if not settings.from_noise and presegmentation is not None:
            repeated = presegmentation.float().repeat_interleave(settings.samples, 0)
            process = process.towards(repeated)
            start = process.start(repeated, settings.start_step, start)
        seen = self.condition_image(image, presegmentation)
        conditions = Conditions(self, seen, None if own is None else own.features)
        del own  # with the features

        def estimate(noisy: Tensor, timestep: int) -> Tensor:
            self.evaluations += settings.samples
            states = noisy.view(len(image), settings.samples, *noisy.shape[1:])
            return self.clean_estimate(states, timestep, conditions.at(timestep), SAMPLES_PER_CALL).view(noisy.shape)

        last = timestep_grid(settings.start_step, settings.steps)[-1]
        with torch.no_grad():
            clean = sample(
                settings.sampler,
                deciding(estimate, settings.estimate_draw, last, process, settings.regions, generator),
                start,
                settings.start_step,
                settings.steps,
                process,
                generator=generator,
                eta=settings.eta,
                on_step=on_step,
            )
        found = labels.normalised(self.process.to_probabilities(clean), settings.regions)
        mean = found.view(len(image), settings.samples, *shape[1:]).mean(1)
        return mean if member is None else torch.lerp(mean, member.to(mean), settings.presegmentation_weight)

    def clean_estimate(self, states: Tensor, timestep: int, condition: Condition, samples_per_call: int) -> Tensor:
        """Return the denoiser's estimate of the clean states: one reverse evaluation, of patches and of volumes' tiles.

        Args:
            states: noisy states (B, S, K, *spatial), S samples of each of B images.
            timestep: of all states.
            condition: of the images at that timestep; see `Conditions`.
            samples_per_call: samples of each image that the denoiser sees together.

        Returns:
            The estimates, of the states' shape, float32.
        """
        estimates = []
        with inference_precision(states.device):
            for part in states.split(samples_per_call, 1):
                noisy = part.flatten(0, 1)
                times = torch.full((len(noisy),), timestep, device=noisy.device)
                repeated = condition.repeat_interleave(part.shape[1])
                prediction = self.denoise(noisy, times, repeated)
                process = self.process.towards(cast(Any, repeated).prior) if self.settings.is_hidiff else self.process
                clean = self.prediction.to_clean(prediction, noisy, timestep, process)
                estimates.append(clean.view(part.shape))
        return torch.cat(estimates, 1)

    def encode(self, image: Tensor, timestep: int, features: tuple[Tensor, ...] | None = None) -> Condition:
        """Evaluate the condition flow and the prior branch at one timestep.

        Args:
            image: (B, C, *spatial); see `condition_image`.
            timestep: of all images.
            features: of these images, where they are at hand already.
        """
        times = torch.full((len(image),), timestep, device=image.device)
        features = self.features(image) if features is None else features
        with inference_precision(image.device):
            return outside_inference_mode(self._encode, self.denoiser, image, times, features)

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the denoising side; shapes as `PGDiffSeg.forward`'s."""
        return outside_inference_mode(self._denoise, self.denoiser, noisy, timestep, condition)

    def condition_image(self, image: Tensor, presegmentation: Tensor | None) -> Tensor:
        """Return what the condition flow sees: the image, with the start's state below it where the settings say so."""
        if not self.settings.shows_presegmentation or presegmentation is None:
            return image
        return torch.cat((image, self.process.to_state(presegmentation).to(image)), 1)

    @property
    def reverse_process(self) -> Process:
        """The process that sampling reverses: HiDiff's draws level sets where `settings.draw` says so."""
        if self.settings.is_hidiff and self.settings.draw == LEVEL:
            return dataclasses.replace(cast(Any, self.process), uniform=level_noise(self.settings.regions))
        return self.process

    def _start_noise(self, process: Process, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Generator]:
        """Return the start's noise and the generator that continues after it, both from the settings' seed.

        Every tile and mirror of a volume has the same shape and seed, so the noise is drawn once and kept. It is drawn
        on the CPU: the same on every device.
        """
        key = (shape, self.settings.seed, self.settings.draw, device)
        if self._noise is None or self._noise.key != key:
            generator = torch.Generator().manual_seed(self.settings.seed)
            field = process.draw_noise(shape, generator).to(device)
            self._noise = _StartNoise(key, field, generator.get_state())
        generator = torch.Generator()
        generator.set_state(self._noise.generator_state)
        return self._noise.field, generator

    def compile_inference(self) -> None:
        """Compile what inference evaluates: pre-segmentor, condition flow and denoising side, each for itself.

        The reverse process around them stays as it is, so any sampler works, and its randomness is the same.
        """
        if self._denoise is _denoise:
            for name in ("_encode", "_denoise", "_run", "_run_with_features", "_run_to_features"):
                setattr(self, name, torch.compile(getattr(self, name)))

    @contextlib.contextmanager
    def overridden(self, **changes: Any) -> Iterator[DiffusionSegmenter]:
        """Use other inference settings inside a `with` block."""
        before = self.settings
        self.settings = dataclasses.replace(before, **changes)
        try:
            yield self
        finally:
            self.settings = before


class Conditions:
    """The condition of one batch of images at the timestep asked for last: it serves all states of that timestep.

    Without time in the condition flow it is the same at every timestep, and is computed once.

    Args:
        segmenter: whose denoiser encodes.
        image: what the condition flow sees, (B, C, *spatial); see `condition_image`.
        features: the pre-segmentor's of these images, where they are at hand already.

    Attributes:
        evaluations: images encoded so far.
    """

    def __init__(
        self, segmenter: DiffusionSegmenter, image: Tensor, features: tuple[Tensor, ...] | None = None
    ) -> None:
        self._segmenter = segmenter
        self._seen: tuple[Tensor, tuple[Tensor, ...] | None] | None = (image, features)
        self._lasting = not segmenter.settings.condition_depends_on_time
        self.evaluations = 0
        self._timestep: int | None = None
        self._condition: Condition | None = None

    @property
    def bytes(self) -> int:
        """Memory that this takes once there is a condition."""
        return _bytes_of(self._condition)

    def at(self, timestep: int) -> Condition:
        """Return the condition at a timestep."""
        if self._seen is not None and (self._condition is None or timestep != self._timestep):
            image, features = self._seen
            self._condition = None  # not both in memory at once
            self._condition = self._segmenter.encode(image, timestep, features)
            self._timestep = timestep
            self.evaluations += len(image)
            if self._lasting:
                self._seen = None
        return cast(Condition, self._condition)


def _bytes_of(value: Any) -> int:
    """Return the memory of all tensors in a condition: a dataclass of tensors and tuples of tensors."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    parts = value if isinstance(value, tuple) else [getattr(value, each.name) for each in dataclasses.fields(value)]
    return sum(map(_bytes_of, parts))


# as functions, for torch.compile: the trainer exchanges the denoiser for its average


def _encode(denoiser: Denoiser, image: Tensor, timestep: Tensor, features: tuple[Tensor, ...] | None) -> Condition:
    return denoiser.encode(image, timestep, features)


def _denoise(denoiser: Denoiser, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    return denoiser(noisy, timestep, condition)


def _run(network: nn.Module, image: Tensor) -> Any:
    return network(image)


def _to_all_features(network: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    return unet.logits_and_features(network, image)[1]
