"""Reading and writing nnU-Net checkpoints without losing a finished one and without running code from a file."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_diffusion.model.precision import all_finite
from nnunet_diffusion.model.settings import PLANS_KEY, presegmentor_architectures
from nnunet_diffusion.networks.architectures import refuse_unknown_classes

ASIDE = ".tmp"
LEFT_BEHIND_SECONDS = 600.0
SAFE_TORCH = (2, 10)  # the first in which no known file makes torch.load(weights_only=True) run code
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
    """Read a checkpoint of an nnU-Net trainer without running code from it.

    Only tensors, plain values and a short list of safe types are read (`weights_only=True`), and the plans in it may name
    network classes only (`refuse_unknown_networks`).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, is no checkpoint, holds anything else, or this torch is too old to read it safely; names
            the file and the cure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Train first, or correct the path.")
    _refuse_old_torch(path)
    _refuse_other_archives(path)
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Checkpoint {path} holds more than tensors and plain values ({_reason(error)}) and could run code, so it is not "
            "read: take one as nnU-Net saves it, or, to predict with a model that you trust, give --trust_checkpoint."
        ) from error
    except Exception as error:  # a malformed pickle calls torch's functions with whatever it holds
        raise ValueError(_damaged(path, f"{type(error).__name__} while it was read")) from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of an nnU-Net trainer: it has no 'network_weights'.")
    arguments = checkpoint.get("init_args")
    if isinstance(arguments, dict):
        refuse_unknown_networks(arguments.get("plans"), str(path))
    return checkpoint


def refuse_unknown_networks(plans: Any, source: str) -> None:
    """Raise ValueError if plans, in any of their configurations, name anything but network classes that they may name.

    Args:
        plans: as read, of any layout; None for none.
        source: their file, for the message.
    """
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    for configuration in configurations.values() if isinstance(configurations, dict) else ():
        if not isinstance(configuration, dict):
            raise ValueError(f"{source}: a configuration of the plans is {configuration!r}, but must be a dictionary.")
        inside = presegmentor_architectures(configuration.get(PLANS_KEY))
        for architecture in (configuration.get("architecture"), *inside):
            refuse_unknown_classes(architecture or {}, source)


def _refuse_old_torch(path: Path) -> None:
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < SAFE_TORCH:
        raise ValueError(
            f"Checkpoint {path} is not read: torch {torch.__version__} can be made to run code by such a file (CVE-2025-32434, "
            'CVE-2026-24747). Run: pip install --upgrade "torch>=2.10"'
        )


def _refuse_other_archives(path: Path) -> None:
    """Raise ValueError unless a file is an archive as torch writes it: whole, and stored without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:  # the directory stands at the end of the file
        raise ValueError(_damaged(path, "it does not end as a checkpoint does")) from error
    if compressed:
        raise ValueError(
            f"Checkpoint {path} is not read: it holds compressed records, which torch never writes and which may fill the "
            "memory. Get it from its author as torch.save wrote it."
        )


def _reason(error: Exception) -> str:
    """Return what torch stumbled over: the name of a class or function, else its last words."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "documentation" not in line]
    return name[1] if name else lines[-1] if lines else type(error).__name__


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
