"""Images as they are read: whole, finite, and of a size that the memory holds after resampling."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_diffusion.inference.memory import free_bytes, readable_size

NIFTI = (".nii", ".nii.gz")
SPACING_OF_2D = 999  # what nnU-Net's readers give an image with two axes as the third
IMAGE_BYTES = 8  # of a voxel and channel on the image's grid: the file's values and their float32 copy
EXPORT_BYTES = 12  # of a voxel and class there: logits in float32, resampled in float64
NETWORK_BYTES = 8  # of a voxel and channel on the network's grid: float32 before and after normalisation
RESAMPLING_BYTES = 16  # of a voxel there: one channel at a time in float64, with its interpolation
LOGIT_BYTES = 4  # of a voxel and class there


def read_images(paths: Sequence[str], reader: Any) -> tuple[NDArray, dict[str, Any]]:
    """Read the channels of a case by nnU-Net's reader.

    Args:
        paths: one file per channel, or one with all of them.
        reader: an instance of nnU-Net's image reader of the plans.

    Returns:
        The image (C, *image), float32, and its properties.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, is cut off, or holds NaN or infinite voxels or no usable spacing; names it.
        MemoryError: the image does not fit into memory.
    """
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is {'a folder, not a file' if Path(path).is_dir() else 'missing'}")
        if path.endswith(NIFTI):
            check_nifti(path)
    try:
        image, properties = reader.read_images(list(paths))
    except Exception as error:  # each reader raises what its library raises
        raise ValueError(f"{', '.join(paths)} cannot be read: {one_line(error)}") from error
    by_channel = paths if len(paths) == len(image) else [paths[0]] * len(image)
    for path, channel in zip(by_channel, image, strict=True):
        if not np.isfinite(channel).all():
            raise ValueError(f"{path} has NaN or infinite voxels: replace them and predict again")
    return image, properties


def check_nifti(path: str | Path, whole: bool = True) -> None:
    """Look at a NIfTI file as it is stored, because ITK reads NaN, and what is cut off, as 0.

    Args:
        path: of the file.
        whole: read voxels that are integers too, to notice a file that is cut off.

    Raises:
        ValueError: it is damaged or cut off, holds NaN or infinite voxels, or has a spacing that is not finite.
        MemoryError: its voxels do not fit into memory.
    """
    try:
        file = nibabel.load(path)
        shape, spacing = file.shape, [float(edge) for edge in file.header.get_zooms()[:3]]  # type: ignore[attr-defined]
    except Exception as error:  # nibabel raises what gzip, zlib and struct raise
        raise ValueError(f"{path} is damaged or not a NIfTI file: {one_line(error)}") from error
    needed, free = IMAGE_BYTES * math.prod(shape), free_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"{path} has {_times(shape)} voxels, which need {readable_size(needed)} ({readable_size(free)} are free): crop the "
            "image, or take a machine with more memory"
        )
    if not all(math.isfinite(edge) for edge in spacing):
        raise ValueError(f"{path} has a spacing of {_times(spacing)} mm: correct its header")
    if not (whole or file.header.get_data_dtype().kind in "fc"):  # type: ignore[attr-defined]
        return
    try:
        voxels = np.asanyarray(file.dataobj)  # type: ignore[attr-defined]
    except Exception as error:
        raise ValueError(f"{path} is damaged or cut off: {one_line(error)}") from error
    if voxels.dtype.kind in "fc" and not np.isfinite(voxels).all():
        raise ValueError(f"{path} has NaN or infinite voxels: replace them")


def check_size(
    name: str,
    image: NDArray,
    spacing: Sequence[float],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    heads: int,
) -> None:
    """Refuse an image that resampling would make too large for the memory, or smaller than a voxel.

    Counted are the preprocessing of this case and the export of its result; the reverse process plans for itself.

    Args:
        name: of its files, for the message.
        image: (C, *image).
        spacing: of the image, in mm.
        plans_manager: of the model.
        configuration_manager: of the model.
        heads: K.

    Raises:
        ValueError: it would be smaller than a voxel of the model, or the model needs three axes.
        MemoryError: it would be too large; says how large, what it needs and what there is.
    """
    order = plans_manager.transpose_forward
    before, target = [float(spacing[axis]) for axis in order], [float(edge) for edge in configuration_manager.spacing]
    if len(target) == 3 and spacing[0] == SPACING_OF_2D:
        raise ValueError(f"{name} has two axes, but this model is for images with three")
    target = target if len(target) == len(before) else [before[0], *target]
    shape = nonzero_shape(image.transpose([0, *[axis + 1 for axis in order]]))
    resampled = [int(edge) for edge in compute_new_shape(shape, before, target)]
    spacings = f"{_times(before)} mm to the model's {_times(target)} mm"
    if min(resampled) < 1:
        raise ValueError(
            f"{name} has {_times(shape)} voxels, of which resampling from {spacings} leaves none: correct the spacing in its "
            "header"
        )
    channels = len(image)
    needed = math.prod(image.shape[1:]) * (IMAGE_BYTES * channels + EXPORT_BYTES * heads)
    needed += math.prod(resampled) * (NETWORK_BYTES * channels + RESAMPLING_BYTES + LOGIT_BYTES * heads)
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"{name}, resampled from {spacings}, would have {_times(resampled)} voxels and need {readable_size(needed)} "
            f"({readable_size(free)} are free): correct the spacing in its header if it is wrong, else crop the image or take "
            "a machine with more memory"
        )


def nonzero_shape(image: NDArray) -> list[int]:
    """Shape of the box around what is not 0 in any channel of (C, *image), to which nnU-Net crops; of all if nothing is."""
    filled = (image != 0).any(0)
    if not filled.any():
        return list(filled.shape)
    places = [
        np.flatnonzero(filled.any(tuple(other for other in range(filled.ndim) if other != axis)))
        for axis in range(filled.ndim)
    ]
    return [int(found[-1] - found[0] + 1) for found in places]


def constant_channels(paths: Sequence[str], image: NDArray) -> list[str]:
    """Return a warning for each channel of (C, *image) whose voxels all have one value."""
    by_channel = paths if len(paths) == len(image) else [paths[0]] * len(image)
    return [
        f"WARNING: all voxels of {path} have the value {channel.flat[0]:g}, so there is nothing to see in it"
        for path, channel in zip(by_channel, image, strict=True)
        if channel.min() == channel.max()
    ]


def one_line(error: BaseException) -> str:
    """Return what a reading library says is wrong, without the places in its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r"^.*\bERROR:\s*", "", lines[-1]) if lines else type(error).__name__
    return re.sub(r"^\S+\(0x[0-9a-f]+\):\s*", "", said)


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(str(number) if isinstance(number, int) else f"{number:g}" for number in numbers)
