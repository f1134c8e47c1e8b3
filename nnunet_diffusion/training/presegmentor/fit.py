"""Checks that a trained nnU-Net can be the pre-segmentor of a training, and building its network (layer 3)."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER, says_not_found
from nnunet_diffusion.networks.architectures import refuse_unknown_classes
from nnunet_diffusion.planning.data_reuse import SAME_DATA, same_entries
from nnunet_diffusion.training.checkpoints import DIFFUSION_KEY, read_checkpoint
from nnunet_diffusion.training.presegmentor.lock import SUMMARY, measured_cases

# entries that must agree, so that the denoiser can start from the pre-segmentor's output
SAME_DATASET = ("labels", "regions_class_order", "channel_names")
SAME_PLANS = ("dataset_name", "transpose_forward", "image_reader_writer")
SAME_PREPROCESSING = (*SAME_DATA, "previous_stage")
INTENSITIES = "foreground_intensity_properties_per_channel"  # CT images are normalised with them
SAME_NETWORK = ("patch_size", "architecture")


@dataclass(frozen=True)
class GivenPresegmentor:
    """A trained nnU-Net of any architecture, named by the user.

    Attributes:
        checkpoint: path of the fold's final checkpoint.
        trainer_name: name of its trainer.
        architecture: `architecture` in its plans.
    """

    checkpoint: Path
    trainer_name: str
    architecture: dict[str, Any]


def given_presegmentor(fold: int | str, patch_size: Sequence[int]) -> GivenPresegmentor | None:
    """Return the pre-segmentor in the model folder that `nnUNet_diffusion_presegmentor` names; None if it is not set.

    Args:
        fold: fold of this training.
        patch_size: patch size of this training.

    Raises:
        FileNotFoundError: the folder has no finished training of that fold.
        ValueError: the model is a diffusion model, has another number of axes or a network class that is not allowed, or the
            patch size is not divisible by the network's strides.
    """
    folder = os.environ.get(PRESEGMENTOR_FOLDER)
    if not folder:
        return None
    path = Path(folder) / f"fold_{fold}" / "checkpoint_final.pth"
    if not path.is_file():
        raise FileNotFoundError(
            f"{PRESEGMENTOR_FOLDER} is {folder}, but {path} does not exist: name a model folder of nnU-Net "
            "(TRAINER__PLANS__CONFIGURATION) in which the training of this fold is finished, or unset the variable."
        )
    checkpoint = read_checkpoint(path)
    if DIFFUSION_KEY in checkpoint:
        raise ValueError(
            f"{PRESEGMENTOR_FOLDER} is {folder}, a model of {checkpoint['trainer_name']}, itself a diffusion trainer: name the "
            "folder of nnU-Net's own model, or unset the variable."
        )
    init = checkpoint["init_args"]
    theirs = PlansManager(init["plans"]).get_configuration(init["configuration"]).configuration
    architecture = theirs["architecture"]
    refuse_unknown_classes(architecture, str(path))
    if len(theirs["patch_size"]) != len(patch_size):
        raise ValueError(
            f"{PRESEGMENTOR_FOLDER} is {folder}, a model of the configuration {init['configuration']} in "
            f"{len(theirs['patch_size'])}D, but this training is in {len(patch_size)}D: name a model in {len(patch_size)}D, or "
            "unset the variable."
        )
    for axis, size in enumerate(patch_size):
        stride = math.prod(each[axis] for each in architecture["arch_kwargs"].get("strides", []))
        if size % stride:
            raise ValueError(
                f"{PRESEGMENTOR_FOLDER} is {folder}, whose network downsamples axis {axis} by {stride}, but the patch "
                f"size of these plans, {list(patch_size)}, is not divisible by {stride} there: plan another patch size, or "
                "unset the variable."
            )
    return GivenPresegmentor(path, checkpoint["trainer_name"], architecture)


def load_presegmentor_weights(
    path: Path,
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: Mapping[str, Any],
    validation_cases: Sequence[str],
    *,
    given: bool = False,
    mirrored: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the weights of a pre-segmentor after checking that it fits.

    Args:
        path: final checkpoint of the pre-segmentor, in the folder of its fold.
        plans: plans of this training.
        configuration: configuration of this training.
        fold: fold of this training.
        dataset_json: dataset.json of this training.
        validation_cases: validation cases of this training.
        given: whether the user named it; it may then have another architecture, patch size and configuration name.
        mirrored: axes along which this training mirrors.

    Raises:
        ValueError: the pre-segmentor was trained on another dataset, fold or split, with other labels, channels, preprocessing
            or (unless given) architecture, or without mirroring along one of these axes. The message names the difference.
    """
    checkpoint = read_checkpoint(path)
    init = checkpoint["init_args"]
    refuse_misfit(path, init, plans, configuration, fold, dataset_json, given)
    _refuse_other_split(path, validation_cases, init["dataset_json"]["file_ending"])
    untrained = sorted(set(mirrored or ()) - set(checkpoint.get("inference_allowed_mirroring_axes") or ()))
    if untrained:
        raise ValueError(
            f"Pre-segmentor {path} ({checkpoint.get('trainer_name')}) never saw images mirrored along axis "
            f"{', '.join(map(str, untrained))}, but this training mirrors them, in prediction too: use "
            "-tr DiffusionTrainerNoMirroring, a diffusion trainer of your own with the same mirroring, or a pre-segmentor "
            "that was trained with mirroring."
        )
    return {key.removeprefix("module."): value for key, value in checkpoint["network_weights"].items()}


