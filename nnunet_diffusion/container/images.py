"""Images of any format that SimpleITK reads, as nnU-Net's arrays, and results with exactly their geometry."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunet_diffusion.inference.memory import readable_size, reading_bytes
from nnunet_diffusion.inference.reading import NIFTI, SPACING_OF_2D, check_nifti, check_nifti_header, one_line

NNUNETS_ORIENTATION = "RAS"
"""That of nnU-Net's readers whose names end with `WithReorient`."""
TOLERANCE = 1e-4  # of a geometry that is read again; TIFF stores the spacing as a fraction


@dataclass(frozen=True)
class Geometry:
    """Size in voxels, spacing and origin in mm, and direction of an image, in SimpleITK's order x, y, z."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image | sitk.ImageFileReader) -> Geometry:
        """Return that of an image, or of a file whose header was read."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def equals(self, other: Geometry) -> bool:
        """True if the sizes are the same and all numbers agree within 1e-4, relative or absolute."""
        pairs = ((self.spacing, other.spacing), (self.origin, other.origin), (self.direction, other.direction))
        return self.size == other.size and all(np.allclose(*pair, TOLERANCE, TOLERANCE) for pair in pairs)

    def applied_to(self, image: sitk.Image) -> sitk.Image:
        """Return an image of this size with this geometry."""
        assert image.GetSize() == self.size
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image


@dataclass(frozen=True, eq=False)
class CaseImage:
    """The channels of a case as nnU-Net takes them.

    Attributes:
        channels: (C, z, y, x), float32; of an image with two axes z is 1.
        spacing: in mm, per axis z, y, x.
        geometry: of the files.
        turned: geometry of `channels`.
    """

    channels: NDArray[np.float32]
    spacing: tuple[float, ...]
    geometry: Geometry
    turned: Geometry


def read_case(paths: Sequence[Path], reader: str, limit: float) -> CaseImage:
    """Read the channels of a case.

    Args:
        paths: one file for each channel, or files with several values in each voxel.
        reader: name of nnU-Net's reader that the model was trained with.
        limit: main memory that the image may use, in bytes.

    Raises:
        ValueError: a file cannot be read, has not two or three axes, holds complex, NaN or infinite voxels, or its geometry
            differs from that of the first. The message names it.
        MemoryError: the image does not fit into memory.
    """
    for path in paths:
        _check_header(path, len(paths), limit)
    images = [_read(path) for path in paths]
    geometry = Geometry.of(images[0])
    for path, image in zip(paths, images, strict=True):
        if not geometry.equals(Geometry.of(image)):
            raise ValueError(
                f"{path} has another size, spacing, origin or direction than {paths[0]}: resample one to the other"
            )
    if reader.endswith("WithReorient") and len(geometry.size) == 3:
        images = [sitk.DICOMOrient(image, NNUNETS_ORIENTATION) for image in images]
    found = [channel for path, image in zip(paths, images, strict=True) for channel in _channels(path, image)]
    turned = Geometry.of(images[0])
    spacing = turned.spacing[::-1]
    if len(spacing) == 2:
        spacing = (SPACING_OF_2D * max(spacing), *spacing)
    if reader == "NaturalImage2DIO":  # which ignores the files' spacing
        spacing = (SPACING_OF_2D, 1.0, 1.0)
    return CaseImage(np.stack(found), spacing, geometry, turned)


def _check_header(path: Path, files: int, limit: float) -> None:
    file = sitk.ImageFileReader()
    file.SetFileName(str(path))
    if path.name.endswith(NIFTI):
        check_nifti_header(path)
    try:
        file.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    size = file.GetSize()
    if len(size) not in (2, 3):
        raise ValueError(f"{path} has {len(size)} axes, but must have two or three")
    if "complex" in sitk.GetPixelIDValueAsString(file.GetPixelID()):
        raise ValueError(f"{path} has complex numbers as voxels: save their magnitude")
    needed = reading_bytes((files * file.GetNumberOfComponents(), *size))
    if needed > limit:
        raise MemoryError(
            f"{path} has {' x '.join(map(str, size))} voxels, which need {readable_size(needed)} ({readable_size(limit)} are "
            "free): crop the image, or give more memory"
        )
    if path.name.endswith(NIFTI):
        check_nifti(path)


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error


def _channels(path: Path, image: sitk.Image) -> NDArray[np.float32]:
    """Return (C, z, y, x)."""
    with np.errstate(over="ignore"):  # a number that float32 does not hold becomes infinite and is refused
        values = sitk.GetArrayFromImage(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has NaN or infinite voxels: replace them")
    values = np.moveaxis(values, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else values[None]
    return values if image.GetDimension() == 3 else values[:, None]


def write_result(values: NDArray, path: Path, case: CaseImage) -> None:
    """Write a label map or a map of numbers in the geometry of a case, completely or not at all.

    Args:
        values: (z, y, x), as the channels of the case.
        path: of the file; its folder is created.
        case: whose geometry it gets.

    Raises:
        OSError: the file cannot be written, or its format does not hold the geometry.
    """
    image = sitk.GetImageFromArray(values if len(case.turned.size) == 3 else values[0])
    if case.turned != case.geometry:
        orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(case.geometry.direction)
        image = sitk.DICOMOrient(case.turned.applied_to(image), orientation)
    hidden = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        sitk.WriteImage(case.geometry.applied_to(image), str(hidden), True)
        file = sitk.ImageFileReader()
        file.SetFileName(str(hidden))
        file.ReadImageInformation()
        if not Geometry.of(file).equals(case.geometry):
            raise OSError(f"{path} does not hold the geometry of its image: give the images as .mha")
        os.replace(hidden, path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {one_line(error)}") from error
    finally:
        hidden.unlink(missing_ok=True)
