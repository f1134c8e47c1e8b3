"""DiffusionPredictor: nnU-Net's predictor whose result is made by PD-DDPM, one reverse process per volume."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from tqdm import tqdm

from nnunet_diffusion.inference.cases import CaseFiles, PreparedCase, run_cases
from nnunet_diffusion.inference.ensemble import VolumePrediction
from nnunet_diffusion.inference.output import Managers, PredictedCase, remove_unfinished, write_case
from nnunet_diffusion.inference.volume_predictor import OVERRIDES, VolumePredictor

VERSIONS = ("nnunet-diffusion", "nnunetv2", "torch", "numpy", "SimpleITK")


class DiffusionPredictor(VolumePredictor):
    """nnU-Net's predictor for models of `DiffusionTrainer`: its methods take and return what nnU-Net's do.

    All settings of the reverse process are those of `VolumePredictor`.
    """

    # many cases ------------------------------------------------------------------------------------------------------

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        presegmentation_folder: str | None = None,
    ) -> list[Any]:
        """Predict files as nnU-Net's method does; with `presegmentation_folder`, from the segmentations in it.

        Beside nnU-Net's files the output folder gets `reports/CASE.json` and, where samples are kept,
        `samples/fold_F_sample_N/CASE`.

        Raises:
            FailedCases: some cases failed, with their names and reasons; all others are finished.
            ValueError: images or arguments are missing.
        """
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        if not 0 <= part_id < num_parts:
            raise ValueError(f"part_id is {part_id}; it must be 0 to num_parts - 1 = {num_parts - 1}")
        if presegmentation_folder is not None and self.network.settings.from_noise:
            raise ValueError(
                f"The model starts from pure noise (from_noise in its plans), so what {presegmentation_folder} holds would not "
                "be the start: give a start step too (--start_step)."
            )
        previous = self.configuration_manager.previous_stage_name
        if previous is not None and folder_with_segs_from_prev_stage is None:
            raise ValueError(f"This configuration needs the segmentations of {previous}: give their folder.")
        if previous is None and folder_with_segs_from_prev_stage is not None:
            raise ValueError(
                f"This configuration has no previous stage, whose segmentations {folder_with_segs_from_prev_stage} would be: "
                "leave them out, or give them as presegmentation_folder (--presegmentation) to start from."
            )
        first = f"_0000{self.dataset_json['file_ending']}"
        source = list_of_lists_or_source_folder
        if isinstance(source, str) and not any(Path(source).glob(f"*{first}")):
            raise ValueError(
                f"{source} holds no image: no file in it ends with {first}, as the model's dataset has them."
            )
        self._write_description(arguments)
        images, targets, from_previous = self._manage_input_and_output_lists(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            folder_with_segs_from_prev_stage,
            overwrite,
            part_id,
            num_parts,
            save_probabilities,
        )
        ending = len(self.dataset_json["file_ending"]) + len("_0000")
        cases = [
            CaseFiles(
                Path(targets[number]).name if targets else Path(files[0]).name[:-ending],
                files,
                targets[number] if targets else None,
                from_previous[number],
                presegmentation_folder,
            )
            for number, files in enumerate(images)
        ]
        return self._run_cases(
            cases, save_probabilities, num_processes_preprocessing, num_processes_segmentation_export
        )

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
        """Predict what an iterator of nnU-Net's gives: dictionaries with `data`, `data_properties` and `ofile`."""
        results = []
        for item in data_iterator:
            data = item["data"]
            if isinstance(data, str):
                path, data = data, torch.from_numpy(np.load(data))
                os.remove(path)  # as nnU-Net's method does: its iterators pass arrays too large for a pipe so
            target = item["ofile"]
            name = "image" if target is None else Path(target).name
            prepared = PreparedCase(np.asarray(data), item["data_properties"], None)
            predicted = self._predict_case(CaseFiles(name, (), target), prepared)
            results.append(write_case(predicted, self._managers, save_probabilities))
        return results

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: dict,
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> Any:
        """Predict one image (C, *image) with `image_properties` of nnU-Net's reader; returns as nnU-Net's method."""
        source = PreprocessAdapterFromNpy(
            [input_image], [segmentation_previous_stage], [image_properties], [output_file_truncated],
            *(self.plans_manager, self.dataset_json, self.configuration_manager),
            num_threads_in_multithreaded=1, verbose=self.verbose,
        )  # fmt: skip
        return self.predict_from_data_iterator([next(source)], save_or_return_probabilities)[0]

    @property
    def _managers(self) -> Managers:
        return self.plans_manager, self.configuration_manager, self.dataset_json

    def _run_cases(self, cases: list[CaseFiles], save_probabilities: bool, preparing: int, writing: int) -> list[Any]:
        for folder in {Path(case.target).parent for case in cases if case.target is not None}:
            remove_unfinished(folder)
        # in a log file, or where nnU-Net's bars are off, a line per case
        bar = tqdm(total=len(cases), unit="case", disable=None if self.allow_tqdm else True)
        begin = time.perf_counter()

        def on_case(name: str, failure: str) -> None:
            bar.update()
            seconds = time.perf_counter() - begin
            if failure:
                tqdm.write(f"{name} FAILED: {failure}", file=sys.stderr)
            elif self.allow_tqdm and bar.disable:
                print(f"{name} is finished, {seconds:.0f} s after the start", flush=True)

        try:
            return run_cases(cases, self._predict_case, self._managers, save_probabilities, preparing, writing, on_case)
        finally:
            bar.close()

    def _predict_case(self, case: CaseFiles, prepared: PreparedCase) -> PredictedCase:
        prediction = self.predict_volume(torch.from_numpy(prepared.data), prepared.presegmentation)
        for note in (*prepared.notes, *prediction.notes):
            print(f"{case.name}: {note}", flush=True)
        return PredictedCase(
            case.name,
            case.target,
            # plain arrays: tensors would go to other processes through /dev/shm
            prediction.logits.numpy(),
            None if prediction.decision is None else prediction.decision.numpy(),
            prepared.properties,
            {name: logits.numpy() for name, logits in prediction.samples.items()},
            self._report(case, prepared, prediction),
        )

    def _report(self, case: CaseFiles, prepared: PreparedCase, prediction: VolumePrediction) -> dict[str, Any]:
        settings, given = self.network.settings, prepared.presegmentation
        own = "noise" if settings.from_noise else settings.start_from
        return {
            "case": case.name,
            "images": [str(path) for path in case.images],
            "voxels": list(prepared.data.shape[1:]),
            **{key: getattr(settings, key) for key in (*OVERRIDES, "eta", "from_noise")},
            "start": own if given is None else given.source,
            "fusion": self.fusion,
            "joint": self.joint,
            "folds": self.folds,
            "mirrored_presegmentation": bool(self.use_mirroring and self.allowed_mirroring_axes),
            "network_evaluations": dataclasses.asdict(prediction.evaluations),
            "seconds": round(prediction.seconds, 3),
            "peak_memory_bytes": prediction.peak_bytes,
            "device": str(self.device),
            "threads": self.threads,
            "deterministic": self.deterministic,
            "notes": [*prepared.notes, *prediction.notes],
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }

    def _write_description(self, arguments: dict[str, Any]) -> None:
        """Write beside the segmentations what nnU-Net writes and its other commands look for."""
        target = arguments["output_folder_or_list_of_truncated_output_files"]
        if target is None:
            return
        folder = Path(target) if isinstance(target, str) else Path(target[0]).parent
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                save_json(content, str(folder / name), sort_keys=False)
        except OSError as error:
            raise OSError(
                f"Nothing can be written to {folder} ({error}): make it writable or choose another -o."
            ) from error
