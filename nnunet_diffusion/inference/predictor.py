"""DiffusionPredictor: nnU-Net's predictor with PD-DDPM, one reverse process per volume."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_diffusion.files import COMPILE
from nnunet_diffusion.inference.cases import (
    CaseFiles,
    FailedCases,
    PreparedCase,
    available_cores,
    run_cases,
    worker_numbers,
)
from nnunet_diffusion.inference.ensemble import VolumePrediction
from nnunet_diffusion.inference.finished import is_finished, why_not_kept
from nnunet_diffusion.inference.fusion import FUSIONS, needs_votes
from nnunet_diffusion.inference.loading import build_network, read_model
from nnunet_diffusion.inference.maps import writer_of
from nnunet_diffusion.inference.output import Managers, PredictedCase, mask_of, remove_case, write_case
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.inference.progress import Progress
from nnunet_diffusion.inference.report import (
    case_report,
    case_uncertainty,
    deciding_settings,
    foreground_names,
    write_description,
)
from nnunet_diffusion.inference.reproducible import ask_cublas, threads_of
from nnunet_diffusion.inference.request import Request
from nnunet_diffusion.inference.staging import not_writable, staging_folders
from nnunet_diffusion.inference.uncertainty import DEFAULT_SAMPLES, default_sampling
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model.drawing import LEVEL, NOTHING
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings

Folds = Sequence[int | str] | None
OVERRIDES = (
    "sampler", "steps", "start_step", "draw", "samples",
    "mirror_samples", "seed", "presegmentation_weight", "presence_threshold",
)  # fmt: skip
FEWEST_VOTES = 3


class DiffusionPredictor(nnUNetPredictor):
    """nnU-Net's predictor for models of `DiffusionTrainer`, with the same interface as nnU-Net's, and PD-DDPM.

    The embedded nnU-Net segments the whole volume with nnU-Net's own sliding window and mirroring. From its probabilities (or
    from given ones) one reverse process per sample runs on the whole volume; tiles are blended after each step. The result is
    the mean of the probabilities over samples, folds and, with `presegmentation_weight`, the pre-segmentor.

    Args:
        tile_step_size: as in nnU-Net, as a fraction of the patch.
        use_gaussian: as in nnU-Net, also for the tiles of the reverse process.
        use_mirroring: mirroring for the pre-segmentor and, with the setting `mirror_samples`, for the samples in turn.
        perform_everything_on_device: keep the volume on the GPU if it fits.
        device: device of the networks.
        verbose: as in nnU-Net.
        verbose_preprocessing: as in nnU-Net.
        allow_tqdm: show a bar over tiles x steps.
        sampler: name of the sampler. For this and the next nine arguments, None means the model's setting.
        steps: number of evaluations in one reverse process.
        start_step: T' of PD-DDPM; of several values, the samples take one in turn.
        start_snr: T' stated as a signal-to-noise ratio, which means the same in every noise schedule.
        draw: what is noised again between two steps: "no" for the estimate, "voxels" or "level" for a mask drawn from it.
        samples: number of reverse processes.
        mirror_samples: mirror the image for the samples in turn, as nnU-Net mirrors it.
        seed: seed of their noise.
        presegmentation_weight: weight of the pre-segmentor's probabilities in the result, 0..1; in a vote, one vote if > 0.
        presence_threshold: largest probability in the image below which a foreground class is left out, 0..1; 0: none is.
        fusion: a name in `FUSIONS`. It affects the segmentation; the probabilities are always the mean.
        joint: True for one reverse process per volume; False for one per tile, as in nnU-Net's own prediction.
        keep_samples: keep the result of each sample.
        uncertainty: write maps of uncertainty, and volumes and agreement of the samples, to `uncertainty` in the output folder;
            at least two samples, by default those of `default_sampling`.
        calibrated: scale the probabilities by the temperature that `nnunet_diffusion calibrate` fitted, and take its intervals
            for the volumes.
        trust_checkpoint: also load files that may run code.
        state_memory_gb: limit of the device memory for a volume's state and its tiles' conditions, in GiB; None for the free
            memory.
        threads: number of CPU threads, on which the last bits depend. None for the default of `nnunet_diffusion predict`:
            one per core, or one thread if the device is a GPU.
        deterministic: use only GPU algorithms that return identical bits on each call.

    Attributes:
        progress: progress of the last call of `predict_from_files`; None before its first case begins.
        deadline: `time.perf_counter()` at which the samples of the next volume shall be drawn; None for no limit. The first
            sample of each fold is drawn in any case, and as many others as fit, by the time that the first one took.
        planned: settings of the model's plans, without those given to the predictor; known when a model is loaded.

    Raises:
        ValueError: the fusion is unknown, `start_step` is empty, or `threads` is not positive. The settings are checked when a
            model is loaded.
    """

    progress: Progress | None = None
    deadline: float | None = None
    planned: DiffusionSettings

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
        start_step: int | Sequence[int] | None = None,
        start_snr: float | None = None,
        draw: str | None = None,
        samples: int | None = None,
        mirror_samples: bool | None = None,
        seed: int | None = None,
        presegmentation_weight: float | None = None,
        presence_threshold: float | None = None,
        fusion: str = "mean",
        joint: bool = True,
        keep_samples: bool = False,
        uncertainty: bool = False,
        calibrated: bool = False,
        trust_checkpoint: bool = False,
        state_memory_gb: float | None = None,
        threads: int | None = None,
        deterministic: bool = False,
    ) -> None:
        on_device = perform_everything_on_device and device.type == "cuda"
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # without a GPU, nnU-Net warns about perform_everything_on_device by default
            super().__init__(tile_step_size, use_gaussian, use_mirroring, on_device, device, verbose, verbose_preprocessing,
                             allow_tqdm)  # fmt: skip
        self.allow_tqdm: bool = allow_tqdm
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; known: {', '.join(FUSIONS)}")
        starts = [] if start_step is None else [start_step] if isinstance(start_step, int) else list(start_step)
        if start_step is not None and not starts:
            raise ValueError("start_step has no value: give one or more")
        self.given_start_steps = self.start_steps = tuple(starts) if len(starts) > 1 else ()
        given = (
            sampler, steps, max(starts, default=None), draw, samples,
            mirror_samples, seed, presegmentation_weight, presence_threshold,
        )  # fmt: skip
        self.overrides: dict[str, Any] = {
            key: value for key, value in zip(OVERRIDES, given, strict=True) if value is not None
        }
        if start_step is not None and start_snr is not None:
            raise ValueError(f"start_step is {start_step} and start_snr {start_snr}, but both state T': give one")
        self.start_snr = start_snr
        self.fusion, self.joint, self.keep_samples, self.uncertainty = fusion, joint, keep_samples, uncertainty
        self.calibrated = calibrated
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
        network = build_network(model, model_training_output_dir, self.trust_checkpoint)
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
        self.planned = planned = network.settings
        changes, self.start_steps = self._fitting_overrides(planned)
        network.settings = dataclasses.replace(planned, **changes)
        self._check_samples(network.settings)
        self._tell_what_was_not_calibrated(planned, network.settings)
        self.plans_manager, self.configuration_manager = plans_manager, configuration_manager
        self.network, self.dataset_json, self.trainer_name = network, dataset_json, trainer_name
        # nnU-Net passes None if the network has its weights already
        self.list_of_parameters = parameters if parameters is not None else [network.state_dict()]
        self.allowed_mirroring_axes = inference_allowed_mirroring_axes
        self.label_manager = plans_manager.get_label_manager(dataset_json)
        self._check_half_widths()
        self._check_members()
        self.folds = [str(number) for number in range(len(self.list_of_parameters))]
        self.identity = {"trainer": trainer_name, "plans": plans_manager.plans_name}
        self.weight_hashes = []

    def _fitting_overrides(self, planned: DiffusionSettings) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Return the given settings and start steps, and the defaults of uncertainty where none of them is given.

        If `start_step` is given but `steps` is not, the model's steps are limited to it.
        """
        changes, starts = dict(self.overrides), self.given_start_steps
        if self.start_snr is not None:
            changes["start_step"] = planned.start_step_at(self.start_snr)
        if "start_step" in changes:
            changes.setdefault("steps", min(planned.steps, changes["start_step"]))
            changes["from_noise"] = False
        if self.uncertainty:
            default, in_turn = default_sampling(planned)
            if {"start_step", "steps", "draw"} & set(changes):
                default, in_turn = ({"samples": DEFAULT_SAMPLES} if planned.samples == 1 else {}), ()
            if "samples" in default and "samples" not in changes:
                how = f", from T' {', '.join(map(str, in_turn))} in turn" if in_turn else ""
                how += f", as level sets in {default['steps']} steps" if default.get("draw") == LEVEL else ""
                print(f"Uncertainty needs several samples: {default['samples']} are drawn{how}.", flush=True)
            changes = default | changes
            starts = starts or in_turn[: changes.get("samples", planned.samples)]
        return changes, starts

    def _check_samples(self, settings: DiffusionSettings) -> None:
        """Raise ValueError if the settings contradict several start steps, uncertainty, or calibration."""
        for start_step in self.start_steps:
            dataclasses.replace(settings, start_step=start_step, steps=min(settings.steps, start_step))
        if len(self.start_steps) > settings.samples:
            raise ValueError(
                f"start_step has {len(self.start_steps)} values, one for each sample in turn, but samples is "
                f"{settings.samples}: give --samples {len(self.start_steps)} or more"
            )
        if self.overrides.get("draw", NOTHING) != NOTHING and settings.steps < 2 and not settings.is_hidiff:
            raise ValueError(
                f"--draw {settings.draw} draws between two steps, but steps is {settings.steps}: give --steps 2 or more"
            )
        if self.calibrated and not settings.temperature:
            raise ValueError(
                "the model has no temperature: run nnunet_diffusion calibrate first, or leave --calibrated out"
            )
        if self.uncertainty and settings.samples < 2:
            raise ValueError("--uncertainty compares samples: give --samples 2 or more")
        if self.uncertainty and settings.presegmentation_weight == 1:
            raise ValueError(
                "--uncertainty and calibrate compare samples, but presegmentation_weight is 1, so none counts: give a "
                "--presegmentation_weight below 1, or write one into diffusion.inference of the model's plans.json"
            )

    def _check_half_widths(self) -> None:
        found, needed = len(self.volume_half_widths), len(foreground_names(self.label_manager))
        if found not in (0, needed):
            raise ValueError(
                f"diffusion.inference.volume_half_widths of the model's plans has {found} numbers for {needed} foreground "
                "classes: run nnunet_diffusion calibrate again"
            )

    def _check_members(self) -> None:
        settings = self.network.settings
        samples = 0 if settings.presegmentation_weight == 1 else settings.samples
        members = len(self.list_of_parameters) * (samples + (settings.presegmentation_weight > 0))
        if needs_votes(self.fusion) and members < FEWEST_VOTES:
            raise ValueError(
                f"--fusion {self.fusion} needs {FEWEST_VOTES} segmentations or more (samples and, with a "
                f"presegmentation_weight, nnU-Net's own, of each fold), but there are {members}: give --samples {FEWEST_VOTES}"
            )

    def _tell_what_was_not_calibrated(self, planned: DiffusionSettings, used: DiffusionSettings) -> None:
        changes, starts = default_sampling(planned)
        keys = [key for key in OVERRIDES if key not in ("seed", "presence_threshold")]
        expected = {key: getattr(dataclasses.replace(planned, **changes), key) for key in keys}
        found = {key: getattr(used, key) for key in keys}
        for each, in_turn in ((expected, starts), (found, self.start_steps)):
            each["start_step"] = list(in_turn) or each["start_step"]
        differing = [f"{key} {found[key]} instead of {expected[key]}" for key in keys if found[key] != expected[key]]
        if self.calibrated and differing:
            print(
                f"The model was calibrated for --uncertainty, but now has {', '.join(differing)}: the probabilities may need "
                "another temperature, and the volumes other intervals.",
                flush=True,
            )

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
        """Predict one preprocessed volume with all folds; see `VolumeRun` and its `predict` for arguments and errors."""
        return VolumeRun(self, data, presegmentation).predict(on_tiles)

    # many cases ------------------------------------------------------------------------------------------------------

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int | None = None,
        num_processes_segmentation_export: int | None = None,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        presegmentation_folder: str | None = None,
    ) -> list[Any]:
        """Predict files as nnU-Net's method does; with `presegmentation_folder`, start from the segmentations in it.

        In addition to nnU-Net's files, the output folder contains `reports/CASE.json` and, if samples are kept,
        `samples/fold_F_sample_N/CASE`. Files of earlier runs are removed when their case is predicted again. With
        `overwrite=False`, finished cases are skipped; they must have been predicted with the same model and settings. If a
        number of processes is None, it is chosen from the numbers of cores and cases.

        Raises:
            FailedCases: some cases failed or images were left out, with their names and reasons. All others are finished.
            NotImplementedError: maps of uncertainty cannot be written in the images' format.
            OSError: nothing can be written to the output folder.
            ValueError: images or arguments are missing or incompatible, or finished cases have other settings.
        """
        request = Request(**{key: value for key, value in locals().items() if key not in ("self", "__class__")})
        self.progress = None
        request.check(self.network.settings, self.configuration_manager)
        if self.uncertainty:
            writer_of(self.plans_manager.image_reader_writer_class)  # raises before a case is predicted
        cases, left_out = request.find_cases(self.dataset_json["file_ending"])
        part = cases[part_id::num_parts]
        if not overwrite:
            part = self._unfinished(cases, part, save_probabilities)
        self._prepare_output(request, part)
        numbers = num_processes_preprocessing, num_processes_segmentation_export
        try:
            results = self._run_cases(part, save_probabilities, numbers)
        except FailedCases as error:
            raise FailedCases(error.failures, len(part), left_out) from None
        if left_out:
            raise FailedCases({}, len(part), left_out)
        return results

    def _unfinished(self, cases: list[CaseFiles], part: list[CaseFiles], save_probabilities: bool) -> list[CaseFiles]:
        """Return the cases of a part that are not finished.

        Raises:
            ValueError: a finished case of any part was predicted with other settings than this run's.
        """
        ending, finished = self.dataset_json["file_ending"], set()
        for case in cases:
            if case.target is None or not mask_of(case.target, ending).is_file():
                continue
            if is_finished(case.target, self.managers, save_probabilities):
                reason = why_not_kept(case.target, ending, deciding_settings(self, case, save_probabilities))
                if reason:
                    raise ValueError(reason)
                finished.add(case.target)
        return [case for case in part if case.target not in finished]

    def _prepare_output(self, request: Request, cases: list[CaseFiles]) -> None:
        """Write the description of the run, and remove the cases' files of earlier runs."""
        folder = request.output_folder
        if folder is None:
            return
        try:
            for case in cases:
                remove_case(str(case.target), self.dataset_json["file_ending"])
            write_description(self, request, folder)
        except OSError as error:
            raise not_writable(folder, error) from error

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
        presegmentation_folder: str | None = None,
    ) -> list[Any]:
        """As `predict_from_files`, in this process only."""
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            0,
            0,
            folder_with_segs_from_prev_stage,
            presegmentation_folder=presegmentation_folder,
        )

    def predict_from_data_iterator(
        self,
        data_iterator: Any,
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """Predict the items of nnU-Net's data iterator: dictionaries with `data`, `data_properties` and `ofile`."""
        results = []
        for item in data_iterator:
            data = item["data"]
            if isinstance(data, str):
                path, data = data, torch.from_numpy(np.load(data))
                os.remove(path)  # as nnU-Net's method does: its iterators pass arrays too large for a pipe so
            target = item["ofile"]
            name = "image" if target is None else Path(target).name
            prepared = PreparedCase(np.asarray(data), item["data_properties"], None)
            predicted = self._predict_case(CaseFiles(name, (), target), prepared, save_probabilities)
            with staging_folders([] if target is None else [Path(target).parent]) as stages:
                results.append(write_case(predicted, self.managers, save_probabilities, stages))
        return results

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: dict,
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Any:
        """Predict one image (C, *image) with `image_properties` of nnU-Net's reader; the result is as in nnU-Net's method."""
        source = PreprocessAdapterFromNpy(
            [input_image], [segmentation_previous_stage], [image_properties], [output_file_truncated],
            *(self.plans_manager, self.dataset_json, self.configuration_manager),
            num_threads_in_multithreaded=1, verbose=self.verbose,
        )  # fmt: skip
        return self.predict_from_data_iterator([next(source)], save_or_return_probabilities)[0]

    @property
    def temperature(self) -> float:
        """Temperature of the probabilities; 1 unless they are calibrated."""
        return self.network.settings.temperature if self.calibrated else 1.0

    @property
    def volume_half_widths(self) -> tuple[float, ...]:
        """Half widths of the volumes' intervals, one for each foreground class; empty unless they are calibrated."""
        return self.network.settings.volume_half_widths if self.calibrated else ()

    @property
    def managers(self) -> Managers:
        """Plans, configuration and dataset.json of the model."""
        return self.plans_manager, self.configuration_manager, self.dataset_json

    def _run_cases(
        self, cases: list[CaseFiles], save_probabilities: bool, numbers: tuple[int | None, int | None]
    ) -> list[Any]:
        if not cases:
            print("No case is left to predict.", flush=True)
            return []
        chosen = worker_numbers(cases, available_cores())
        preparing, writing = (number if given is None else given for given, number in zip(numbers, chosen, strict=True))
        self.progress = Progress(len(cases), self.allow_tqdm)

        def predict(case: CaseFiles, prepared: PreparedCase) -> PredictedCase:
            return self._predict_case(case, prepared, save_probabilities)

        try:
            return run_cases(cases, predict, self.managers, save_probabilities, preparing, writing, self.progress.count)
        finally:
            self.progress.close()

    def _predict_case(self, case: CaseFiles, prepared: PreparedCase, save_probabilities: bool) -> PredictedCase:
        prediction = self.predict_volume(torch.from_numpy(prepared.data), prepared.presegmentation)
        for note in (*prepared.notes, *prediction.notes):
            print(f"{case.name}: {note}", flush=True)
        return PredictedCase(
            case.name,
            case.target,
            # NumPy arrays, because tensors are sent to other processes through /dev/shm
            prediction.logits.numpy(),
            None if prediction.decision is None else prediction.decision.numpy(),
            prepared.properties,
            {name: logits.numpy() for name, logits in prediction.samples.items()},
            {**deciding_settings(self, case, save_probabilities), **case_report(self, case, prepared, prediction)},
            *case_uncertainty(self, prepared, prediction),
        )
