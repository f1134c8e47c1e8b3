"""One volume on its way through pre-segmentation, the reverse processes of all folds, and their ensemble."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import dummy_context, empty_cache
from torch import Tensor
from tqdm import tqdm

from nnunet_diffusion.inference.ensemble import Members, VolumePrediction
from nnunet_diffusion.inference.fusion import absent, fuse, leave_out, needs_votes
from nnunet_diffusion.inference.memory import GIB, MemoryPlan, condition_bytes, free_bytes, peak_bytes, plan_memory
from nnunet_diffusion.inference.out_of_memory import run_group, tell, unless_out_of_memory
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.inference.reproducible import computing
from nnunet_diffusion.inference.uncertainty import Uncertainty
from nnunet_diffusion.inference.volume import Evaluations, Tiling, VolumeProcess
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.precision import all_finite, refuse_nan

if TYPE_CHECKING:
    from nnunet_diffusion.inference.predictor import DiffusionPredictor


class VolumeRun:
    """Prediction of one preprocessed volume by all folds of a predictor's model.

    Args:
        predictor: with a loaded model.
        data: (C, *volume); in the cascade the channels of the previous stage follow those of the image.
        given: pre-segmentation to start from, instead of the embedded nnU-Net's.
        presegmented: the embedded nnU-Net's probabilities (K, *padded volume), where an earlier run of this volume by the
            same fold made them.

    Attributes:
        presegmented: these probabilities, of the last fold; None if they were not needed.
        data: the image, padded to at least one patch, (C, *padded volume).
        unpad: slices of `data` in which the image lies.
        tiling: tiles of `data`.

    Raises:
        ValueError: the image is not finite, or `presegmented` is given for several folds.
    """

    def __init__(
        self,
        predictor: DiffusionPredictor,
        data: Tensor,
        given: Presegmentation | None = None,
        presegmented: Tensor | None = None,
    ) -> None:
        if not all_finite(data):
            raise ValueError(
                "the image has NaN or infinite voxels after preprocessing (one in the file spoils all of it)"
            )
        if presegmented is not None and len(predictor.folds) != 1:
            raise ValueError(
                f"presegmented is the result of one fold, but the predictor has {len(predictor.folds)} folds"
            )
        self.predictor, self.network, self.device = predictor, predictor.network, predictor.device
        self.settings, self.given, self._known = self.network.settings, given, presegmented
        self.presegmented: Tensor | None = None
        self._padding = (predictor.configuration_manager.patch_size, "constant", {"value": 0})
        self.data, self.unpad = pad_nd_image(data, *self._padding, return_slicer=True)
        self._given_start = None if given is None else self._padded(given)
        self.tiling = self._tiling()
        self.members = Members(self.settings.regions, needs_votes(predictor.fusion), predictor.keep_samples)
        if predictor.uncertainty:
            self.members.uncertainty = Uncertainty(self.settings.regions)
        self.start_steps = predictor.start_steps or (self.settings.start_step,)
        self.evaluations = Evaluations()
        self.notes: list[str] = []
        self._on_tiles: Callable[[int], object] = lambda number: None
        self._deadline: float | None = None  # of the samples of one fold

    def predict(self, on_tiles: Callable[[int], object] | None = None) -> VolumePrediction:
        """Run all folds and return their ensemble.

        Args:
            on_tiles: called with the number of finished tiles; by default it updates a bar, if the predictor allows bars.

        Raises:
            ValueError: the output of a network is not finite.
            MemoryError: the state does not fit into memory.
        """
        begin, predictor = time.perf_counter(), self.predictor
        bar = None
        if on_tiles is None:
            # the pre-segmentation counts as one step
            runs = min(math.lcm(len(self._mirrors()), len(self.start_steps)), self.settings.samples)
            steps = sum(self._steps_from(self._start_step_of(number)) for number in range(runs))
            total = (steps + 1) * len(predictor.list_of_parameters) * len(self.tiling.tiles)
            bar = tqdm(total=total, unit="tile", disable=None if predictor.allow_tqdm else True, leave=False)
            on_tiles = bar.update
        self._on_tiles = on_tiles
        self.network.to(self.device).eval()
        if self.device.type == "cuda":
            # only after the first use of the GPU: before that, torch rejects a device with an index
            torch.cuda.reset_peak_memory_stats(self.device)
        for place, (fold, weights) in enumerate(zip(predictor.folds, predictor.list_of_parameters, strict=True)):
            if predictor.deadline is not None:
                share = (place + 1) / len(predictor.folds)
                self._deadline = begin + share * (predictor.deadline - begin)
            self.network.load_state_dict(weights)
            # autocast caches the cast weights until it ends, so each fold needs its own
            with self._computing(), torch.inference_mode(), self._autocast():
                self._add_fold(fold)
        if bar is not None:
            bar.close()
        with self._computing():
            return self._ensemble(begin)

    def _computing(self) -> Any:
        return computing(self.predictor.threads, self.predictor.deterministic)

    def _autocast(self) -> Any:
        return torch.autocast("cuda") if self.device.type == "cuda" else dummy_context()

    def _tiling(self) -> Tiling:
        predictor, patch = self.predictor, tuple(self.predictor.configuration_manager.patch_size)
        weight = torch.ones(patch, device=self.device)
        if predictor.use_gaussian:
            # as in nnU-Net, but in float32
            weight = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32,
                                      device=self.device)  # fmt: skip
        # a batch that fits in training, with gradients, also fits in inference
        batch = int(predictor.configuration_manager.batch_size)
        slicers = predictor._internal_get_sliding_window_slicers(self.data.shape[1:])
        return Tiling(slicers, weight, batch, self.device)

    def _add_fold(self, fold: str) -> None:
        """Add one fold's members to the ensemble: its pre-segmentation and its samples."""
        weight = self.settings.presegmentation_weight
        start, member = self.start()
        if member is not None:
            self.members.add(member, weight)
        if weight < 1 or member is None or self.predictor.keep_samples:
            self._add_samples(fold, start, 1.0 if member is None else 1 - weight)

    def start(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the probabilities to start from, and those that count as a member of the ensemble."""
        settings = self.settings
        if self.given is not None:
            self._on_tiles(len(self.tiling.tiles))
            start = self._given_start
            # the probabilities of a label map, 0 and 1, say nothing about confidence
            counts = settings.presegmentation_weight > 0 and not self.given.certain
            return start, start if counts else None
        own: Tensor | None = None
        needed = not settings.from_noise or settings.shows_presegmentation
        if settings.presegmentation_weight > 0 or (needed and settings.start_from == "presegmentor"):
            own = self.presegment()
        self._on_tiles(len(self.tiling.tiles))
        probabilities = None if own is None else own[None]
        start = self.network.own_start(self.data[None], probabilities)[0] if needed else None
        return start, own if settings.presegmentation_weight > 0 else None

    def _padded(self, given: Presegmentation) -> Tensor:
        """Pad with background where the image is padded with zeros."""
        padded = pad_nd_image(torch.from_numpy(np.ascontiguousarray(given.probabilities)).float(), *self._padding)
        if not self.settings.regions:
            padded[0] += 1 - padded.sum(0)
        return padded

    def presegment(self) -> Tensor:
        """Segment the volume with nnU-Net's own sliding window. Return probabilities (K, *volume), float32."""
        if self._known is not None:
            self.presegmented = self._known
            return self._known
        stock: Any = copy.copy(self.predictor)
        stock.allow_tqdm, stock.network = False, self._run_presegmentor

        def probabilities(on_device: bool) -> Tensor:
            logits = stock._internal_predict_sliding_window_return_logits(self.data, self.tiling.tiles, on_device)
            return labels.activate(logits[None], self.settings.regions)[0]

        # try only if it should fit: if nnU-Net's loop fails, one of its threads keeps the image on the GPU
        heads, channels = self.predictor.label_manager.num_segmentation_heads, len(self.data)
        bytes_per_voxel = 14 * heads + 4 * channels + 4  # sums in half precision, as float32, softmax; image; weights
        fits = self.device.type != "cuda" or bytes_per_voxel * self.data[0].numel() <= free_bytes(self.device)
        wanted = self.predictor.perform_everything_on_device
        on_device = unless_out_of_memory(lambda: probabilities(fits and wanted), self.device)
        found = self.presegmented = probabilities(False) if on_device is None else on_device
        if wanted and not (fits and on_device is not None):
            tell(self.notes, f"the pre-segmentation does not fit on {self.device}: it is on the CPU")
        return found

    def _run_presegmentor(self, image: Tensor) -> Tensor:
        self.evaluations.presegmentor += len(image)
        return self.network.run_presegmentor(image)

    def _add_samples(self, fold: str, start: Tensor | None, share: float) -> None:
        """Run one reverse process per sample, in groups that fit into memory; `share` is the weight of all together."""
        predictor, settings, data = self.predictor, self.settings, self.data
        mirrors = self._mirrors()
        limit = None if predictor.state_memory_gb is None else predictor.state_memory_gb * GIB
        device = self.device
        if device.type == "cuda" and not predictor.perform_everything_on_device:
            limit, device = None, torch.device("cpu")  # the limit applies to the GPU
        empty_cache(self.device)  # cached memory of earlier networks counts as used

        def free(device: torch.device) -> float:
            return free_bytes(device) - (data.nbytes if device.type == "cuda" else 0)  # the image is there too

        plan = plan_memory(
            data.shape[1:], self.network.denoiser.state_channels, -(-settings.samples // len(mirrors)), settings.sampler,
            settings.steps,
            device, limit, self.tiling.samples_per_call, free, settings.is_hidiff,
        )  # fmt: skip
        tell(self.notes, plan.note)
        if self._deadline is not None:
            plan = dataclasses.replace(plan, at_once=1)
        number_in_time = settings.samples
        room = 0.0
        if self._conditions_are_used_again(plan, len(mirrors)) and device == self.device:
            room = condition_bytes(device, plan, limit, free)
        process = VolumeProcess(
            self.network, data, self.tiling, start, settings.seed, plan.device, self._on_tiles, self.evaluations,
            int(fold) if fold.isdecimal() else 0,
            condition_bytes=room,
        )  # fmt: skip
        for place, axes in enumerate(mirrors[: settings.samples]):
            process.forget_conditions()
            process = dataclasses.replace(process, mirrored=axes)
            for group in self._groups(range(place, settings.samples, len(mirrors)), plan.at_once):
                if group[0] >= number_in_time:
                    continue
                begin, start_step = time.perf_counter(), self._start_step_of(group[0])
                with self.network.overridden(start_step=start_step, steps=self._steps_from(start_step)):
                    process, found = run_group(process, group, predictor.joint, self.notes)
                if self._deadline is not None and group[0] == 0:
                    number_in_time = self._samples_until(self._deadline, begin, fold)
                for number, probabilities in zip(group, found, strict=True):
                    self.members.add(probabilities, share / number_in_time, f"fold_{fold}_sample_{number}")

    def _samples_until(self, deadline: float, begin: float, fold: str) -> int:
        """Return the number of samples that end before a time, after the first, which began at `begin`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, samples = time.perf_counter(), self.settings.samples
        number = min(samples, 1 + max(0, int((deadline - now) / max(now - begin, 1e-6))))
        tell(self.notes, f"{number} of {samples} samples of fold {fold} are drawn in the time that is left")
        return number

    def _start_step_of(self, number: int) -> int:
        """Return T' of a sample: the start steps take turns."""
        return self.start_steps[number % len(self.start_steps)]

    def _steps_from(self, start_step: int) -> int:
        return min(self.settings.steps, start_step)

    def _groups(self, numbers: Sequence[int], at_once: int) -> Iterator[list[int]]:
        """Yield the samples in groups with one start step each, of at most so many."""
        for place in range(len(self.start_steps)):
            chosen = [number for number in numbers if number % len(self.start_steps) == place]
            for first in range(0, len(chosen), at_once):
                yield chosen[first : first + at_once]

    def _conditions_are_used_again(self, plan: MemoryPlan, mirrors: int) -> bool:
        """Whether a tile's condition costs something and serves a further step, or a further group of samples."""
        settings = self.settings
        if settings.condition_depends_on_time or settings.denoiser == "nnunet":
            return False
        several = len(self.start_steps) > 1 or -(-settings.samples // mirrors) > plan.at_once
        return several or (self.predictor.joint and settings.steps > 1)

    def _mirrors(self) -> list[tuple[int, ...]]:
        """Return the combinations of axes along which samples are mirrored, in turn: those of nnU-Net's own mirroring."""
        axes = self.predictor.allowed_mirroring_axes if self.predictor.use_mirroring else None
        if not self.settings.mirror_samples or not axes:
            return [()]
        return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]

    def _tell_what_is_left_out(self, fused: Tensor, mean: Tensor, gone: Tensor) -> None:
        """Note the classes that only `presence_threshold` keeps out of the segmentation."""
        masks = labels.hardened(fused[None], self.settings.regions)[0].bool()
        for number in (gone & masks.flatten(1).any(1)).nonzero()[:, 0].tolist():
            kind = "region" if self.settings.regions else "class"
            self.notes.append(
                f"{kind} {number} is left out: its largest probability, {mean[number].max():.2f}, is below "
                f"presence_threshold {self.settings.presence_threshold:g}"
            )

    def _ensemble(self, begin: float) -> VolumePrediction:
        predictor, members, regions = self.predictor, self.members, self.settings.regions
        inner: Sequence[slice] = (slice(None), *self.unpad[1:])
        mean = members.mean()[inner]
        refuse_nan(mean)
        fused, threshold = mean, self.settings.presence_threshold
        if predictor.fusion != "mean":
            where = (slice(None), *(inner if regions else inner[1:]))
            votes = torch.stack(members.votes)[where] if members.votes else None
            fused = fuse(votes, mean, predictor.fusion, regions)
        if (gone := absent(mean, threshold, regions)).any():
            self._tell_what_is_left_out(fused, mean, gone)
            fused = leave_out(fused, gone)
        decision = None if fused is mean else labels.probabilities_to_logits(fused[None], regions)[0]
        logits = labels.probabilities_to_logits(mean[None], regions)[0]
        if predictor.calibrated:
            # softmax(log p / temperature), Guo et al. 2017
            logits /= predictor.temperature
            self.notes.append(f"the probabilities have temperature {predictor.temperature:.3f}")
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        return VolumePrediction(
            logits.contiguous(),
            decision,
            {name: logits[inner].contiguous() for name, logits in members.samples.items()},
            self.evaluations,
            time.perf_counter() - begin,
            peak_bytes(self.device),
            self.notes,
            None if members.uncertainty is None else members.uncertainty.result(mean, tuple(inner[1:])),
        )
