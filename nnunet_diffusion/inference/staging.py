"""Staging folder of a run inside the output folder; a lock shows whether its run is still alive."""

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
    """Provide a staging folder in each output folder for a `with` block, after removing those of dead runs.

    The lock of a staging folder is a file next to it. It is held from before the folder is created until after it is removed.
    So a folder whose lock is free was left by a dead run, even if that ran on another machine or in a container.

    Args:
        outputs: output folders; created if they do not exist.

    Yields:
        output folder -> this run's staging folder in it.

    Raises:
        OSError: a folder cannot be created. The message names it and what to do.
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
    """Return an error that tells the user why nothing can be written to an output folder."""
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
        if lock.acquire():  # fails if another run is just removing the new lock as a dead one
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
    """Remove staging folders of killed runs from an output folder, except those whose lock is held."""
    names = {path.name.partition(LOCK)[0] for path in output.glob(f"{UNFINISHED}*")}
    for name in sorted(names):
        with HeldLock(_lock_of(output / name)) as lock:
            if lock.acquire():
                shutil.rmtree(output / name, ignore_errors=True)
