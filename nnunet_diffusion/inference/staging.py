"""Folder in which a run makes its files, inside of the output folder; a lock tells a living run's from a dead one's."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from nnunet_diffusion.jobs.locks import HeldLock

UNFINISHED = ".unfinished_"
LOCK = ".lock"


@contextlib.contextmanager
def staging_folders(outputs: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Have a folder for unfinished files in each output folder for a `with` block, after removing those of dead runs.

    The lock of a folder lies beside it and is held from before the folder is made until after it is removed. So a folder
    whose lock is free belongs to no run, on whatever machine and in whatever container that ran.

    Args:
        outputs: output folders; made if they do not exist.

    Yields:
        output folder -> this run's folder in it.

    Raises:
        OSError: a folder cannot be made; names it and the cure.
    """
    stages: dict[Path, Path] = {}
    with contextlib.ExitStack() as stack:
        for folder in sorted(set(outputs)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                remove_abandoned(folder)
                stages[folder] = stack.enter_context(_staging_folder(folder))
            except OSError as error:
                raise not_writable(folder, error) from error
        yield stages


def not_writable(folder: Path, error: OSError) -> OSError:
    """Return an error that says for the user why nothing can be written to an output folder."""
    if folder.exists() and not folder.is_dir():
        return NotADirectoryError(f"{folder} is a file: give a folder for the output (-o)")
    reason = os.strerror(error.errno) if error.errno else error
    return OSError(
        f"nothing can be written to {folder} ({reason}): make it writable, free some space, or choose another -o"
    )


@contextlib.contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    while True:
        stage = output / f"{UNFINISHED}{uuid.uuid4().hex}"
        lock = HeldLock(_lock_of(stage))
        if lock.acquire():  # not if another run takes the new lock for a dead one's just now
            break
    with lock:
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _lock_of(stage: Path) -> Path:
    return stage.with_name(stage.name + LOCK)


def remove_abandoned(output: Path) -> None:
    """Remove what killed runs left in an output folder, but nothing of a run that still holds its lock."""
    names = {path.name.partition(LOCK)[0] for path in output.glob(f"{UNFINISHED}*")}
    for name in sorted(names):
        with HeldLock(_lock_of(output / name)) as lock:
            if lock.acquire():
                shutil.rmtree(output / name, ignore_errors=True)
