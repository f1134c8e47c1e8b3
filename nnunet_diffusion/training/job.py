"""A diffusion training as a job: log lines before it starts, a lock on its folder, and a clean end on signals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_diffusion.planning.memory_warning import memory_warning
from nnunet_diffusion.training.checks import explained
from nnunet_diffusion.training.ending import end_loaders, tidy_end, what_goes_on
from nnunet_diffusion.training.outlook import two_networks
from nnunet_diffusion.training.presegmentor import presegmentor_folder, presegmentor_state
from nnunet_diffusion.training.presegmentor.lock import only_job_in

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


@contextlib.contextmanager
def alone_and_tidy(trainer: DiffusionTrainer) -> Iterator[None]:
    """Keep other jobs out of the output folder during a `with` block, and end cleanly on Ctrl-C and SIGTERM.

    Raises:
        RuntimeError: another job uses the output folder.
        SystemExit: a signal ended the block.
    """

    def tell(cause: str) -> None:
        rest = what_goes_on(trainer, trainer.settings.presegmentor_trainer, trainer.saved or trainer.resumed)
        trainer.print_to_log_file(f"{cause}: {rest}")

    with only_job_in(Path(trainer.output_folder), trainer.print_to_log_file), tidy_end(tell):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            end_loaders(trainer)
            raise


@contextlib.contextmanager
def lost_data_explained(trainer: DiffusionTrainer) -> Iterator[None]:
    """Replace errors from data that can no longer be loaded in a `with` block by errors that name the cure."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        told = explained(error, Path(trainer.preprocessed_dataset_folder), trainer.current_epoch)
        if told is None:
            raise
        raise told from error


def describe(trainer: DiffusionTrainer) -> None:
    """Log the two networks of the model and how far each is trained."""
    if trainer.resumed:
        state = "trained already; its weights are in this model's checkpoint"
    else:
        state = presegmentor_state(presegmentor_folder(trainer), given=trainer.given_presegmentor is not None)
    names = trainer.settings.presegmentor_trainer, state, type(trainer).__name__
    trainer.print_to_log_file(
        two_networks(
            *names,
            trainer.num_epochs,
            trainer.current_epoch,
            halves="out_of_fold" in trainer.settings.starts,
            in_turns=trainer.settings.is_hidiff,
        )
    )


def warn(trainer: DiffusionTrainer) -> None:
    """Log warnings about settings that reduce accuracy, and about the GPU memory that the training needs."""
    settings, heads = trainer.settings, trainer.segmenter.denoiser.state_channels
    if "presegmentation" in settings.starts:
        trainer.print_to_log_file(
            "WARNING: diffusion.training.starts has a share of presegmentation, so the denoiser is trained on what the "
            "pre-segmentor makes of its own training cases, with fewer mistakes than on new cases; out_of_fold avoids that."
        )
    if settings.is_hidiff:
        trainer.print_to_log_file(
            "Note: the refiner is trained on what nnU-Net makes of its own training cases, with fewer mistakes than on new "
            "cases."
        )
    # in distributed training each GPU has a part of the batch
    own = {**trainer.configuration_manager.configuration, "batch_size": trainer.batch_size}
    told = memory_warning(trainer.plans_manager.plans, own, settings, trainer.num_input_channels, heads)
    if told is not None:
        trainer.print_to_log_file(told)
