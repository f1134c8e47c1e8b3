"""The pre-segmentor: a normal nnU-Net of the same dataset, plans, configuration and fold, found or trained first."""

from __future__ import annotations

import gc
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffusion.environment import PRESEGMENTOR_FOLDER
from nnunet_diffusion.networks.architectures import refuse_unknown_classes
from nnunet_diffusion.nnunet_words import says_not_found
from nnunet_diffusion.planning.data_reuse import SAME_DATA, same_entries
from nnunet_diffusion.training.checkpoints import (
    DIFFUSION_KEY,
    read_checkpoint,
    refuse_not_finite,
    remove_what_killed_jobs_left,
    write_aside,
)
from nnunet_diffusion.training.checks import check_batch
from nnunet_diffusion.training.ending import end_loaders
from nnunet_diffusion.training.other_jobs import (
    LOCK_SECONDS,
    SUMMARY,
    StockTrainingBegan,
    agreed,
    claim_log,
    give_way_to_stock_training,
    locked,
    measured_cases,
    wait_for_stock_training,
)
from nnunet_diffusion.training.outlook import announce

# what must agree for one network's output to be another's start
SAME_DATASET = ("labels", "regions_class_order", "channel_names")
SAME_PLANS = ("dataset_name", "transpose_forward", "image_reader_writer")
SAME_PREPROCESSING = (*SAME_DATA, "previous_stage")
INTENSITIES = "foreground_intensity_properties_per_channel"  # CT is normalised by them
SAME_NETWORK = ("patch_size", "architecture")


def ensure_presegmentor(
    trainer_name: str,
    dataset_name: str,
    configuration: str,
    fold: int | str,
    plans_name: str,
    device: torch.device,
    log: Callable[[str], None],
) -> Path:
    """Return the final checkpoint of the pre-segmentor, training and validating it first where it does not exist.

    The training is nnU-Net's own, with a checkpoint each epoch; a half-trained one is resumed. A lock in the fold's folder
    keeps other jobs from training the same network meanwhile; it ends with its job. A job of nnU-Net's own, which knows no
    lock, is waited for, also if it begins later. All ranks of a distributed training call this together.

    Args:
        trainer_name: an nnU-Net trainer that nnU-Net's own search finds.
        dataset_name: DatasetXXX_NAME.
        configuration: for example "2d".
        fold: 0.. or "all".
        plans_name: plans in nnUNet_preprocessed/DATASET, without .json.
        device: of training and validation.
        log: takes one line.
    """
    folder = Path(get_output_folder(dataset_name, trainer_name, plans_name, configuration, fold))
    final, summary = folder / "checkpoint_final.pth", folder / SUMMARY
    if agreed(final.is_file() and measured_cases(summary) is not None):
        log(f"Pre-segmentor: {final} is trained already.")
        return final
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, log):
        remove_what_killed_jobs_left(folder)
        wait_for_stock_training(folder, log)
        trainer = None
        while trainer is None and not agreed(final.is_file()):
            log(f"Pre-segmentor: {trainer_name} of fold {fold} is not trained yet, training it first (in {folder}).")
            resumable = agreed(any((folder / f"checkpoint_{kind}.pth").is_file() for kind in ("latest", "best")))
            trainer = _make_trainer(trainer_name, dataset_name, configuration, fold, plans_name, resumable, device)
            if not _trained(trainer, resumable, log):
                log(f"Pre-segmentor: nnU-Net's own training began in {folder}, so this one gives way to it.")
                trainer = None
                wait_for_stock_training(folder, log)
        if not agreed(measured_cases(summary) is not None):
            if trainer is None:
                trainer = _make_trainer(trainer_name, dataset_name, configuration, fold, plans_name, True, device)
                _refuse_other_plans(final, trainer)
                trainer.load_checkpoint(str(final))
            log("Pre-segmentor: validation with probabilities.")
            trainer.perform_actual_validation(save_probabilities=True)
            while trainer.local_rank != 0 and measured_cases(summary) is None:
                time.sleep(LOCK_SECONDS)  # rank 0 measures all cases: a collective call would not wait that long
        if trainer is not None:
            _finish_loggers(trainer)
    # its wrapped methods hold it in cycles, and so its network, gradients and momentum on the GPU
    trainer = None
    gc.collect()
    empty_cache(device)
    return final


