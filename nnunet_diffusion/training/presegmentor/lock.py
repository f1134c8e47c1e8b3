"""Several jobs in one folder: locks separate our own jobs, and jobs of nnU-Net's own take precedence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.jobs.locks import STALE_SECONDS, HeldLock
from nnunet_diffusion.training.checkpoints import ASIDE

LOCK_NAME = "presegmentor.lock"
FOLD_LOCK_NAME = "training.lock"
LOCK_SECONDS = 1.0
CLAIMED_LOGS = "presegmentor_logs.txt"
SILENT_SECONDS = 60.0
SILENT_EPOCHS = 3
SUMMARY = "validation/summary.json"


def agreed(own: bool) -> bool:
    """Return rank 0's value on every rank of a distributed training, because files may appear between two checks."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    found = [own]
    dist.broadcast_object_list(found, src=0)
    return bool(found[0])


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a fold's folder for a `with` block. In distributed training rank 0 holds it, and all ranks wait for it.

    Args:
        folder: folder of the fold.
        log: writes one line.
    """
    path = folder / LOCK_NAME
    lock = HeldLock(path)
    first = True
    while not agreed(_acquired(lock)):
        if first:
            log(f"Pre-segmentor: another job trains it now ({path} is locked); waiting for that job.{_if_dead(lock)}")
            first = False
        # short waits: a collective call of the other ranks must not last long
        time.sleep(LOCK_SECONDS)
    with lock:
        yield


@contextlib.contextmanager
def only_job_in(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep our other jobs out of a fold's output folder for a `with` block. All ranks of a distributed training call this.

    Args:
        folder: folder of the fold.
        log: writes one line.

    Raises:
        RuntimeError: another job trains or validates in the folder.
        OSError: the lock cannot be created. The message names its file and the cure.
    """
    lock = HeldLock(folder / FOLD_LOCK_NAME)
    first = True
    while not agreed(_acquired(lock)):
        if agreed(lock.seen_alive):
            raise RuntimeError(
                f"Another job trains or validates in {folder} now ({lock.path.name} there is locked): wait until it has ended, "
                "or end it. For a second training of this fold, give the plans another plans_name."
            )
        if first:
            log(f"Another job may be running in {folder}; waiting to see whether it is alive.{_if_dead(lock)}")
            first = False
        time.sleep(LOCK_SECONDS)
    with lock:
        yield


def _if_dead(lock: HeldLock) -> str:
    # a flock ends with its job, so only a marker may belong to a dead job
    return f" If it is dead, this job continues in {STALE_SECONDS:.0f} s." if lock.kind == "marker" else ""


def _acquired(lock: HeldLock) -> bool:
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return False
    return lock.acquire()


def wait_for_stock_training(folder: Path, log: Callable[[str], None]) -> None:
    """Wait while a job of nnU-Net's own, which does not use our locks, trains or validates in this fold's folder.

    Such a job writes to its training log at least once per epoch. It is considered dead if nothing was written for
    `SILENT_EPOCHS` times its longest epoch and at least `SILENT_SECONDS`. It has finished when checkpoint and validation exist.

    Args:
        folder: folder of the fold.
        log: writes one line.
    """
    first = True
    while agreed((left := seconds_until_silent(folder)) > 0):
        if first:
            log(
                f"Pre-segmentor: nnU-Net is being trained by itself in {folder}; waiting for that job. If it is dead, this job "
                f"continues in {max(left, 0):.0f} s."
            )
            first = False
        time.sleep(LOCK_SECONDS)


def seconds_until_silent(folder: Path) -> float:
    """Return the seconds after which nnU-Net's own job in a fold's folder counts as dead; at most 0 if none is alive."""
    newest = _stock_log(folder)
    if newest is None or ((folder / "checkpoint_final.pth").is_file() and measured_cases(folder / SUMMARY) is not None):
        return 0.0
    epochs = [float(seconds) for seconds in re.findall(r"Epoch time: ([\d.]+) s", newest.read_text(errors="replace"))]
    limit = max(SILENT_SECONDS, SILENT_EPOCHS * max(epochs, default=0.0))
    return newest.stat().st_mtime + limit - _time_of_file_server(folder)


def _time_of_file_server(folder: Path) -> float:
    """Return the current time (s) of the machine that stores `folder`, whose clock may differ from this machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".time_", suffix=ASIDE) as file:
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def measured_cases(summary: Path) -> list[Any] | None:
    """Return the cases in a validation's summary; None if the file is missing or incomplete (nnU-Net writes it in place)."""
    if not summary.is_file():
        return None
    try:
        cases = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
    except (ValueError, KeyError, TypeError):  # ValueError: not JSON or not text
        return None
    return cases if isinstance(cases, list) else None


class StockTrainingBegan(Exception):
    """A job of nnU-Net's own began to train the same network in the folder of our job."""


def give_way_to_stock_training(trainer: nnUNetTrainer) -> None:
    """Make `trainer` raise StockTrainingBegan on all ranks before it writes into the folder of a job of nnU-Net's own.

    Such a job does not use our locks, so our job gives way. It checks at the end of each epoch, when files are written; a
    final checkpoint that exists at that time was written by the other job.
    """
    end, folder = trainer.on_epoch_end, Path(trainer.output_folder)

    def on_epoch_end() -> None:
        if agreed(seconds_until_silent(folder) > 0 or (folder / "checkpoint_final.pth").is_file()):
            raise StockTrainingBegan
        end()

    trainer.on_epoch_end = on_epoch_end


def _stock_log(folder: Path) -> Path | None:
    """Return the newest training log that was not written by one of our jobs; None if there is none."""
    claimed = set((folder / CLAIMED_LOGS).read_text().split()) if (folder / CLAIMED_LOGS).is_file() else set()
    logs = [path for path in folder.glob("training_log_*.txt") if path.name not in claimed]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def claim_log(path: Path, rank: int = 0) -> None:
    """Record that a training log was written by one of our jobs, which hold the lock while they are alive."""
    if rank == 0:
        with path.with_name(CLAIMED_LOGS).open("a") as file:
            file.write(f"{path.name}\n")
