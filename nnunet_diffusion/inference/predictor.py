"""DiffusionPredictor: nnU-Net's predictor with PD-DDPM, one reverse process per volume."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_diffusion.files import find_images, refuse_overwriting
from nnunet_diffusion.inference.cases import (
    CaseFiles,
    FailedCases,
    PreparedCase,
    available_cores,
    run_cases,
    worker_numbers,
)
from nnunet_diffusion.inference.ensemble import VolumePrediction
from nnunet_diffusion.inference.finished import hash_of_json, hash_of_weights, is_finished, why_not_kept
from nnunet_diffusion.inference.output import Managers, PredictedCase, mask_of, remove_case, write_case
from nnunet_diffusion.inference.progress import Progress
from nnunet_diffusion.inference.staging import not_writable, staging_folders
from nnunet_diffusion.inference.volume_predictor import VolumePredictor
from nnunet_diffusion.model.settings import inference_settings

VERSIONS = ("nnunet-diffusion", "nnunetv2", "torch", "numpy", "SimpleITK")


class DiffusionPredictor(VolumePredictor):
    """nnU-Net's predictor for models of `DiffusionTrainer`, with the same interface as nnU-Net's.

    For the settings of the reverse process see `VolumePredictor`.

    Attributes:
        progress: progress of the last call of `predict_from_files`; None before its first case begins.
    """

    progress: Progress | None = None

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
            OSError: nothing can be written to the output folder.
            ValueError: images or arguments are missing or incompatible, or finished cases have other settings.
        """
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.progress = None
        self._check_arguments(arguments)
        cases, left_out = self._find_cases(arguments)
        part = cases[part_id::num_parts]
        if not overwrite:
            self._refuse_other_settings(cases, save_probabilities)
            part = [
                case
                for case in part
                if case.target is None or not is_finished(case.target, self._managers, save_probabilities)
            ]
        self._prepare_output(arguments, part)
        numbers = num_processes_preprocessing, num_processes_segmentation_export
        try:
            results = self._run_cases(part, save_probabilities, numbers)
        except FailedCases as error:
            raise FailedCases(error.failures, len(part), left_out) from None
        if left_out:
            raise FailedCases({}, len(part), left_out)
        return results

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        number, of = arguments["part_id"], arguments["num_parts"]
        if not 0 <= number < of:
            raise ValueError(f"part_id is {number}; it must be 0 to num_parts - 1 = {of - 1}")
        given = arguments["presegmentation_folder"]
        if given is not None and self.network.settings.from_noise:
            raise ValueError(
                f"The model starts from pure noise (from_noise in its plans), so what {given} holds would not be the start: "
                "give a start step too (--start_step)."
            )
        previous, folder = (
            self.configuration_manager.previous_stage_name,
            arguments["folder_with_segs_from_prev_stage"],
        )
        if previous is not None and folder is None:
            raise ValueError(f"This configuration needs the segmentations of {previous}: give their folder.")
        if previous is None and folder is not None:
            raise ValueError(
                f"This configuration has no previous stage, whose segmentations {folder} would be: leave them out, or give "
                "them as presegmentation_folder (--presegmentation) to start from."
            )

    def _find_cases(self, arguments: dict[str, Any]) -> tuple[list[CaseFiles], dict[str, str]]:
        """Return the cases of all parts, and the images left out with the reason for each."""
        source = arguments["list_of_lists_or_source_folder"]
        output = arguments["output_folder_or_list_of_truncated_output_files"]
        previous, given = arguments["folder_with_segs_from_prev_stage"], arguments["presegmentation_folder"]
        ending = self.dataset_json["file_ending"]
        left_out: dict[str, str] = {}
        if isinstance(source, list):
            names, images = [Path(files[0]).name[: -len(f"_0000{ending}")] for files in source], source
        else:
            found = find_images(source, ending)
            names, images, left_out = list(found.cases), list(found.cases.values()), found.left_out
        targets = (
            output if isinstance(output, list) else [str(Path(output, name)) for name in names] if output else None
        )
        if targets is not None:
            folders = {"-i": None if isinstance(source, list) else source}
            folders |= {"--presegmentation": given, "-prev_stage_predictions": previous}
            refuse_overwriting([Path(target) for target in targets], ending, images, folders)
        cases = [
            CaseFiles(
                Path(targets[number]).name if targets else names[number],
                files,
                targets[number] if targets else None,
                None if previous is None else str(Path(previous, f"{names[number]}{ending}")),
                given,
            )
            for number, files in enumerate(images)
        ]
        return cases, left_out

    def _refuse_other_settings(self, cases: list[CaseFiles], save_probabilities: bool) -> None:
        """Raise ValueError if a finished case was predicted with other settings than this run's."""
        ending = self.dataset_json["file_ending"]
        for case in cases:
            if case.target is None or not mask_of(case.target, ending).is_file():
                continue
            reason = why_not_kept(case.target, ending, self._deciding(case, save_probabilities))
            if reason and is_finished(case.target, self._managers, save_probabilities):
                raise ValueError(reason)

    def _prepare_output(self, arguments: dict[str, Any], cases: list[CaseFiles]) -> None:
        """Write the description of the run, and remove the cases' files of earlier runs."""
        target = arguments["output_folder_or_list_of_truncated_output_files"]
        if not target:
            return
        folder = Path(target[0]).parent if isinstance(target, list) else Path(target)
        try:
            for case in cases:
                remove_case(str(case.target), self.dataset_json["file_ending"])
            self._write_description(folder, arguments)
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
                results.append(write_case(predicted, self._managers, save_probabilities, stages))
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
    def _managers(self) -> Managers:
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
            return run_cases(
                cases, predict, self._managers, save_probabilities, preparing, writing, self.progress.count
            )
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
            {**self._deciding(case, save_probabilities), **self._report(case, prepared, prediction)},
        )

    def _deciding(self, case: CaseFiles, save_probabilities: bool) -> dict[str, Any]:
        """Return all settings that determine the files of a case and their content, except its image."""
        if not self.weight_hashes:
            self.weight_hashes = [hash_of_weights(weights) for weights in self.list_of_parameters]
        given, previous = case.presegmentation, case.previous_stage
        settings = self.network.settings
        return {
            **self.identity,
            "folds": self.folds,
            **{key: getattr(settings, key) for key in (*inference_settings(), "start_from")},
            "fusion": self.fusion,
            "joint": self.joint,
            "tile_step_size": self.tile_step_size,
            "use_gaussian": self.use_gaussian,
            "mirrored_presegmentation": bool(self.use_mirroring and self.allowed_mirroring_axes),
            "presegmentation_folder": None if given is None else str(Path(given).resolve()),
            "previous_stage_folder": None if previous is None else str(Path(previous).resolve().parent),
            "save_probabilities": save_probabilities,
            "keep_samples": self.keep_samples,
            "weights_sha256": self.weight_hashes,
            "plans_sha256": hash_of_json(self.plans_manager.plans),
        }

    def _report(self, case: CaseFiles, prepared: PreparedCase, prediction: VolumePrediction) -> dict[str, Any]:
        settings, given = self.network.settings, prepared.presegmentation
        own = "noise" if settings.from_noise else settings.start_from
        return {
            "case": case.name,
            "images": [str(path) for path in case.images],
            "voxels": list(prepared.data.shape[1:]),
            "start": own if given is None else given.source,
            "network_evaluations": dataclasses.asdict(prediction.evaluations),
            "seconds": round(prediction.seconds, 3),
            "peak_memory_bytes": prediction.peak_bytes,
            "device": str(self.device),
            "threads": self.threads,
            "deterministic": self.deterministic,
            "notes": [*prepared.notes, *prediction.notes],
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }

    def _write_description(self, folder: Path, arguments: dict[str, Any]) -> None:
        """Write the files next to the segmentations that nnU-Net writes and its other commands read."""
        described = {
            **arguments,
            "diffusion": self.network.settings.to_plans(),
            "fusion": self.fusion,
            "joint": self.joint,
        }
        recursive_fix_for_json_export(described)
        files = {
            "predict_from_raw_data_args.json": described,
            "dataset.json": self.dataset_json,
            "plans.json": self.plans_manager.plans,
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            save_json(content, str(folder / name), sort_keys=False)