def presegmentor_state(folder: Path, given: bool = False) -> str:
    """Say what is there of a pre-segmentor and what is left to do.

    Args:
        folder: of its fold.
        given: whether the user named it.
    """
    final = folder / "checkpoint_final.pth"
    if given or (final.is_file() and measured_cases(folder / SUMMARY) is not None):
        named = f", named by {PRESEGMENTOR_FOLDER}" if given else ""
        return f"trained already, {read_checkpoint(final)['current_epoch']} epochs{named}"
    if final.is_file():
        return "trained already, to be validated first"
    if any((folder / f"checkpoint_{kind}.pth").is_file() for kind in ("latest", "best")):
        return "half-trained, to be trained to the end first"
    return "to be trained and validated first"


def _trained(trainer: nnUNetTrainer, resumable: bool, log: Callable[[str], None]) -> bool:
    """Train to the end; return False if nnU-Net's own job began to train the same network meanwhile."""
    _save_often_and_whole(trainer)
    _check_batches(trainer)
    give_way_to_stock_training(trainer)
    _load_last_checkpoint(trainer, resumable)
    announce(trainer, "pre-segmentor", log)
    try:
        trainer.run_training()
    except (KeyboardInterrupt, SystemExit):
        end_loaders(trainer)
        raise
    except StockTrainingBegan:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if hasattr(loader, "_finish"):  # worker processes
                loader._finish()
        _finish_loggers(trainer)
        return False
    return True


def _finish_loggers(trainer: nnUNetTrainer) -> None:
    """End the runs of nnU-Net's loggers (W&B): nnU-Net lets them end with the process, ours goes on with another run."""
    for logger in trainer.logger.loggers:
        if hasattr(logger, "run"):
            logger.run.finish()


def _make_trainer(
    name: str, dataset: str, configuration: str, fold: int | str, plans: str, resume: bool, device: torch.device
) -> nnUNetTrainer:
    trainer = get_trainer_from_args(dataset, configuration, fold, name, plans, resume, device)
    claim_log(Path(trainer.log_file), trainer.local_rank)
    return trainer


def _save_often_and_whole(trainer: nnUNetTrainer) -> None:
    """Save each epoch, aside: nnU-Net saves every 50 and writes over the last file, which a killed job leaves in pieces."""
    save = trainer.save_checkpoint

    def save_whole(path: str) -> None:
        refuse_not_finite(trainer.network.state_dict(), path)
        write_aside(save, path)

    trainer.save_every = 1
    trainer.save_checkpoint = save_whole


