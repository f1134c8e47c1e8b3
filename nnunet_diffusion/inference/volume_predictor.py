"""One volume: loading a model, pre-segmenting, reverse processes and their ensemble."""

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
    """nnU-Net's predictor of one volume, whose logits are made by PD-DDPM.

    The embedded nnU-Net segments the whole volume with nnU-Net's own sliding window, mirrored as nnU-Net mirrors. From its
    probabilities (or from those given) one reverse process per sample runs on the whole volume; its tiles are blended after
    each step. Probabilities are the mean over samples, folds and, with `presegmentation_weight`, the pre-segmentor.

    Args:
        tile_step_size: as nnU-Net's, share of the patch.
        use_gaussian: as nnU-Net's, also for the tiles of the reverse process.
        use_mirroring: of the pre-segmentor; the denoiser is never mirrored.
        perform_everything_on_device: keep the volume on the GPU where it fits.
        device: of the networks.
        verbose: as nnU-Net's.
        verbose_preprocessing: as nnU-Net's.
        allow_tqdm: show a bar over tiles x steps.
        sampler: None for the model's setting, as for the next ones.
        steps: evaluations of one reverse process.
        start_step: T' of PD-DDPM.
        samples: reverse processes.
        seed: of their noise.
        presegmentation_weight: share of the pre-segmentor's probabilities in the result, 0..1; in a vote, one vote if > 0.
        fusion: "mean", "majority" or "staple"; of the segmentation, never of the probabilities.
        joint: one reverse process per volume; False for one per tile, as stock prediction has it.
        keep_samples: keep each sample's own result.
        trust_checkpoint: load what may run code.
        state_memory_gb: memory of the device that a volume's state may take, in GiB; None for what is free.
        threads: of the CPU, on whose number the last bits depend; None for what `nnunet_diffusion predict` takes: one per core,
            beside a GPU one.
        deterministic: use algorithms of the GPU only that give the same bits on each call.

    Raises:
        ValueError: unknown fusion, or no positive number of threads; the settings are checked when a model is loaded.
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
        with _silent():  # off a GPU, nnU-Net warns of perform_everything_on_device unasked
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
        self.identity: dict[str, Any] = {}  # of the model, for the report of each case
        self.weight_hashes: list[str] = []  # of each fold, once they are needed

    # loading ---------------------------------------------------------------------------------------------------------

    def initialize_from_trained_model_folder(
        self, model_training_output_dir: str, use_folds: Folds, checkpoint_name: str = "checkpoint_final.pth"
    ) -> None:
        """Load a model as nnU-Net does, without running code from its files.

        Raises:
            FileNotFoundError: folder, file or fold is missing.
            ValueError: a file is damaged or unsafe, the model is none of a diffusion trainer, or a setting is wrong.
        """
        folds = [use_folds] if isinstance(use_folds, (str, int)) else use_folds
        model = read_model(Path(model_training_output_dir), folds, checkpoint_name, self.trust_checkpoint)
        plans = PlansManager(model.plans)
        configuration = plans.get_configuration(model.configuration)
        # nnU-Net's search for trainers says where it looks
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
        """Take a network that is built already.

        Raises:
            TypeError: it is no DiffusionSegmenter.
            ValueError: a setting given to the predictor does not fit the model's.
        """
        if not isinstance(network, DiffusionSegmenter):
            raise TypeError(
                f"DiffusionPredictor predicts with a DiffusionSegmenter, got {type(network).__name__} of {trainer_name}."
            )
        network = copy.copy(network)  # the same weights; the caller's own keeps its settings
        network.settings = dataclasses.replace(network.settings, **self._fitting_overrides(network))
        self.plans_manager, self.configuration_manager = plans_manager, configuration_manager
        self.network, self.dataset_json, self.trainer_name = network, dataset_json, trainer_name
        # nnU-Net gives None for the weights that the network has already
        self.list_of_parameters = parameters if parameters is not None else [network.state_dict()]
        self.allowed_mirroring_axes = inference_allowed_mirroring_axes
        self.label_manager = plans_manager.get_label_manager(dataset_json)
        self.folds = [str(number) for number in range(len(self.list_of_parameters))]
        self.identity = {"trainer": trainer_name, "plans": plans_manager.plans_name}
        self.weight_hashes = []

    def _fitting_overrides(self, network: DiffusionSegmenter) -> dict[str, Any]:
        """The settings given; without `steps`, no more of them than a given start step allows."""
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
        """Predict one preprocessed volume by all folds.

        Args:
            data: (C, *volume), in the cascade with the previous stage below the image.
            presegmentation: to start from in the place of the embedded nnU-Net's.
            on_tiles: called with the number of tiles done; by default a bar, where bars are allowed.

        Raises:
            ValueError: the image, or what a network makes of it, is not finite.
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
        if self.device.type == "cuda":  # now that it has been used: before, an indexed device is refused
            torch.cuda.reset_peak_memory_stats(self.device)
        for fold, weights in zip(self.folds, self.list_of_parameters, strict=True):
            self.network.load_state_dict(weights)
            # autocast keeps its casts of the weights until its end: one for all folds would go on with the first one's
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
        """Pad with background, as the image is padded with zeros."""
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
            # as nnU-Net's, but not in half precision
            weight = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32,
                                      device=self.device)  # fmt: skip
        # what fits in training, with gradients, fits in inference
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
            # a label map's certainty means nothing
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
        """Segment the volume by nnU-Net's own sliding window; probabilities (K, *volume), float32."""
        network, bar = self.network, self.allow_tqdm

        def run_and_count(image: Tensor) -> Any:
            evaluations.presegmentor += len(image)
            return network.run_presegmentor(image)

        self.network, self.allow_tqdm = run_and_count, False  # type: ignore[assignment]

        def probabilities(on_device: bool) -> Tensor:
            logits = self._internal_predict_sliding_window_return_logits(data, tiling.tiles, on_device)
            return labels.activate(logits[None], network.settings.regions)[0]

        # tried only where it should fit: when nnU-Net's loop fails, a thread of it stays and keeps the image on the GPU
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
            limit, device = None, torch.device("cpu")  # the limit is the GPU's
        empty_cache(self.device)  # what the last networks left there counts as taken

        def free(device: torch.device) -> float:
            return free_bytes(device) - (data.nbytes if device.type == "cuda" else 0)  # the image goes with the state

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
