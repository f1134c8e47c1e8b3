"""Prediction of one volume: loading a model, pre-segmentation, reverse processes and their ensemble."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import dummy_context, empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from tqdm import tqdm

from nnunet_diffusion.inference.ensemble import Members, VolumePrediction
from nnunet_diffusion.inference.fusion import FUSIONS, fuse
from nnunet_diffusion.inference.loading import read_model
from nnunet_diffusion.inference.memory import GIB, free_bytes, peak_bytes, plan_memory
from nnunet_diffusion.inference.out_of_memory import run_group, tell, unless_out_of_memory
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.inference.reproducible import ask_cublas, computing, threads_of
from nnunet_diffusion.inference.volume import Evaluations, Tiling, VolumeProcess
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.precision import all_finite, refuse_nan
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.networks.architectures import trusting
from nnunet_diffusion.training.presegmentor import trainer_class

Folds = Sequence[int | str] | None
OVERRIDES = ("sampler", "steps", "start_step", "samples", "seed", "presegmentation_weight")
COMPILE = "nnUNet_compile"


def _silent() -> contextlib.AbstractContextManager:
    return contextlib.redirect_stdout(io.StringIO())


class VolumePredictor(nnUNetPredictor):
    """nnU-Net's predictor of one volume, with logits from PD-DDPM.

    The embedded nnU-Net segments the whole volume with nnU-Net's own sliding window and mirroring. From its probabilities (or
    from given ones) one reverse process per sample runs on the whole volume; tiles are blended after each step. The result is
    the mean of the probabilities over samples, folds and, with `presegmentation_weight`, the pre-segmentor.

    Args:
        tile_step_size: as in nnU-Net, as a fraction of the patch.
        use_gaussian: as in nnU-Net, also for the tiles of the reverse process.
        use_mirroring: mirroring for the pre-segmentor; the denoiser is never mirrored.
        perform_everything_on_device: keep the volume on the GPU if it fits.
        device: device of the networks.
        verbose: as in nnU-Net.
        verbose_preprocessing: as in nnU-Net.
        allow_tqdm: show a bar over tiles x steps.
        sampler: name of the sampler. For this and the next five arguments, None means the model's setting.
        steps: number of evaluations in one reverse process.
        start_step: T' of PD-DDPM.
        samples: number of reverse processes.
        seed: seed of their noise.
        presegmentation_weight: weight of the pre-segmentor's probabilities in the result, 0..1; in a vote, one vote if > 0.
        fusion: "mean", "majority" or "staple". It affects the segmentation; the probabilities are always the mean.
        joint: True for one reverse process per volume; False for one per tile, as in nnU-Net's own prediction.
        keep_samples: keep the result of each sample.
        trust_checkpoint: also load files that may run code.
        state_memory_gb: limit of the device memory for a volume's state, in GiB; None for the free memory.
        threads: number of CPU threads, on which the last bits depend. None for the default of `nnunet_diffusion predict`:
            one per core, or one thread if the device is a GPU.
        deterministic: use only GPU algorithms that return identical bits on each call.

    Raises:
        ValueError: the fusion is unknown, or `threads` is not positive. The settings are checked when a model is loaded.
    """

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's signature)
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        start_step: int | None = None,
        samples: int | None = None,
        seed: int | None = None,
        presegmentation_weight: float | None = None,
        fusion: str = "mean",
        joint: bool = True,
        keep_samples: bool = False,
        trust_checkpoint: bool = False,
        state_memory_gb: float | None = None,
        threads: int | None = None,
        deterministic: bool = False,
    ) -> None:
        on_device = perform_everything_on_device and device.type == "cuda"
        with _silent():  # without a GPU, nnU-Net warns about perform_everything_on_device by default
            super().__init__(tile_step_size, use_gaussian, use_mirroring, on_device, device, verbose, verbose_preprocessing,
                             allow_tqdm)  # fmt: skip
        self.allow_tqdm: bool = allow_tqdm
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; known: {', '.join(FUSIONS)}")
        given = (sampler, steps, start_step, samples, seed, presegmentation_weight)
        self.overrides: dict[str, Any] = {
            key: value for key, value in zip(OVERRIDES, given, strict=True) if value is not None
        }
        self.fusion, self.joint, self.keep_samples = fusion, joint, keep_samples
        self.trust_checkpoint, self.state_memory_gb = trust_checkpoint, state_memory_gb
        self.threads, self.deterministic = threads_of(device) if threads is None else threads, deterministic
        if self.threads < 1:
            raise ValueError(f"threads is {threads}, but must be 1 or more")
        if deterministic:
            ask_cublas()
        self.folds: list[str] = []
        self.identity: dict[str, Any] = {}  # identifies the model in each case's report
        self.weight_hashes: list[str] = []  # one per fold, computed on first use

    # loading ---------------------------------------------------------------------------------------------------------

    def initialize_from_trained_model_folder(
        self, model_training_output_dir: str, use_folds: Folds, checkpoint_name: str = "checkpoint_final.pth"
    ) -> None:
        """Load a model as nnU-Net does, without running code from its files.

        Raises:
            FileNotFoundError: the folder, a file or a fold is missing.
            ValueError: a file is damaged or unsafe, the model is not from a diffusion trainer, or a setting is wrong.
        """
        folds = [use_folds] if isinstance(use_folds, (str, int)) else use_folds
        model = read_model(Path(model_training_output_dir), folds, checkpoint_name, self.trust_checkpoint)
        plans = PlansManager(model.plans)
        configuration = plans.get_configuration(model.configuration)
        # nnU-Net prints the folders in which it searches for trainers
        with _silent(), trusting(self.trust_checkpoint):
            trainer = trainer_class(model.trainer_name, model_training_output_dir)
            network = trainer.build_network_architecture(
                plans,
                configuration,
                determine_num_input_channels(plans, configuration, model.dataset_json),
                plans.get_label_manager(model.dataset_json).num_segmentation_heads,
                enable_deep_supervision=False,
            )
        network.load_state_dict(model.weights[0])
        if os.environ.get(COMPILE, "").lower() in ("true", "1", "t"):  # as nnU-Net's own predictor reads it
            network.compile_inference()
        self.manual_initialization(
            network, plans, configuration, model.weights, model.dataset_json, model.trainer_name, model.mirroring_axes
        )
        self.folds = model.folds
        self.identity |= {"configuration": model.configuration, "checkpoint": checkpoint_name}

    def manual_initialization(
        self,
        network: torch.nn.Module,
        plans_manager: PlansManager,
        configuration_manager: Any,
        parameters: list[dict] | None,
        dataset_json: dict,
        trainer_name: str,
        inference_allowed_mirroring_axes: Sequence[int] | None,
    ) -> None:
        """Use a network that has been built already.

        Raises:
            TypeError: it is not a DiffusionSegmenter.
            ValueError: a setting given to the predictor is incompatible with the model.
        """
        if not isinstance(network, DiffusionSegmenter):
            raise TypeError(
                f"DiffusionPredictor predicts with a DiffusionSegmenter, got {type(network).__name__} of {trainer_name}."
            )
        network = copy.copy(network)  # shares the weights; the caller's network keeps its settings
        network.settings = dataclasses.replace(network.settings, **self._fitting_overrides(network))
        self.plans_manager, self.configuration_manager = plans_manager, configuration_manager
        self.network, self.dataset_json, self.trainer_name = network, dataset_json, trainer_name
        # nnU-Net passes None if the network has its weights already
        self.list_of_parameters = parameters if parameters is not None else [network.state_dict()]
        self.allowed_mirroring_axes = inference_allowed_mirroring_axes
        self.label_manager = plans_manager.get_label_manager(dataset_json)
        self.folds = [str(number) for number in range(len(self.list_of_parameters))]
        self.identity = {"trainer": trainer_name, "plans": plans_manager.plans_name}
        self.weight_hashes = []

    def _fitting_overrides(self, network: DiffusionSegmenter) -> dict[str, Any]:
        """Return the given settings. If `start_step` is given but `steps` is not, limit the model's steps to it."""
        changes = dict(self.overrides)
        if "start_step" in changes:
            changes.setdefault("steps", min(network.settings.steps, changes["start_step"]))
            changes["from_noise"] = False
        return changes

    # one volume ------------------------------------------------------------------------------------------------------

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Return logits (K, *volume) of the mean probabilities; `data` (C, *volume), as nnU-Net's method."""
        return self.predict_volume(data).logits

    def predict_volume(
        self,
        data: Tensor,
        presegmentation: Presegmentation | None = None,
        on_tiles: Callable[[int], object] | None = None,
    ) -> VolumePrediction:
        """Predict one preprocessed volume with all folds.

        Args:
            data: (C, *volume); in the cascade the channels of the previous stage follow those of the image.
            presegmentation: pre-segmentation to start from, instead of the embedded nnU-Net's.
            on_tiles: called with the number of finished tiles; by default it updates a bar, if bars are allowed.

        Raises:
            ValueError: the image or the output of a network is not finite.
            MemoryError: the state does not fit into memory.
        """
        if not all_finite(data):
            raise ValueError(
                "the image has NaN or infinite voxels after preprocessing (one in the file spoils all of it)"
            )
        begin = time.perf_counter()
        settings = self.network.settings
        members = Members(settings.regions, self.fusion != "mean", self.keep_samples)
        evaluations, notes = Evaluations(), []  # type: ignore[var-annotated]
        padded, unpad = pad_nd_image(
            data, self.configuration_manager.patch_size, "constant", {"value": 0}, return_slicer=True
        )
        tiling = self._tiling(padded)
        given = None if presegmentation is None else self._padded(presegmentation.probabilities)
        bar = None
        if on_tiles is None:
            rounds = (settings.steps + 1) * len(self.list_of_parameters)  # the pre-segmentation counts as one step
            bar = tqdm(
                total=rounds * len(tiling.tiles), unit="tile", disable=None if self.allow_tqdm else True, leave=False
            )
            on_tiles = bar.update
        self.network.to(self.device).eval()
        if (
            self.device.type == "cuda"
        ):  # only after the first use of the GPU: before that, torch rejects a device with an index
            torch.cuda.reset_peak_memory_stats(self.device)
        for fold, weights in zip(self.folds, self.list_of_parameters, strict=True):
            self.network.load_state_dict(weights)
            # autocast caches the cast weights until it ends, so each fold needs its own
            with computing(self.threads, self.deterministic), torch.inference_mode(), self._autocast():
                start, member = self._start(padded, tiling, given, presegmentation, evaluations, notes, on_tiles)
                if member is not None:
                    members.add(member, settings.presegmentation_weight)
                if settings.presegmentation_weight < 1 or member is None or self.keep_samples:
                    share = 1.0 if member is None else 1 - settings.presegmentation_weight
                    self._run_fold(fold, padded, tiling, start, share, members, evaluations, notes, on_tiles)
        if bar is not None:
            bar.close()
        with computing(self.threads, self.deterministic):
            return self._finished(members, unpad, evaluations, begin, notes)

    def _padded(self, probabilities: np.ndarray) -> Tensor:
        """Pad with background where the image is padded with zeros."""
        padded = pad_nd_image(
            torch.from_numpy(np.ascontiguousarray(probabilities)).float(),
            self.configuration_manager.patch_size,
            "constant",
            {"value": 0},
        )
        if not self.network.settings.regions:
            padded[0] += 1 - padded.sum(0)
        return padded

    def _tiling(self, data: Tensor) -> Tiling:
        patch = tuple(self.configuration_manager.patch_size)
        weight = torch.ones(patch, device=self.device)
        if self.use_gaussian:
            # as in nnU-Net, but in float32
            weight = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32,
                                      device=self.device)  # fmt: skip
        # a batch that fits in training, with gradients, also fits in inference
        batch = int(self.configuration_manager.batch_size)
        return Tiling(self._internal_get_sliding_window_slicers(data.shape[1:]), weight, batch, self.device)

    def _autocast(self) -> Any:
        return torch.autocast("cuda") if self.device.type == "cuda" else dummy_context()

    def _start(
        self,
        data: Tensor,
        tiling: Tiling,
        given: Tensor | None,
        presegmentation: Presegmentation | None,
        evaluations: Evaluations,
        notes: list[str],
        on_tiles: Callable[[int], object],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the probabilities to start from, and those that count as a member of the ensemble."""
        settings = self.network.settings
        if presegmentation is not None:
            on_tiles(len(tiling.tiles))
            # the probabilities of a label map, 0 and 1, say nothing about confidence
            counts = settings.presegmentation_weight > 0 and not presegmentation.certain
            return given, given if counts else None
        own = None
        needed = not settings.from_noise or settings.condition_on_presegmentation
        if settings.presegmentation_weight > 0 or (needed and settings.start_from == "presegmentor"):
            own = self._presegment(data, tiling, evaluations, notes)
        on_tiles(len(tiling.tiles))
        start = self.network.own_start(data[None], None if own is None else own[None])[0] if needed else None
        return start, own if settings.presegmentation_weight > 0 else None

    def _presegment(self, data: Tensor, tiling: Tiling, evaluations: Evaluations, notes: list[str]) -> Tensor:
        """Segment the volume with nnU-Net's own sliding window. Return probabilities (K, *volume), float32."""
        network, bar = self.network, self.allow_tqdm

        def run_and_count(image: Tensor) -> Any:
            evaluations.presegmentor += len(image)
            return network.run_presegmentor(image)

        self.network, self.allow_tqdm = run_and_count, False  # type: ignore[assignment]

        def probabilities(on_device: bool) -> Tensor:
            logits = self._internal_predict_sliding_window_return_logits(data, tiling.tiles, on_device)
            return labels.activate(logits[None], network.settings.regions)[0]

        # try only if it should fit: if nnU-Net's loop fails, one of its threads keeps the image on the GPU
        heads, channels = self.label_manager.num_segmentation_heads, len(data)
        bytes_per_voxel = 14 * heads + 4 * channels + 4  # sums in half precision, as float32, softmax; image; weights
        fits = self.device.type != "cuda" or bytes_per_voxel * data[0].numel() <= free_bytes(self.device)
        try:
            on_device = unless_out_of_memory(
                lambda: probabilities(fits and self.perform_everything_on_device), self.device
            )
            found = probabilities(False) if on_device is None else on_device
        finally:
            self.network, self.allow_tqdm = network, bar
        if self.perform_everything_on_device and not (fits and on_device is not None):
            tell(notes, f"the pre-segmentation does not fit on {self.device}: it is on the CPU")
        return found

    def _run_fold(
        self,
        fold: str,
        data: Tensor,
        tiling: Tiling,
        start: Tensor | None,
        share: float,
        members: Members,
        evaluations: Evaluations,
        notes: list[str],
        on_tiles: Callable[[int], object],
    ) -> None:
        settings, heads = self.network.settings, self.network.denoiser.state_channels
        limit, device = None if self.state_memory_gb is None else self.state_memory_gb * GIB, self.device
        if device.type == "cuda" and not self.perform_everything_on_device:
            limit, device = None, torch.device("cpu")  # the limit applies to the GPU
        empty_cache(self.device)  # cached memory of earlier networks counts as used

        def free(device: torch.device) -> float:
            return free_bytes(device) - (data.nbytes if device.type == "cuda" else 0)  # the image is there too

        plan = plan_memory(
            data.shape[1:], heads, settings.samples, settings.sampler, settings.steps, device, limit,
            tiling.samples_per_call, free,
        )  # fmt: skip
        tell(notes, plan.note)
        number = int(fold) if fold.isdecimal() else 0
        process = VolumeProcess(
            self.network, data, tiling, start, settings.seed, plan.device, on_tiles, evaluations, number
        )
        numbers = range(settings.samples)
        for first in range(0, settings.samples, plan.at_once):
            group = numbers[first : first + plan.at_once]
            process, found = run_group(process, group, self.joint, notes)
            for number, probabilities in zip(group, found, strict=True):
                members.add(probabilities, share / settings.samples, f"fold_{fold}_sample_{number}")

    def _finished(
        self, members: Members, unpad: Sequence[slice], evaluations: Evaluations, begin: float, notes: list[str]
    ) -> VolumePrediction:
        regions, inner = members.regions, (slice(None), *unpad[1:])
        mean = members.mean()[inner]
        refuse_nan(mean)
        decision = None
        if members.votes:
            votes = torch.stack(members.votes)
            where = (slice(None), *(inner if regions else inner[1:]))
            votes = votes[where]
            decision = labels.probabilities_to_logits(fuse(votes, mean, self.fusion, regions)[None], regions)[0]
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        return VolumePrediction(
            labels.probabilities_to_logits(mean[None], regions)[0].contiguous(),
            decision,
            {name: logits[inner].contiguous() for name, logits in members.samples.items()},
            evaluations,
            time.perf_counter() - begin,
            peak_bytes(self.device),
            notes,
        )