def refuse_misfit(
    path: Path,
    init: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: Mapping[str, Any],
    given: bool,
) -> None:
    """Raise ValueError, which names the difference, if a checkpoint's `init_args` do not fit this training.

    Args:
        path: path of the checkpoint, for the message.
        init: `init_args` of the checkpoint.
        plans: plans of this training.
        configuration: configuration of this training.
        fold: fold of this training.
        dataset_json: dataset.json of this training.
        given: as for `load_presegmentor_weights`.
    """
    theirs, ours = PlansManager(init["plans"]), PlansManager(dict(plans))
    differing = {
        "fold": (str(init["fold"]), str(fold)),
        **{key: (init["dataset_json"].get(key), dataset_json.get(key)) for key in SAME_DATASET},
        **{key: (theirs.plans.get(key), ours.plans.get(key)) for key in SAME_PLANS},
    }
    if not given:
        differing["configuration"] = (init["configuration"], configuration)
    if given or init["configuration"] == configuration:
        mine = ours.get_configuration(configuration).configuration
        other = theirs.get_configuration(init["configuration"]).configuration
        keys = SAME_PREPROCESSING if given else SAME_PREPROCESSING + SAME_NETWORK
        differing.update({key: (other.get(key), mine.get(key)) for key in keys})
        if "CTNormalization" in mine.get("normalization_schemes", ()):
            differing[INTENSITIES] = (theirs.plans.get(INTENSITIES), ours.plans.get(INTENSITIES))
    for key, (other_value, own_value) in differing.items():
        if not same_entries(other_value, own_value):
            cure = f"Unset {PRESEGMENTOR_FOLDER}" if given else "Move its folder away"
            raise ValueError(
                f"Pre-segmentor {path} does not fit: its {key} is {other_value!r}, this training has {own_value!r}. {cure} "
                "and start again: a pre-segmentor that fits is then trained first."
            )


def _refuse_other_split(path: Path, validation_cases: Sequence[str], file_ending: str) -> None:
    """Raise ValueError if the pre-segmentor was validated on other cases; nothing is checked if it was not validated."""
    measured = measured_cases(path.parent / SUMMARY)
    if not measured:
        return
    theirs = {Path(case["prediction_file"]).name.removesuffix(file_ending) for case in measured}
    other = sorted(theirs ^ set(validation_cases))
    if other:
        shown = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
        raise ValueError(
            f"Pre-segmentor {path} was trained on another split: {len(other)} cases ({shown}) are validation cases of one "
            "training and training cases of the other. Restore its splits_final.json, or move its folder away and start again."
        )


def trainer_class(name: str, trained: str) -> type[nnUNetTrainer]:
    """Return the trainer that nnU-Net's own search finds under a name, which may come from an untrusted file.

    Args:
        name: name of the trainer.
        trained: description of the network that it trained, for the messages.

    Raises:
        RuntimeError: nnU-Net finds nothing of that name.
        ValueError: nnU-Net finds something that is not a trainer.
    """
    try:
        found = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        if not says_not_found(error):
            raise
        raise RuntimeError(
            f"{trained} is a network of {name}, which nnU-Net does not find: install the package it comes from, or "
            "add the folder of its file to nnUNet_extTrainer."
        ) from error
    if not (isinstance(found, type) and issubclass(found, nnUNetTrainer)):
        raise ValueError(f"{trained} is a network of {name}, which is not a trainer of nnU-Net: correct that name.")
    return found


def build_presegmentor(
    trainer_name: str,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    architecture: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Build the network of the pre-segmentor's trainer, without deep supervision, as nnU-Net's inference does.

    Args:
        trainer_name: name of a trainer that nnU-Net's own search finds.
        plans_manager: manager of the plans.
        configuration_manager: manager of the configuration.
        num_input_channels: number of input channels.
        num_output_channels: K.
        architecture: architecture to use instead of the configuration's; None for the configuration's.

    Raises:
        ValueError: the trainer is itself a diffusion trainer, or the plans name a class that is not an allowed network class.
        RuntimeError: nnU-Net does not find the trainer.
    """
    trainer = trainer_class(trainer_name, "The pre-segmentor of this model")
    if hasattr(trainer, "presegmentor_trainer"):
        raise ValueError(
            f"diffusion.presegmentor.trainer is {trainer_name!r}, itself a diffusion trainer: set it to one of "
            "nnU-Net's trainers, for example 'nnUNetTrainer', or leave it empty."
        )
    if architecture:
        configuration_manager = ConfigurationManager(
            {**configuration_manager.configuration, "architecture": dict(architecture)}
        )
    refuse_unknown_classes(configuration_manager.configuration["architecture"], "The plans")
    if "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters:
        return trainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
        )
    # trainers written for nnU-Net before 2.8, which it still supports
    return trainer.build_network_architecture(
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=False,
    )
