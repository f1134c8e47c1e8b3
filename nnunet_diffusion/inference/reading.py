"""Reading images, with checks that they are complete and finite and that they fit into memory after resampling."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from nibabel.openers import ImageOpener
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, determine_do_sep_z_and_axis
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_diffusion.inference.memory import case_bytes, free_bytes, readable_size, reading_bytes
from nnunet_diffusion.inference.output import Managers

NIFTI = (".nii", ".nii.gz")
SPACING_OF_2D = 999  # spacing that nnU-Net's readers give to the third axis of a 2D image
BLOCK_BYTES = 2**24  # bytes of a NIfTI file checked at once; a multiple of every voxel size


def read_images(paths: Sequence[str], reader: Any, limit: float | None = None) -> tuple[NDArray, dict[str, Any]]:
    """Read the channels of a case with nnU-Net's reader.

    Args:
        paths: one file per channel, or one file with all channels.
        reader: instance of the plans' image reader of nnU-Net.
        limit: main memory that the image may use, in bytes; None for the free memory.

    Returns:
        The image (C, *image), float32, and its properties.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, is truncated, has NaN or infinite voxels, or an invalid spacing. The message names
            the file.
        MemoryError: the image does not fit into memory.
    """
    headers = read_headers(paths, reader)
    for header in headers:
        header.check_beside(headers[0])
        _check_reading(header, limit)
    for path in paths:
        if path.endswith(NIFTI):
            check_nifti(path)
    try:
        image, properties = reader.read_images(list(paths))
    except Exception as error:  # the exception depends on the reader's library
        raise ValueError(f"{', '.join(paths)} cannot be read: {one_line(error)}") from error
    by_channel = paths if len(paths) == len(image) else [paths[0]] * len(image)
    for path, channel in zip(by_channel, image, strict=True):
        if not np.isfinite(channel).all():
            raise ValueError(f"{path} has NaN or infinite voxels: replace them and predict again")
    _check_spacing(paths[0], properties["spacing"])
    return image, properties


@dataclass(frozen=True)
class Header:
    """Shape and spacing of an image file, read without its voxels.

    Attributes:
        path: path of the file.
        shape: (C, *image), as nnU-Net's reader will return it, with three axes even for a 2D image.
        spacing: spacing in mm, per axis of the image.
    """

    path: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    def check_beside(self, first: Header) -> None:
        """Raise ValueError if the channels of a case differ in shape or spacing."""
        for what in ("shape", "spacing"):
            found, expected = getattr(self, what), getattr(first, what)
            if found != expected:
                raise ValueError(
                    f"{self.path} has {what} {_times(found)}, but {first.path} has {_times(expected)}: resample one channel to "
                    "the other"
                )


def read_headers(paths: Sequence[str], reader: Any) -> list[Header]:
    """Read the headers of the channels of a case; empty unless the reader uses SimpleITK or nibabel.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a header cannot be read or is invalid. The message names the file.
    """
    if not paths:
        raise FileNotFoundError("the case has no image: give one file per channel")
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is {'a folder, not a file' if Path(path).is_dir() else 'missing'}")
        if path.endswith(NIFTI):
            check_nifti_header(path)
    if isinstance(reader, SimpleITKIO):
        return [_itk_header(path) for path in paths]
    if isinstance(reader, (NibabelIO, NibabelIOWithReorient)):
        return [_nibabel_header(path) for path in paths]
    return []


def _itk_header(path: str) -> Header:
    file = sitk.ImageFileReader()
    file.SetFileName(path)
    try:
        file.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    size, spacing = file.GetSize()[::-1], file.GetSpacing()[::-1]
    if "vector" in sitk.GetPixelIDValueAsString(file.GetPixelID()):
        raise ValueError(
            f"{path} has {file.GetNumberOfComponents()} values in each voxel (a colour image?), but must have one: save each "
            "channel as a file of its own"
        )
    if not 2 <= len(size) <= 4:
        raise ValueError(
            f"{path} has {len(size)} axes, but must have two or three, or four of which the last is the channels"
        )
    if len(size) == 2:
        size, spacing = (1, *size), (SPACING_OF_2D * max(spacing), *spacing)
    header = Header(path, size if len(size) == 4 else (1, *size), spacing[-3:])
    _check_spacing(path, header.spacing)
    return header


def _nibabel_header(path: str) -> Header:
    image: Any = nibabel.load(path)
    if len(image.shape) != 3:
        raise ValueError(f"{path} has {len(image.shape)} axes, but must have three")
    zooms = image.header.get_zooms()
    return Header(path, (1, *image.shape[::-1]), tuple(float(edge) for edge in zooms[::-1]))


def without_thickness(spacing: Sequence[float]) -> tuple[float, ...]:
    """Return a spacing with 1 mm in place of the thickness that nnU-Net's readers give to an image of two axes."""
    first, *others = map(float, spacing)
    return (1.0 if others and first == SPACING_OF_2D * max(others) else first, *others)


