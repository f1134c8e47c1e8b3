"""Training and validation of the pre-segmentor, by nnU-Net's own trainer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.helpers import empty_cache

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER
from nnunet_diffusion.training.checkpoints import (
    read_checkpoint,
    refuse_not_finite,
    remove_what_killed_jobs_left,
    write_aside,
)
from nnunet_diffusion.training.checks import check_batch
from nnunet_diffusion.training.ending import end_loaders
from nnunet_diffusion.training.outlook import announce
from nnunet_diffusion.training.presegmentor.fit import refuse_misfit, trainer_class
from nnunet_diffusion.training.presegmentor.lock import (
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

Altered = Callable[[type[nnUNetTrainer]], type[nnUNetTrainer]]
"""Makes the trainer of a part of the training cases from one of nnU-Net's."""


def ensure_presegmentor(
    trainer_name: str,
    dataset_name: str,
    configuration: str,
    fold: int | str,
    plans_name: str,
    device: torch.device,
    log: Callable[[str], None],
    altered: Altered | None = None,
) -> Path:
    """Return the path of the pre-segmentor's final checkpoint, after training and validating it if necessary.

    The training is nnU-Net's own, with a checkpoint after each epoch; an unfinished training is resumed. A lock in the fold's
    folder keeps other jobs from training the same network at the same time; it is released when its job ends. If a job of
    nnU-Net's own, which does not use the lock, trains the network or begins to, this function waits for it. All ranks of a
    distributed training must call this function together.

    Args:
        trainer_name: name of a trainer that nnU-Net's own search finds.
        dataset_name: name of the dataset, DatasetXXX_NAME.
        configuration: name of the configuration, for example "2d".
        fold: fold number from 0, or "all".
        plans_name: name of the plans in nnUNet_preprocessed/DATASET, without .json.
        device: device for training and validation.
        log: writes one line.
        altered: makes the trainer of part of the training cases, whose network is not validated; None for all of them.
    """
    own = None if altered is None else altered(trainer_class(trainer_name, "The pre-segmentor of this model"))
    trainer_name = trainer_name if own is None else own.__name__
    folder = Path(get_output_folder(dataset_name, trainer_name, plans_name, configuration, fold))
    final, summary = folder / "checkpoint_final.pth", folder / SUMMARY

    def validated() -> bool:
        return own is not None or measured_cases(summary) is not None

    if agreed(final.is_file() and validated()):
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
            trainer = _make_trainer(trainer_name, dataset_name, configuration, fold, plans_name, resumable, device, own)
            if not _trained(trainer, resumable, log, "pre-segmentor" if own is None else trainer_name):
                log(f"Pre-segmentor: nnU-Net's own training began in {folder}, so this one gives way to it.")
                trainer = None
                wait_for_stock_training(folder, log)
        if not agreed(validated()):
            if trainer is None:
                trainer = _make_trainer(trainer_name, dataset_name, configuration, fold, plans_name, True, device)
                _refuse_other_plans(final, trainer)
                trainer.load_checkpoint(str(final))
            log("Pre-segmentor: validation with probabilities.")
            trainer.perform_actual_validation(save_probabilities=True)
            while trainer.local_rank != 0 and measured_cases(summary) is None:
                # rank 0 evaluates all cases, which takes longer than a collective call would wait
                time.sleep(LOCK_SECONDS)
        if trainer is not None:
            _finish_loggers(trainer)
    # reference cycles through its wrapped methods keep the trainer, and its network and optimizer state on the GPU, alive
    trainer = None
    gc.collect()
    empty_cache(device)
    return final


def presegmentor_state(folder: Path, given: bool = False) -> str:
    """Return how far a pre-segmentor is trained and what is left to do, for the log.

    Args:
        folder: folder of its fold.
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


def _trained(trainer: nnUNetTrainer, resumable: bool, log: Callable[[str], None], what: str) -> bool:
    """Train to the end. Return False if a job of nnU-Net's own began to train the same network.

    `what` names the network in the log.
    """
    _save_often_and_whole(trainer)
    _check_batches(trainer)
    give_way_to_stock_training(trainer)
    _load_last_checkpoint(trainer, resumable)
    announce(trainer, what, log)
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
    """End the runs of nnU-Net's loggers (W&B), because this process continues with another run."""
    for logger in trainer.logger.loggers:
        if hasattr(logger, "run"):
            logger.run.finish()


def _make_trainer(
    name: str,
    dataset: str,
    configuration: str,
    fold: int | str,
    plans: str,
    resume: bool,
    device: torch.device,
    own: type[nnUNetTrainer] | None = None,
) -> nnUNetTrainer:
    """Return the trainer as nnU-Net makes it, or one of our own class, which nnU-Net's search would not find."""
    if own is None:
        trainer = get_trainer_from_args(dataset, configuration, fold, name, plans, resume, device)
    else:
        folder = Path(nnUNet_preprocessed) / dataset
        planned = {**load_json(folder / f"{plans}.json"), "continue_training": resume}
        trainer = own(
            plans=planned,
            configuration=configuration,
            fold=fold,
            dataset_json=load_json(folder / "dataset.json"),
            device=device,
        )
    claim_log(Path(trainer.log_file), trainer.local_rank)
    return trainer


def _save_often_and_whole(trainer: nnUNetTrainer) -> None:
    """Save after each epoch through a temporary file. nnU-Net saves every 50 epochs and overwrites the file in place."""
    save = trainer.save_checkpoint

    def save_whole(path: str) -> None:
        refuse_not_finite(trainer.network.state_dict(), path)
        write_aside(save, path)

    trainer.save_every = 1
    trainer.save_checkpoint = save_whole


def _load_last_checkpoint(trainer: nnUNetTrainer, resumable: bool) -> None:
    """Load the last checkpoint. Raise ValueError, which names it and the cure, if it is damaged or from other plans."""
    if resumable:
        folder = Path(trainer.output_folder)
        kinds = (folder / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best"))  # nnU-Net's order
        _refuse_other_plans(next(path for path in kinds if path.is_file()), trainer)
    maybe_load_checkpoint(trainer, resumable, False)


def _check_batches(trainer: nnUNetTrainer) -> None:
    """Check each batch, so that errors name the case; nnU-Net would train on NaN, and fail on labels without a case name."""

    def checked(step: Callable[[dict], dict]) -> Callable[[dict], dict]:
        def run(batch: dict) -> dict:
            check_batch(batch, trainer)
            return step(batch)

        return run

    for name in ("train_step", "validation_step"):
        setattr(trainer, name, checked(getattr(trainer, name)))


def _refuse_other_plans(path: Path, trainer: nnUNetTrainer) -> None:
    """Raise ValueError if a checkpoint of the pre-segmentor is damaged or from other plans."""
    init = read_checkpoint(path)["init_args"]
    plans, configuration = trainer.plans_manager.plans, trainer.configuration_name
    refuse_misfit(path, init, plans, configuration, trainer.fold, trainer.dataset_json, False)
