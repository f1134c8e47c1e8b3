"""The cascade: segmentations of the previous stage are those of nnU-Net, the pre-segmentor's own trainer."""

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
    """Return where nnU-Net's validation of the previous stage leaves its segmentations for `configuration`.

    Args:
        plans_manager: of the plans.
        configuration: with a previous stage.
        trainer_name: of the previous stage's networks.
    """
    previous = plans_manager.get_configuration(configuration).previous_stage_name
    model = f"{trainer_name}__{plans_manager.plans_name}__{previous}"
    return Path(nnUNet_results or "") / plans_manager.dataset_name / model / "predicted_next_stage" / configuration


def refuse_incomplete_previous_stage(trainer: Any, cases: Sequence[str]) -> None:
    """Raise FileNotFoundError, with the commands that are missing, unless every case has a segmentation.

    Args:
        trainer: diffusion trainer of a configuration with a previous stage.
        cases: that training and validation need.
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
        f"{trainer.configuration_name} needs the segmentations that {previous} makes in its validation, and {len(missing)} of "
        f"{len(cases)} cases have none in {folder} ({', '.join(missing[:SHOWN])}{', ...' if len(missing) > SHOWN else ''}). "
        f"Run (with --val if these folds are trained already): for fold in {folds}; do {command}; done"
    )


def _number_of_folds(trainer: Any) -> int:
    splits = Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json"
    return len(json.loads(splits.read_text())) if splits.is_file() else 5


def refuse_impossible_start(settings: DiffusionSettings, previous_stage: str | None, configuration: str) -> None:
    """Raise if the reverse process cannot start from the previous stage although the settings want it to.

    Raises:
        ValueError: there is no previous stage.
        NotImplementedError: with regions, whose masks the previous stage's labels do not give.
    """
    if settings.start_from != "previous_stage":
        return
    if previous_stage is None:
        raise ValueError(
            f"diffusion.presegmentor.start_from is 'previous_stage', but {configuration} has none: only the cascade's second "
            "configuration does. Take 'presegmentor'."
        )
    if settings.regions:
        raise NotImplementedError(
            "DiffusionTrainer does not support diffusion.presegmentor.start_from 'previous_stage' with regions; "
            "'presegmentor' works."
        )
