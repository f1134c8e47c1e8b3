"""Log lines about what a training will do and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def two_networks(
    presegmentor: str,
    state: str,
    trainer: str,
    epochs: int,
    done: int = 0,
    *,
    halves: bool = False,
    in_turns: bool = False,
) -> str:
    """Return the first lines of a training's log.

    Args:
        presegmentor: name of the pre-segmentor's trainer.
        state: state of the pre-segmentor, such as "to be trained first".
        trainer: name of the denoiser's trainer.
        epochs: number of epochs of the denoiser.
        done: number of epochs already finished, if the training is resumed.
        halves: whether starts out of fold need two further nnU-Nets.
        in_turns: whether the first network goes on learning beside the second.
    """
    left = f"{epochs} epochs" if done == 0 else f"resumed after {done} of {epochs} epochs"
    names = ("segmentor", "refiner") if in_turns else ("pre-segmentor", "denoiser")
    further = ", in which the first one learns too, in turns with it" if in_turns else ""
    return (
        "This model has two networks, which are trained one after the other:\n"
        f"  1. {names[0]}, an ordinary nnU-Net ({presegmentor}): {state}\n"
        f"  2. {names[1]}, which corrects what the first one segments ({trainer}): {left}{further}, then validated and "
        "compared with nnU-Net\n"
        + (
            "Before the denoiser two further nnU-Nets are trained if they are missing, each on half of the training cases and "
            "for half of the epochs. They make its starts out of fold.\n"
            if halves
            else ""
        )
        + "The remaining time is estimated after the first epoch of each."
    )


def announce(trainer: nnUNetTrainer, network: str, log: Callable[[str], None]) -> None:
    """Log that a network's training begins, and after the first epoch the estimated remaining time.

    Args:
        trainer: trainer of the network, before its first epoch.
        network: name of the network in the log.
        log: writes one line.
    """
    first, epochs = trainer.current_epoch, trainer.num_epochs
    log(f"Now training the {network}: {epochs} epochs" + (f", of which {first} are done." if first else "."))
    begin_epoch, end_epoch = trainer.on_epoch_start, trainer.on_epoch_end
    began = 0.0

    def on_epoch_start() -> None:
        nonlocal began
        began = time.perf_counter()
        begin_epoch()

    def on_epoch_end() -> None:
        end_epoch()
        left = trainer.num_epochs - trainer.current_epoch
        if trainer.current_epoch == first + 1 and left > 0:
            log(remaining_time(network, time.perf_counter() - began, left))

    trainer.on_epoch_start, trainer.on_epoch_end = on_epoch_start, on_epoch_end


def remaining_time(network: str, seconds: float, epochs: int) -> str:
    """Return a sentence with the remaining time of a training, estimated from the duration of one epoch.

    Args:
        network: name of the network in the log.
        seconds: duration of one epoch.
        epochs: number of remaining epochs.
    """
    return (
        f"An epoch of the {network} took {seconds:.1f} s. At this pace its remaining epochs ({epochs}) take about "
        f"{_duration(seconds * epochs)}, without the validation at the end."
    )


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
