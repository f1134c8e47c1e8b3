"""Maps of numbers, brought from the network's grid to the image and written in its geometry, as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

FLOAT_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".tif", ".tiff")
Writer = Callable[[NDArray, Path, Mapping[str, Any]], None]


def map_ending(ending: str) -> str:
    """Return the file ending of maps: that of the segmentations, or .tif where their format holds no floats."""
    return ending if ending.lower() in FLOAT_ENDINGS else ".tif"


def writer_of(reader: type, cure: str = "leave --uncertainty out") -> Writer:
    """Return the function that writes a map (*image) to a path, with the properties that one of nnU-Net's readers gave.

    Args:
        reader: class of the reader.
        cure: end of the message of the error.

    Raises:
        NotImplementedError: the reader is unknown.
    """
    if reader.__name__ not in WRITERS:
        raise NotImplementedError(
            f"the images are read with {reader.__name__}, for which maps of uncertainty cannot be written (known: "
            f"{', '.join(WRITERS)}): {cure}"
        )
    return WRITERS[reader.__name__]


def to_image(
    values: NDArray,
    outside: float,
    properties: Mapping[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> NDArray:
    """Return a map in the image's size (*image), resampled as nnU-Net resamples probabilities.

    Args:
        values: on the network's grid, (*volume), float32.
        outside: value where nnU-Net's preprocessing cropped the image.
        properties: properties of the preprocessed image.
        plans_manager: of the model.
        configuration_manager: of the model.
    """
    spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    current = list(configuration_manager.spacing)
    current = current if len(current) == len(spacing) else [spacing[0], *current]
    shape = properties["shape_after_cropping_and_before_resampling"]
    resampled = np.asarray(configuration_manager.resampling_fn_probabilities(values[None], shape, current, spacing))[0]
    # an interpolation of higher order overshoots
    resampled = resampled.clip(values.min(), values.max())
    whole = np.full(properties["shape_before_cropping"], outside, np.float32)
    whole = insert_crop_into_image(whole, resampled, properties["bbox_used_for_cropping"])
    return whole.transpose(plans_manager.transpose_backward)


def _write_with_itk(values: NDArray, path: Path, properties: Mapping[str, Any]) -> None:
    geometry = properties["sitk_stuff"]
    image = sitk.GetImageFromArray(values[0] if len(geometry["spacing"]) == 2 else values)
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    if "original_orientation" in geometry:
        image = sitk.DICOMOrient(image, geometry["original_orientation"])
    sitk.WriteImage(image, str(path), True)


def _write_with_nibabel(values: NDArray, path: Path, properties: Mapping[str, Any]) -> None:
    affines = properties["nibabel_stuff"]
    original = affines["original_affine"]
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), affines.get("reoriented_affine", original))
    if "reoriented_affine" in affines:
        image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), io_orientation(original)))
    nibabel.save(image, path)


def _write_picture(values: NDArray, path: Path, properties: Mapping[str, Any]) -> None:
    tifffile.imwrite(path, values[0], photometric="minisblack")


def _write_tiff(values: NDArray, path: Path, properties: Mapping[str, Any]) -> None:
    described = {"axes": "ZYX", "spacing": [float(edge) for edge in properties["spacing"]]}
    tifffile.imwrite(path, values, photometric="minisblack", compression="zlib", metadata=described)


WRITERS: dict[str, Writer] = {
    "SimpleITKIO": _write_with_itk,
    "SimpleITKIOWithReorient": _write_with_itk,
    "NibabelIO": _write_with_nibabel,
    "NibabelIOWithReorient": _write_with_nibabel,
    "NaturalImage2DIO": _write_picture,
    "Tiff3DIO": _write_tiff,
}
"""Name of nnU-Net's reader -> what writes a map beside the segmentations that it writes."""
