"""Ending a training early by Ctrl-C or SIGTERM, with one line that names what is saved and the command to continue."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_diffusion.jobs.locks import release_all
from nnunet_diffusion.jobs.signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, stopped

# time for open `with` blocks to unwind; nnU-Net's pool of processes may wait forever for dead workers
TIDY_SECONDS = 5.0
WORKER_SECONDS = 2.0  # time for a worker process to end by itself
CAUSES = {EXIT_INTERRUPTED: "Interrupted", EXIT_TERMINATED: "Ended by SIGTERM"}


@contextlib.contextmanager
def tidy_end(tell: Callable[[str], object]) -> Iterator[None]:
    """End the worker processes and this process, with exit code 130 or 143, on Ctrl-C or SIGTERM in a `with` block.

    This does nothing outside the main thread, because other threads receive no signals.

    Args:
        tell: called with "Interrupted" or "Ended by SIGTERM" once all workers have ended.

    Raises:
        SystemExit: Ctrl-C (exit code 130) or SIGTERM (143) ended the block.
    """
    before = set(multiprocessing.active_children())
    watch = _Watch(before, tell)
    try:
        with stopped(watch.begin):
            try:
                yield
            except (KeyboardInterrupt, Terminated):
                _end_workers(before)
                if watch.end():
                    tell(CAUSES[watch.code])
                raise SystemExit(watch.code) from None
    finally:
        watch.end()


class _Watch:
    """A thread that ends the process `TIDY_SECONDS` after a signal, unless `end` is called."""

    def __init__(self, before: set[BaseProcess], tell: Callable[[str], object]) -> None:
        self.code = EXIT_INTERRUPTED
        self._before, self._tell = before, tell
        self._begun, self._ended, self._deciding = threading.Event(), threading.Event(), threading.Lock()
        self._excepthook = threading.excepthook
        threading.Thread(target=self._wait, daemon=True).start()

    def begin(self, code: int) -> None:
        self.code = code
        # threads of nnU-Net's loaders fail when their workers end; there is no need to report that here
        threading.excepthook = lambda _: None
        self._begun.set()

    def end(self) -> bool:
        """Cancel the watch. Return False if it was already cancelled."""
        with self._deciding:
            first = not self._ended.is_set()
            threading.excepthook = self._excepthook
            self._ended.set()
            self._begun.set()
        return first

    def _wait(self) -> None:
        self._begun.wait()
        if self._ended.wait(TIDY_SECONDS):
            return
        with self._deciding:
            if self._ended.is_set():
                return
            _end_workers(self._before, seconds=0.0)
            self._tell(CAUSES[self.code])
            release_all()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


def _end_workers(before: set[BaseProcess], seconds: float = WORKER_SECONDS) -> None:
    """End all child processes that are not in `before`; kill those that do not end by themselves."""
    workers = [process for process in multiprocessing.active_children() if process not in before]
    for process in workers:
        process.join(seconds)
    for process in workers:
        if process.is_alive():
            process.kill()
            process.join(WORKER_SECONDS)


def end_loaders(trainer: nnUNetTrainer) -> None:
    """Make the workers of a trainer's loaders end silently as soon as their current batch is finished."""
    for loader in (getattr(trainer, "dataloader_train", None), getattr(trainer, "dataloader_val", None)):
        event = getattr(loader, "abort_event", None)
        if event is not None:
            event.set()


def what_goes_on(trainer: nnUNetTrainer, presegmentor: str, saved: bool) -> str:
    """Return which checkpoint of a diffusion training is on disk, and the command that continues from it.

    Args:
        trainer: trainer of the denoiser.
        presegmentor: name of the pre-segmentor's trainer.
        saved: whether this training of the denoiser has a checkpoint in its output folder.
    """
    words = (trainer.plans_manager.dataset_name, presegmentor, trainer.plans_manager.plans_name)
    first = _newest(Path(get_output_folder(*words, trainer.configuration_name, trainer.fold)))
    own = _newest(Path(trainer.output_folder)) if saved else None
    if own is not None:
        found = (
            f"{own} is on disk, with all epochs"
            if own.stem.endswith("final")
            else f"{own} is on disk, with the last finished epoch"
        )
    elif first is not None:
        found = f"the denoiser has no finished epoch yet; the pre-segmentor's {first} is on disk"
    else:
        found = "no finished epoch is on disk yet"
    return f"{found}. To continue: {_command(trainer, own is not None)}"


def _newest(folder: Path) -> Path | None:
    kinds = (folder / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best"))  # nnU-Net's order
    return next((path for path in kinds if path.is_file()), None)


def _command(trainer: nnUNetTrainer, resume: bool) -> str:
    plans, device = trainer.plans_manager, trainer.device.type
    words = ["nnUNetv2_train", str(int(plans.dataset_name[7:10])), trainer.configuration_name, str(trainer.fold)]
    words += ["-tr", type(trainer).__name__, "-p", plans.plans_name]
    words += ["-device", device] if device != "cuda" else []
    words += ["-num_gpus", str(dist.get_world_size())] if trainer.is_ddp else []
    words += [option for option in ("--npz", "--disable_checkpointing") if option in sys.argv]
    return " ".join([*words, *(["--c"] if resume else [])])
