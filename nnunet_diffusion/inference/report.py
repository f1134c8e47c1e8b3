"""What is written beside the segmentations: the report of each case, and the description of the run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunet_diffusion.inference.cases import CaseFiles, PreparedCase
from nnunet_diffusion.inference.ensemble import VolumePrediction
from nnunet_diffusion.inference.finished import hash_of_json, hash_of_weights
from nnunet_diffusion.inference.reading import without_thickness
from nnunet_diffusion.inference.request import Request
from nnunet_diffusion.inference.uncertainty import numbers_of
from nnunet_diffusion.model.settings import inference_settings

if TYPE_CHECKING:
    from nnunet_diffusion.inference.predictor import DiffusionPredictor

VERSIONS = ("nnunet-diffusion", "nnunetv2", "torch", "numpy", "SimpleITK")


def deciding_settings(predictor: DiffusionPredictor, case: CaseFiles, save_probabilities: bool) -> dict[str, Any]:
    """Return all settings that determine the files of a case and their content, except its image."""
    if not predictor.weight_hashes:
        predictor.weight_hashes = [hash_of_weights(weights) for weights in predictor.list_of_parameters]
    given, previous = case.presegmentation, case.previous_stage
    settings = predictor.network.settings
    return {
        **predictor.identity,
        "folds": predictor.folds,
        **{key: getattr(settings, key) for key in (*inference_settings(), "start_from")},
        "start_step": _one_or_all(_start_steps(predictor)),
        "fusion": predictor.fusion,
        "joint": predictor.joint,
        "tile_step_size": predictor.tile_step_size,
        "use_gaussian": predictor.use_gaussian,
        "mirrored_presegmentation": bool(predictor.use_mirroring and predictor.allowed_mirroring_axes),
        "presegmentation_folder": None if given is None else str(Path(given).resolve()),
        "previous_stage_folder": None if previous is None else str(Path(previous).resolve().parent),
        "save_probabilities": save_probabilities,
        "keep_samples": predictor.keep_samples,
        "uncertainty": predictor.uncertainty,
        "temperature": predictor.temperature,
        "volume_half_widths": predictor.volume_half_widths,
        "weights_sha256": predictor.weight_hashes,
        "plans_sha256": hash_of_json(predictor.plans_manager.plans),
    }


def case_report(
    predictor: DiffusionPredictor, case: CaseFiles, prepared: PreparedCase, prediction: VolumePrediction
) -> dict[str, Any]:
    """Return how a case was predicted: files, start, cost, device and versions."""
    settings, given = predictor.network.settings, prepared.presegmentation
    own = "noise" if settings.from_noise else settings.start_from
    snr = predictor.network.process.schedule.snr
    return {
        "case": case.name,
        "images": [str(path) for path in case.images],
        "voxels": list(prepared.data.shape[1:]),
        "start": own if given is None else given.source,
        "start_snr": _one_or_all([float(f"{snr[step - 1]:.4g}") for step in _start_steps(predictor)]),
        "network_evaluations": dataclasses.asdict(prediction.evaluations),
        "seconds": round(prediction.seconds, 3),
        "peak_memory_bytes": prediction.peak_bytes,
        "device": str(predictor.device),
        "threads": predictor.threads,
        "deterministic": predictor.deterministic,
        "notes": [*prepared.notes, *prediction.notes],
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def case_uncertainty(
    predictor: DiffusionPredictor, prepared: PreparedCase, prediction: VolumePrediction
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Return a case's maps of uncertainty, and the numbers beside them; both empty unless they are asked for."""
    found = prediction.uncertainty
    if found is None:
        return {}, {}
    names = foreground_names(predictor.label_manager)
    each = voxel_mm3(prepared.properties, prepared.data.shape[1:])
    numbers = numbers_of(found, names, each, predictor.volume_half_widths)
    deciding = ("steps", "sampler", "draw", "samples", "mirror_samples", "seed", "presegmentation_weight")
    settings = {key: getattr(predictor.network.settings, key) for key in deciding}
    numbers["settings"] = {"start_step": _one_or_all(_start_steps(predictor)), **settings, "folds": predictor.folds}
    return {name: values.numpy() for name, values in found.maps.items()}, numbers


def foreground_names(label_manager: LabelManager) -> list[str]:
    """Return dataset.json's names of the foreground classes or regions, in the order of the heads."""
    names = {tuple(map(int, np.ravel(value))): name for name, value in label_manager.label_dict.items()}
    foreground = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    return [names[tuple(map(int, np.ravel(each)))] for each in foreground]


def voxel_mm3(properties: Mapping[str, Any], volume: Sequence[int]) -> float:
    """Return the volume in mm^3 of a voxel of the network's grid; the thickness of an image with two axes counts as 1 mm.

    Args:
        properties: properties of the preprocessed image.
        volume: size of the network's grid in voxels.
    """
    # not from the plans' spacing: the grid's shape is rounded
    image = math.prod(properties["shape_after_cropping_and_before_resampling"])
    return float(math.prod(without_thickness(properties["spacing"])) * image / math.prod(volume))


def _start_steps(predictor: DiffusionPredictor) -> tuple[int, ...]:
    return predictor.start_steps or (predictor.network.settings.start_step,)


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def write_description(predictor: DiffusionPredictor, request: Request, folder: Path) -> None:
    """Write the files beside the segmentations that nnU-Net writes and its other commands read."""
    described = {
        **dataclasses.asdict(request),
        "diffusion": predictor.network.settings.to_plans(),
        "fusion": predictor.fusion,
        "joint": predictor.joint,
        "uncertainty": predictor.uncertainty,
        "start_step": _one_or_all(_start_steps(predictor)),
    }
    recursive_fix_for_json_export(described)
    files = {
        "predict_from_raw_data_args.json": described,
        "dataset.json": predictor.dataset_json,
        "plans.json": predictor.plans_manager.plans,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        save_json(content, str(folder / name), sort_keys=False)
