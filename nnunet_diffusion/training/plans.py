"""Settings in the plans: read and checked before nnU-Net creates a folder, and written into them for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.model.settings import (
    EARLIER_STARTS,
    PLANS_KEY,
    REMOVED,
    VERSION,
    DiffusionSettings,
    default_settings,
)
from nnunet_diffusion.planning.record import RECORD_KEY, PlanRecord
from nnunet_diffusion.training.cascade import previous_stage_folder, refuse_impossible_start
from nnunet_diffusion.training.checkpoints import refuse_unknown_networks
from nnunet_diffusion.training.checks import refuse_foreign_plans, shared_with_other_folds
from nnunet_diffusion.training.presegmentor.fit import GivenPresegmentor

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


def planned_settings(
    plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], denoiser: str | None = None
) -> DiffusionSettings:
    """Return the settings of a configuration, with `regions` from the dataset.

    Args:
        plans: nnU-Net's plans.
        configuration: name of the configuration.
        dataset_json: content of dataset.json.
        denoiser: denoiser of the trainer; plans for another one give only the pre-segmentor, the rest are its defaults.

    Raises:
        NotImplementedError: the settings start the reverse process from the previous stage, but the labels are regions.
        ValueError: the plans are for another dataset, or their `diffusion` section is not valid.
    """
    refuse_foreign_plans(plans["dataset_name"], dataset_json)
    refuse_unknown_networks(plans, f"{plans.get('plans_name')}.json")
    manager = PlansManager(dict(plans))
    planned = manager.get_configuration(configuration)
    regions = manager.get_label_manager(dict(dataset_json)).has_regions
    settings = _read(planned.configuration, denoiser)
    if denoiser is not None and denoiser != settings.denoiser:
        settings = dataclasses.replace(
            default_settings(planned.configuration, denoiser=denoiser),
            presegmentor_trainer=settings.presegmentor_trainer,
            start_from=settings.start_from,
        )
    settings = dataclasses.replace(settings, regions=regions)
    PlanRecord.from_plans(planned.configuration)
    refuse_impossible_start(settings, planned.previous_stage_name, configuration)
    return settings


def _read(configuration: Mapping[str, Any], denoiser: str | None) -> DiffusionSettings:
    """Read the settings; where the plans name no denoiser, they are for the trainer's, unless our planner made them."""
    if denoiser is None or RECORD_KEY in configuration:
        return DiffusionSettings.from_plans(configuration)
    return DiffusionSettings.from_plans(configuration, denoiser)


def with_presegmentor(
    settings: DiffusionSettings, given: GivenPresegmentor | None, default_trainer: str
) -> DiffusionSettings:
    """Return the settings with the trainer and architecture of this training's pre-segmentor.

    Args:
        settings: settings in the plans.
        given: trained model named by the user; None for an nnU-Net of the same plans.
        default_trainer: trainer of the pre-segmentor if neither the user nor the plans name one.
    """
    if given is not None:
        settings = dataclasses.replace(
            settings, presegmentor_trainer=given.trainer_name, presegmentor_architecture=given.architecture
        )
    return dataclasses.replace(settings, presegmentor_trainer=settings.presegmentor_trainer or default_trainer)


def notes(configuration: Mapping[str, Any], denoiser: str | None = None) -> list[str]:
    """Return lines for the log on settings of the plans that this training reads differently; an empty list without any.

    Args:
        configuration: resolved configuration of the plans.
        denoiser: denoiser of the trainer; None for that of the plans.
    """
    section = configuration.get(PLANS_KEY, {})
    planned = _read(configuration, denoiser).denoiser
    if section and denoiser not in (None, planned):
        return [
            f"The plans' {PLANS_KEY} section is for the denoiser {planned!r}, but this trainer's is {denoiser!r}, which takes "
            f"its own defaults. To change them, write a {PLANS_KEY} section into the plans that has "
            f"{PLANS_KEY}.network.denoiser {denoiser!r} and what you change, nothing else."
        ]
    removed = [key for key in REMOVED if section.get(key) or section.get("training", {}).get(key)]
    lost = [f"WARNING: the plans' {key} does not exist any more; this training does without it." for key in removed]
    earlier = [key for key in EARLIER_STARTS if key in section or key in section.get("training", {})]
    if earlier:
        lost.append(
            f"The plans' {' and '.join(earlier)} are read as training.starts. Corrupted truths are now as wrong as the "
            "pre-segmentor's output, no longer by a fixed rule."
        )
    version = section.get("version", VERSION)
    if version >= VERSION:
        return lost
    return [
        *lost,
        f"The {PLANS_KEY} section of the plans has version {version}. It has the same meaning in version {VERSION}, and is "
        "written in that version into the model's plans.json.",
    ]


def adopt(trainer: DiffusionTrainer, settings: DiffusionSettings) -> None:
    """Set the settings of a trainer and write them into its plans, where inference finds them."""
    trainer.settings = settings
    trainer.initial_lr, trainer.weight_decay = settings.learning_rate, settings.weight_decay
    # write both, because the configuration manager holds a copy
    trainer.plans_manager.plans["configurations"][trainer.configuration_name][PLANS_KEY] = settings.to_plans()
    trainer.configuration_manager.configuration[PLANS_KEY] = settings.to_plans()
    if trainer.is_cascaded:
        trainer.folder_with_segs_from_previous_stage = str(
            previous_stage_folder(trainer.plans_manager, trainer.configuration_name, settings.presegmentor_trainer)
        )


def share_settings_of_folds(trainer: DiffusionTrainer) -> None:
    """Give an initialised trainer the inference settings of the folds already trained, and log it if they differ.

    Raises:
        ValueError: those folds have other settings of another section.
    """
    path = Path(trainer.output_folder_base) / "plans.json"
    settings = shared_with_other_folds(path, trainer.configuration_name, trainer.settings)
    if settings != trainer.settings:
        ours, theirs = dataclasses.asdict(trainer.settings), dataclasses.asdict(settings)
        changed = ", ".join(f"{key} {theirs[key]} (not {ours[key]})" for key in ours if ours[key] != theirs[key])
        trainer.print_to_log_file(
            f"The folds of a model share their inference settings. {path} has {changed}: to change that, edit this file."
        )
        adopt(trainer, settings)
        trainer.segmenter.settings = settings