def _check_reading(header: Header, limit: float | None) -> None:
    needed, free = reading_bytes(header.shape), free_bytes(torch.device("cpu")) if limit is None else limit
    if needed > free:
        raise MemoryError(
            f"{header.path} has {_times(header.shape[1:])} voxels, which need {readable_size(needed)} "
            f"({readable_size(free)} are free): crop the image, or take a machine with more memory"
        )


def _check_spacing(path: str, spacing: Sequence[Any]) -> None:
    # the JSON files of Tiff3DIO may hold any value
    if not all(isinstance(edge, (int, float, np.number)) and 0 < edge < math.inf for edge in spacing):
        raise ValueError(f"{path} has a spacing of {_times(spacing)} mm: correct its header")


def check_nifti_header(path: str | Path) -> None:
    """Check the stored spacing, because ITK and nibabel read 0 as 1 and drop a minus sign.

    Raises:
        ValueError: the file is damaged, or a spacing is not a positive number.
    """
    try:
        kind: Any = type(nibabel.load(path).header)
        with ImageOpener(str(path)) as file:
            header = kind.from_fileobj(file, check=False)
        axes = min(3, int(header["dim"][0]))
        sizes, spacing = (header[key][1 : axes + 1].tolist() for key in ("dim", "pixdim"))
    except Exception as error:  # nibabel raises what gzip, zlib and struct raise
        raise ValueError(f"{path} is damaged or not a NIfTI file: {one_line(error)}") from error
    # some programs write a spacing of 0 for an axis of length one
    _check_spacing(
        str(path), [1 if size == 1 and edge == 0 else edge for size, edge in zip(sizes, spacing, strict=True)]
    )


def check_nifti(path: str | Path, whole: bool = True) -> None:
    """Check the stored voxels of a NIfTI file, because ITK reads NaN and missing voxels as 0.

    Args:
        path: path of the file.
        whole: also read integer voxels, to detect a truncated file.

    Raises:
        ValueError: the file is damaged or truncated, or has complex, NaN or infinite voxels.
    """
    try:
        image: Any = nibabel.load(path)
        kind, shape = image.get_data_dtype(), image.shape
    except Exception as error:  # nibabel raises what gzip, zlib and struct raise
        raise ValueError(f"{path} is damaged or not a NIfTI file: {one_line(error)}") from error
    if kind.kind == "c":
        raise ValueError(f"{path} has complex numbers as voxels: save their magnitude")
    if not (whole or kind.kind == "f"):
        return
    left = math.prod(shape) * kind.itemsize
    try:
        with ImageOpener(str(path)) as file:
            file.seek(image.dataobj.offset)
            while left > 0:
                block = file.read(min(left, BLOCK_BYTES))
                if len(block) < min(left, BLOCK_BYTES):
                    raise EOFError(f"{left - len(block)} bytes are missing")
                if kind.kind == "f" and not np.isfinite(np.frombuffer(block, kind)).all():
                    break
                left -= len(block)
            else:
                file.read(1)  # gzip compares the checksum at the end of the file
                return
    except Exception as error:
        raise ValueError(f"{path} is damaged or cut off: {one_line(error)}") from error
    raise ValueError(f"{path} has NaN or infinite voxels: replace them")


