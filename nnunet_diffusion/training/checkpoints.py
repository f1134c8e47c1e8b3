"""Reading and writing nnU-Net checkpoints without losing a finished one and without running code from a file."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_diffusion.finite import all_finite

ASIDE = ".tmp"
LEFT_BEHIND_SECONDS = 600.0
DIFFUSION_KEY = "diffusion"  # what a diffusion trainer saves beside nnU-Net's own entries


def _scalar_of(module: str) -> Callable:
    """What builds a numpy scalar, under the name that the numpy which wrote the file had for it."""
    build = np.float32(0).__reduce__()[0]

    def scalar(*arguments: Any) -> Any:
        return build(*arguments)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


# what nnU-Net's own checkpoints hold beside tensors and plain Python: numpy scalars in the logged curves
SAFE_TYPES: list[Any] = [
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
    *(_scalar_of(module) for module in ("numpy.core.multiarray", "numpy._core.multiarray")),  # numpy 1 and 2
]


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of an nnU-Net trainer with `weights_only=True` and a short list of safe types.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, is no checkpoint, or holds anything but tensors and plain values; names the file
            and the cure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Train first, or correct the path.")
    if not zipfile.is_zipfile(path):  # torch.save writes zip files, whose directory stands at the end
        raise ValueError(_damaged(path, "it does not end as a checkpoint does"))
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Checkpoint {path} holds more than tensors and plain values and is not read: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of an nnU-Net trainer: it has no 'network_weights'.")
    return checkpoint


def _damaged(path: Path, reason: object) -> str:
    return (
        f"Checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged: {reason}. Remove it and continue "
        "from another checkpoint of the same folder, or train again."
    )


def refuse_foreign_checkpoint(checkpoint: Mapping[str, Any], name: str, training: Mapping[str, str]) -> None:
    """Raise ValueError, naming what differs, if a training cannot go on from a checkpoint.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        name: of its file.
        training: "dataset", "configuration" and "fold" of the training.
    """
    if DIFFUSION_KEY not in checkpoint:
        raise ValueError(
            f"{name} is a checkpoint of {checkpoint.get('trainer_name')}, not of a diffusion trainer: its output folder was "
            "used by something else. Remove it, or take another plans_name."
        )
    init = checkpoint["init_args"]
    saved = {"dataset": init["plans"]["dataset_name"], **{key: str(init[key]) for key in ("configuration", "fold")}}
    for key, ours in training.items():
        if saved[key] != ours:
            raise ValueError(
                f"{name} is of {key} {saved[key]}, this training is of {key} {ours}: remove it from this output folder, or "
                "give it as -pretrained_weights to begin a new training with its weights."
            )


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint aside and rename it, so that the previous one stays whole until the new one is on the disk.

    Raises:
        FloatingPointError: as `refuse_not_finite`; the previous file is untouched.
        OSError: if it cannot be written (full disk, read-only folder); the previous file is untouched.
    """
    refuse_not_finite(checkpoint["network_weights"], path)
    write_aside(lambda aside: torch.save(checkpoint, aside), path)


def write_aside(write: Callable[[str], object], path: str | Path) -> None:
    """Let `write` make a file under another name, then rename it to `path`; nothing is renamed if it makes none.

    When this returns, the file survives a power loss.

    Raises:
        OSError: as `write_checkpoint`.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    try:
        write(str(aside))
        if aside.is_file():
            _sync(aside)
            os.replace(aside, path)
            _sync(path.parent)
    except BaseException as error:  # signals, too, leave nothing behind
        aside.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        raise OSError(
            f"Could not write {path}: {error}. The previous checkpoint, if any, is untouched: free some space or make the "
            "folder writable, then continue with --c."
        ) from error


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise  # else a file system whose folders cannot be synced, such as some network shares
    finally:
        os.close(descriptor)


def refuse_not_finite(weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Keep a network with NaN or infinite weights from replacing a good checkpoint.

    Args:
        weights: of the network.
        path: of the checkpoint to write.

    Raises:
        FloatingPointError: naming the first such weights, the file and the cure.
    """
    for name, values in weights.items():
        if values.is_floating_point() and values.numel() and not all_finite(values):
            raise FloatingPointError(
                f"{path} was not written: the network's {name} has become NaN or infinite. What was written before is kept: "
                "continue from it (with --c if the denoiser was trained, else by the same command). If it happens again, look "
                "for extreme intensities in the training cases, or train anew with a lower learning rate."
            )


def remove_what_killed_jobs_left(folder: Path) -> None:
    """Remove half-written files that a job killed while writing left aside; young ones may be another job's."""
    for path in folder.glob(f".*{ASIDE}"):
        with contextlib.suppress(FileNotFoundError):  # another rank or job removes it at the same time
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_SECONDS:
                path.unlink()
