"""Reading checkpoints without running code from them, and writing them without losing a finished one."""

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
SAFE_TORCH = (2, 10)  # first version without a known way to run code in torch.load(weights_only=True)
DIFFUSION_KEY = "diffusion"  # section of a diffusion trainer beside nnU-Net's entries


def _scalar_of(module: str) -> Callable:
    """Return numpy's constructor of scalars under the module name that the file's version of numpy uses for it."""
    build = np.float32(0).__reduce__()[0]

    def scalar(*arguments: Any) -> Any:
        return build(*arguments)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


# nnU-Net's own checkpoints also hold numpy scalars, in the logged curves
SAFE_TYPES: list[Any] = [
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
    *(_scalar_of(module) for module in ("numpy.core.multiarray", "numpy._core.multiarray")),  # numpy 1 and 2
]


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of an nnU-Net trainer without running code from it.

    Only tensors, plain values and a short list of safe types are read (`weights_only=True`), and the plans in the checkpoint
    may name only allowed network classes (`refuse_unknown_networks`).

    Args:
        path: path of the checkpoint.
        device: device to which tensors are loaded.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, is not a checkpoint or holds other types, or this torch is too old to read it safely.
            The message names the file and the cure.
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
            "read. Use a checkpoint saved by nnU-Net, or, to predict with a model that you trust, give --trust_checkpoint."
        ) from error
    except Exception as error:  # a malformed pickle may call torch's functions with any arguments
        raise ValueError(_damaged(path, f"{type(error).__name__} while it was read")) from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of an nnU-Net trainer: it has no 'network_weights'.")
    arguments = checkpoint.get("init_args")
    if isinstance(arguments, dict):
        refuse_unknown_networks(arguments.get("plans"), str(path))
    return checkpoint


def refuse_unknown_networks(plans: Any, source: str) -> None:
    """Raise ValueError if any configuration of the plans names a class that is not an allowed network class.

    Args:
        plans: content of the plans, of any layout; None if there are none.
        source: file of the plans, for the message.
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
            f"Checkpoint {path} is not read: torch {torch.__version__} could run code from such a file (CVE-2025-32434, "
            'CVE-2026-24747). Run: pip install --upgrade "torch>=2.10"'
        )


def _refuse_other_archives(path: Path) -> None:
    """Raise ValueError if a file is not a complete archive without compression, as torch writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:  # the archive's directory is at the end of the file
        raise ValueError(_damaged(path, "it does not end as a checkpoint does")) from error
    if compressed:
        raise ValueError(
            f"Checkpoint {path} is not read: it holds compressed records, which torch never writes and which may fill the "
            "memory. Ask its author for the file that torch.save wrote."
        )


def _reason(error: Exception) -> str:
    """Return the class or function that torch refused; without a name, the last line of its message."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "documentation" not in line]
    return name[1] if name else lines[-1] if lines else type(error).__name__


def _damaged(path: Path, reason: object) -> str:
    return (
        f"Checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged: {reason}. Remove it and continue "
        "from another checkpoint of the same folder, or train again."
    )


def refuse_foreign_checkpoint(checkpoint: Mapping[str, Any], name: str, training: Mapping[str, str]) -> None:
    """Raise ValueError if a training cannot continue from a checkpoint; the message names the difference.

    Args:
        checkpoint: checkpoint from `read_checkpoint`.
        name: name of its file, for the message.
        training: "dataset", "configuration" and "fold" of the training.
    """
    if DIFFUSION_KEY not in checkpoint:
        raise ValueError(
            f"{name} is a checkpoint of {checkpoint.get('trainer_name')}, not of a diffusion trainer: another trainer "
            "used its output folder. Remove it, or use another plans_name."
        )
    init = checkpoint["init_args"]
    saved = {"dataset": init["plans"]["dataset_name"], **{key: str(init[key]) for key in ("configuration", "fold")}}
    for key, ours in training.items():
        if saved[key] != ours:
            raise ValueError(
                f"{name} is of {key} {saved[key]}, this training is of {key} {ours}: remove it from this output folder, or "
                "give it as -pretrained_weights to start a new training from its weights."
            )


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint to a temporary file and rename it, so that the previous one is kept until the new one is on disk.

    Raises:
        FloatingPointError: as `refuse_not_finite`; the previous file is kept.
        OSError: the file cannot be written (full disk, read-only folder); the previous file is kept.
    """
    refuse_not_finite(checkpoint["network_weights"], path)
    write_aside(lambda aside: torch.save(checkpoint, aside), path)


CONTINUE = (
    "The previous checkpoint, if any, is kept. Free some space or make the folder writable, then continue with --c."
)


def write_aside(write: Callable[[str], object], path: str | Path, cure: str = CONTINUE) -> None:
    """Call `write` with the name of a temporary file, then rename that file to `path` if `write` created it.

    Once this function returns, the file survives a power loss. `cure` is the end of the message of an error.

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
    except BaseException as error:  # also remove the temporary file on signals
        aside.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        raise OSError(f"Could not write {path}: {error}. {cure}") from error


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise  # the others are ignored, because some file systems, such as network shares, cannot sync folders
    finally:
        os.close(descriptor)


def refuse_not_finite(weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raise FloatingPointError if weights are NaN or infinite, so that they do not replace a good checkpoint.

    Args:
        weights: state dict of the network.
        path: path of the checkpoint to write.

    Raises:
        FloatingPointError: some weights are NaN or infinite. The message names the first of them, the file and the cure.
    """
    for name, values in weights.items():
        if values.is_floating_point() and values.numel() and not all_finite(values):
            raise FloatingPointError(
                f"{path} was not written: the network's {name} has become NaN or infinite. The previous checkpoint is kept: "
                "continue from it (with --c if the denoiser was trained, else by the same command). If it happens again, look "
                "for extreme intensities in the training cases, or start a new training with a lower learning rate."
            )


def remove_what_killed_jobs_left(folder: Path) -> None:
    """Remove temporary files of jobs that were killed while writing; recent files are kept, because a job may be writing."""
    for path in folder.glob(f".*{ASIDE}"):
        with contextlib.suppress(FileNotFoundError):  # another rank or job may remove it at the same time
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_SECONDS:
                path.unlink()