def _load_last_checkpoint(trainer: nnUNetTrainer, resumable: bool) -> None:
    """Go on from the last checkpoint; raise ValueError, naming it and the cure, if it is damaged or of other plans."""
    if resumable:
        folder = Path(trainer.output_folder)
        kinds = (folder / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best"))  # nnU-Net's order
        _refuse_other_plans(next(path for path in kinds if path.is_file()), trainer)
    maybe_load_checkpoint(trainer, resumable, False)


def _check_batches(trainer: nnUNetTrainer) -> None:
    """Have bad cases refused by name: nnU-Net would train on NaN to the end, and stop at labels without a name."""

    def checked(step: Callable[[dict], dict]) -> Callable[[dict], dict]:
        def run(batch: dict) -> dict:
            check_batch(batch, trainer)
            return step(batch)

        return run

    for name in ("train_step", "validation_step"):
        setattr(trainer, name, checked(getattr(trainer, name)))


@dataclass(frozen=True)
class GivenPresegmentor:
    """A trained nnU-Net that the user names, of any architecture.

    Attributes:
        checkpoint: Its final checkpoint of the fold.
        trainer_name: Its trainer.
        architecture: `architecture` of its plans.
    """

    checkpoint: Path
    trainer_name: str
    architecture: dict[str, Any]


def given_presegmentor(fold: int | str, patch_size: Sequence[int]) -> GivenPresegmentor | None:
    """Return the pre-segmentor in the model folder that `nnUNet_diffusion_presegmentor` names; None if it is not set.

    Args:
        fold: of the training.
        patch_size: of the training.

    Raises:
        FileNotFoundError: the folder has no finished training of that fold.
        ValueError: it holds a diffusion model, one of other axes or with a network of an unknown package, or the patch is not
            divisible by the network's strides.
    """
    folder = os.environ.get(PRESEGMENTOR_FOLDER)
    if not folder:
        return None
    path = Path(folder) / f"fold_{fold}" / "checkpoint_final.pth"
    if not path.is_file():
        raise FileNotFoundError(
            f"{PRESEGMENTOR_FOLDER} is {folder}, but {path} does not exist: name the folder of a model of nnU-Net's "
            "(TRAINER__PLANS__CONFIGURATION) whose training of this fold is finished, or unset the variable."
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
            f"{len(theirs['patch_size'])}D, but this training is in {len(patch_size)}D: name one of as many axes, or unset the "
            "variable."
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
        path: its final checkpoint, in the folder of its fold.
        plans: of this training.
        configuration: of this training.
        fold: of this training.
        dataset_json: of this training.
        validation_cases: of this training's fold.
        given: whether the user named it; it may then have another architecture, patch size and configuration name.
        mirrored: axes along which this training mirrors.

    Raises:
        ValueError: naming what differs, if it was trained on another dataset, fold, split, labels, channels,
            preprocessing or (unless given) architecture, or never mirrored along one of these axes.
    """
    checkpoint = read_checkpoint(path)
    init = checkpoint["init_args"]
    _refuse_misfit(path, init, plans, configuration, fold, dataset_json, given)
    _refuse_other_split(path, validation_cases, init["dataset_json"]["file_ending"])
    untrained = sorted(set(mirrored or ()) - set(checkpoint.get("inference_allowed_mirroring_axes") or ()))
    if untrained:
        raise ValueError(
            f"Pre-segmentor {path} ({checkpoint.get('trainer_name')}) never saw images mirrored along axis "
            f"{', '.join(map(str, untrained))}, but this training mirrors them, in prediction too: take "
            "-tr DiffusionTrainerNoMirroring, a diffusion trainer of your own that mirrors as that one did, or a pre-segmentor "
            "that was trained with mirroring."
        )
    return {key.removeprefix("module."): value for key, value in checkpoint["network_weights"].items()}


def _refuse_other_plans(path: Path, trainer: nnUNetTrainer) -> None:
    """Raise ValueError if a pre-segmentor's training cannot go on from its checkpoint: damaged, or of other plans."""
    init = read_checkpoint(path)["init_args"]
    plans, configuration = trainer.plans_manager.plans, trainer.configuration_name
    _refuse_misfit(path, init, plans, configuration, trainer.fold, trainer.dataset_json, False)


def _refuse_misfit(
    path: Path,
    init: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: Mapping[str, Any],
    given: bool,
) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint's `init_args` are of this dataset, fold and network."""
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
                "and start again: a fitting one is then trained first."
            )


def _refuse_other_split(path: Path, validation_cases: Sequence[str], file_ending: str) -> None:
    """Raise ValueError if the pre-segmentor's own validation had other cases; without one there is nothing to compare."""
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
    """Return the trainer that nnU-Net's own search finds under a name, which may come from a stranger's file.

    Args:
        name: of the trainer.
        trained: what it trained, for the messages.

    Raises:
        RuntimeError: if nnU-Net finds nothing of that name.
        ValueError: if it finds something that is not a trainer.
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
        trainer_name: found by nnU-Net's own search.
        plans_manager: of the plans.
        configuration_manager: of the configuration.
        num_input_channels: of the image.
        num_output_channels: K.
        architecture: in the place of the configuration's own.

    Raises:
        ValueError: if that trainer needs a pre-segmentor itself, or the plans name anything but a network class they may name.
        RuntimeError: if nnU-Net does not find it.
    """
    trainer = trainer_class(trainer_name, "The pre-segmentor of this model")
    if hasattr(trainer, "presegmentor_trainer"):
        raise ValueError(
            f"diffusion.presegmentor_trainer is {trainer_name!r}, itself a diffusion trainer: give one of nnU-Net's, "
            "for example 'nnUNetTrainer', or leave it empty."
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
