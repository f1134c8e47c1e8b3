"""The cascade: segmentations of the previous stage come from nnU-Net, trained by the pre-segmentor's trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.model.settings import DiffusionSettings

SHOWN = 5


def previous_stage_folder(plans_manager: PlansManager, configuration: str, trainer_name: str) -> Path:
    """Return the folder to which nnU-Net's validation of the previous stage writes segmentations for `configuration`.

    Args:
        plans_manager: manager of the plans.
        configuration: name of a configuration with a previous stage.
        trainer_name: name of the trainer of the previous stage.
    """
    previous = plans_manager.get_configuration(configuration).previous_stage_name
    model = f"{trainer_name}__{plans_manager.plans_name}__{previous}"
    return Path(nnUNet_results or "") / plans_manager.dataset_name / model / "predicted_next_stage" / configuration


def refuse_incomplete_previous_stage(trainer: Any, cases: Sequence[str]) -> None:
    """Raise FileNotFoundError if a case has no segmentation of the previous stage; the message has the command to run.

    Args:
        trainer: diffusion trainer of a configuration with a previous stage.
        cases: names of the training and validation cases.
    """
    folder, manager = Path(trainer.folder_with_segs_from_previous_stage), trainer.plans_manager
    found = {path.stem for path in folder.glob("*")} if folder.is_dir() else set()
    missing = [case for case in cases if case not in found]
    if not missing:
        return
    previous = manager.get_configuration(trainer.configuration_name).previous_stage_name
    first, device = trainer.settings.presegmentor_trainer, trainer.device.type
    command = f"nnUNetv2_train {manager.dataset_name} {previous} $fold -tr {first} -p {manager.plans_name}"
    command += f" -device {device}" if device != "cuda" else ""
    folds = " ".join(map(str, range(_number_of_folds(trainer))))
    raise FileNotFoundError(
        f"{trainer.configuration_name} needs the segmentations that the validation of {previous} writes, but {len(missing)} of "
        f"{len(cases)} cases have none in {folder} ({', '.join(missing[:SHOWN])}{', ...' if len(missing) > SHOWN else ''}). "
        f"Run (with --val if these folds are trained already): for fold in {folds}; do {command}; done"
    )


def _number_of_folds(trainer: Any) -> int:
    splits = Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json"
    return len(json.loads(splits.read_text())) if splits.is_file() else 5


def refuse_impossible_start(settings: DiffusionSettings, previous_stage: str | None, configuration: str) -> None:
    """Raise an error if starts of the settings are not possible in this configuration.

    Raises:
        ValueError: the reverse process starts from the previous stage, but there is none.
        NotImplementedError: the same, and the labels are regions, whose masks cannot be derived from the previous stage's
            labels; or training starts out of fold in a cascade.
    """
    if previous_stage is not None and "out_of_fold" in settings.starts:
        raise NotImplementedError(
            f"diffusion.training.starts out_of_fold is not supported in a cascade, and {configuration} has the previous stage "
            f"{previous_stage}: leave that share out."
        )
    if settings.start_from != "previous_stage":
        return
    if previous_stage is None:
        raise ValueError(
            f"diffusion.presegmentor.start_from is 'previous_stage', but {configuration} has no previous stage; only the "
            "cascade's second configuration has one. Set it to 'presegmentor'."
        )
    if settings.regions:
        raise NotImplementedError(
            "DiffusionTrainer does not support diffusion.presegmentor.start_from 'previous_stage' with regions. "
            "Set it to 'presegmentor'."
        )