def expected_bytes(paths: Sequence[str], managers: Managers) -> int:
    """Return the peak main memory of a case in bytes, estimated from its images' headers; 0 if they cannot be read."""
    plans_manager, configuration_manager, dataset_json = managers
    try:
        headers = read_headers(paths, plans_manager.image_reader_writer_class())
    except (OSError, ValueError):  # reported when the case is prepared
        return 0
    if not headers:
        return 0
    shape = (sum(header.shape[0] for header in headers), *headers[0].shape[1:])
    heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    return _resampled(shape, shape[1:], headers[0].spacing, plans_manager, configuration_manager, heads)[1]


def check_size(
    name: str,
    image: NDArray,
    spacing: Sequence[float],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    heads: int,
    limit: float | None = None,
) -> None:
    """Raise an error if the resampled image would not fit into memory or would be smaller than a voxel.

    The estimate covers preprocessing and export; `plan_memory` plans the reverse process.

    Args:
        name: names of the files, for the message.
        image: (C, *image).
        spacing: spacing of the image in mm.
        plans_manager: of the model.
        configuration_manager: of the model.
        heads: K.
        limit: main memory that the case may use, in bytes; None for the free memory.

    Raises:
        ValueError: the image would be smaller than a voxel of the model, or has two axes and the model needs three.
        MemoryError: it would be too large. The message gives its size, the needed and the free memory.
    """
    before, target = ([float(edge) for edge in each] for each in (spacing, configuration_manager.spacing))
    if len(target) == 3 and image.shape[1] == 1 and before[0] == SPACING_OF_2D * max(before[1:]):
        raise ValueError(f"{name} has two axes, but this model is for images with three")
    shape = nonzero_shape(image)
    resampled, needed = _resampled(image.shape, shape, before, plans_manager, configuration_manager, heads)
    order = plans_manager.transpose_forward
    spacings = f"{_times([before[axis] for axis in order])} mm to the model's {_times(target)} mm"
    if min(resampled) < 1:
        raise ValueError(
            f"{name} has {_times([shape[axis] for axis in order])} voxels, of which resampling from {spacings} leaves none: "
            "correct the spacing in its header"
        )
    free = free_bytes(torch.device("cpu")) if limit is None else limit
    if needed > free:
        raise MemoryError(
            f"{name}, resampled from {spacings}, would have {_times(resampled)} voxels and need {readable_size(needed)} "
            f"({readable_size(free)} are free): correct the spacing in its header if it is wrong, else crop the image or take "
            "a machine with more memory"
        )


def _resampled(
    shape: Sequence[int],
    cropped: Sequence[int],
    spacing: Sequence[float],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    heads: int,
) -> tuple[list[int], int]:
    """Return the size of an image (C, *image) after nnU-Net's cropping and resampling, and the case's main memory in bytes."""
    order = plans_manager.transpose_forward
    before, target = [float(spacing[axis]) for axis in order], [float(edge) for edge in configuration_manager.spacing]
    target = target if len(target) == len(before) else [before[0], *target]
    old = [cropped[axis] for axis in order]
    new = [int(edge) for edge in compute_new_shape(old, before, target)]
    separate = old != new and bool(determine_do_sep_z_and_axis(None, before, target)[0])
    return new, case_bytes(shape[0], heads, shape[1:], new, old != new, separate)


def nonzero_shape(image: NDArray) -> list[int]:
    """Return the shape of the nonzero bounding box of (C, *image), to which nnU-Net crops; the full shape if all is 0."""
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
    """Return the message of a reading library in one line, without locations in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    said = next((line for line in lines if "ERROR: " in line), lines[-1])
    said = re.sub(r"^.*\bERROR:\s*", "", said)
    return re.sub(r"^\S+\(0x[0-9a-f]+\):\s*", "", said)


def _times(numbers: Sequence[Any]) -> str:
    return " x ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)
