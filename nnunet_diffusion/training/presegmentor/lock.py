"""Other jobs in the same folder: ours are kept apart by locks, nnU-Net's own go first."""

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
    """Return what rank 0 found, on every rank of a distributed training: files may appear between two looks."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    found = [own]
    dist.broadcast_object_list(found, src=0)
    return bool(found[0])


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a fold's folder for a `with` block; of a distributed training rank 0 does, and all wait until then.

    Args:
        folder: of the fold.
        log: takes one line.
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
    """Keep other jobs of ours out of a fold's output folder for a `with` block, on all ranks of a distributed training.

    Args:
        folder: of the fold.
        log: takes one line.

    Raises:
        RuntimeError: another job trains or validates there.
        OSError: the lock cannot be made; names it and the cure.
    """
    lock = HeldLock(folder / FOLD_LOCK_NAME)
    first = True
    while not agreed(_acquired(lock)):
        if agreed(lock.seen_alive):
            raise RuntimeError(
                f"Another job trains or validates in {folder} now ({lock.path.name} there is locked): wait until it has ended, "
                "or end it; for a second training of this fold, give the plans another plans_name."
            )
        if first:
            log(f"Another job may be at work in {folder}: waiting for a sign of it.{_if_dead(lock)}")
            first = False
        time.sleep(LOCK_SECONDS)
    with lock:
        yield


def _if_dead(lock: HeldLock) -> str:
    # a flock ends with its job, so only a marker may be a dead job's
    return f" If it is dead, this one goes on in {STALE_SECONDS:.0f} s." if lock.kind == "marker" else ""


def _acquired(lock: HeldLock) -> bool:
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return False
    return lock.acquire()


def wait_for_stock_training(folder: Path, log: Callable[[str], None]) -> None:
    """Wait while a job of nnU-Net's own, which knows no lock, trains or validates in this fold's folder.

    Such a job writes its training log at least once an epoch. It is taken for dead once that log has been silent for
    `SILENT_EPOCHS` of its longest epochs and `SILENT_SECONDS`; it has finished when checkpoint and validation are there.

    Args:
        folder: of the fold.
        log: takes one line.
    """
    first = True
    while agreed((left := seconds_until_silent(folder)) > 0):
        if first:
            log(
                f"Pre-segmentor: nnU-Net is being trained by itself in {folder}; waiting for that job. If it is dead, this one "
                f"goes on in {max(left, 0):.0f} s."
            )
            first = False
        time.sleep(LOCK_SECONDS)


def seconds_until_silent(folder: Path) -> float:
    """Return in how many seconds a job of nnU-Net's own in this fold's folder would be taken for dead; 0 if none lives."""
    newest = _stock_log(folder)
    if newest is None or ((folder / "checkpoint_final.pth").is_file() and measured_cases(folder / SUMMARY) is not None):
        return 0.0
    epochs = [float(seconds) for seconds in re.findall(r"Epoch time: ([\d.]+) s", newest.read_text(errors="replace"))]
    limit = max(SILENT_SECONDS, SILENT_EPOCHS * max(epochs, default=0.0))
    return newest.stat().st_mtime + limit - _time_of_file_server(folder)


def _time_of_file_server(folder: Path) -> float:
    """Return the time, in seconds, that the machine which stores `folder` puts on a file now: its clock may be another."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".time_", suffix=ASIDE) as file:
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def measured_cases(summary: Path) -> list[Any] | None:
    """Return the cases of a validation's summary; None if it is not there or not whole, as nnU-Net writes it in place."""
    if not summary.is_file():
        return None
    try:
        cases = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
    except (ValueError, KeyError, TypeError):  # ValueError: no JSON, or no text at all
        return None
    return cases if isinstance(cases, list) else None


class StockTrainingBegan(Exception):
    """nnU-Net's own job began in the folder in which ours trains the same network."""


def give_way_to_stock_training(trainer: nnUNetTrainer) -> None:
    """Have `trainer` raise StockTrainingBegan, all ranks together, before it writes beside a job of nnU-Net's own.

    Such a job knows no lock, so the one that does steps aside. It looks at the end of each epoch, which is when files are
    written; a final checkpoint is not its own then.
    """
    end, folder = trainer.on_epoch_end, Path(trainer.output_folder)

    def on_epoch_end() -> None:
        if agreed(seconds_until_silent(folder) > 0 or (folder / "checkpoint_final.pth").is_file()):
            raise StockTrainingBegan
        end()

    trainer.on_epoch_end = on_epoch_end


def _stock_log(folder: Path) -> Path | None:
    """Return the newest training log that none of our jobs wrote."""
    claimed = set((folder / CLAIMED_LOGS).read_text().split()) if (folder / CLAIMED_LOGS).is_file() else set()
    logs = [path for path in folder.glob("training_log_*.txt") if path.name not in claimed]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def claim_log(path: Path, rank: int = 0) -> None:
    """Note that a training log is one of our jobs': while those live, they hold the lock, whatever the log's age."""
    if rank == 0:
        with path.with_name(CLAIMED_LOGS).open("a") as file:
            file.write(f"{path.name}\n")
