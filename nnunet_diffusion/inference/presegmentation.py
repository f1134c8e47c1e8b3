"""Reading external pre-segmentations: label maps or nnU-Net's .npz probabilities, resampled to the network's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_diffusion.inference.reading import one_line

SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE_VOXELS = 0.1
DIRECTION_TOLERANCE = 1e-3
SUM_TOLERANCE = 0.05  # nnU-Net writes probabilities in half precision
PRESEGMENTATION = "pre-segmentation"


@dataclass(frozen=True, eq=False)
class Presegmentation:
    """A pre-segmentation on the network's grid.

    Attributes:
        probabilities: (K, *volume), float32.
        certain: True if it was a label map, whose probabilities of 0 and 1 say nothing about confidence.
        source: path of the file.
    """

    probabilities: NDArray
    certain: bool
    source: str


def find_presegmentation(folder: Path, case: str, file_ending: str) -> Path:
    """Return the file of a case: probabilities (.npz) if they exist, else the label map.

    Raises:
        FileNotFoundError: neither exists.
    """
    for path in (folder / f"{case}.npz", folder / f"{case}{file_ending}"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"The pre-segmentation of {case} is missing: {folder} has neither {case}.npz nor {case}{file_ending}."
    )


def read_presegmentation(
    path: Path,
    properties: Mapping[str, Any],
    volume: Sequence[int],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
    what: str = PRESEGMENTATION,
    allow_ignored: bool = False,
) -> Presegmentation:
    """Read a file, then transpose, crop and resample it to the network's grid with nnU-Net's own functions.

    Args:
        path: label map with the image's geometry, or .npz with `probabilities` (K, *image) as written by nnU-Net.
        properties: properties of the preprocessed image.
        volume: size of the network's grid.
        plans_manager: of the model.
        configuration_manager: of the model.
        label_manager: of the model.
        what: what the file is, for the error messages.
        allow_ignored: whether a label map may have the ignore label; those voxels have no class.

    Raises:
        ValueError: geometry or labels do not match the image and the model. The message names the file, the value found
            and the expected one.
    """
    forward = plans_manager.transpose_forward
    image_shape = [int(properties["shape_before_cropping"][axis]) for axis in plans_manager.transpose_backward]
    certain = path.suffix != ".npz"
    if certain:
        array = read_label_map(what, path, properties, image_shape, plans_manager, label_manager, allow_ignored)
        resample = configuration_manager.resampling_fn_seg
    else:
        heads, regions = label_manager.num_segmentation_heads, label_manager.has_regions
        array = read_probabilities(what, path, image_shape, heads, regions)
        resample = configuration_manager.resampling_fn_probabilities
    array = array.transpose([0, *[axis + 1 for axis in forward]])
    cropped = (slice(None), *[slice(*bounds) for bounds in properties["bbox_used_for_cropping"]])
    array = array[cropped]
    spacing = [properties["spacing"][axis] for axis in forward]
    target = list(configuration_manager.spacing)
    target = target if len(target) == len(spacing) else [spacing[0], *target]
    moved = np.asarray(resample(array, list(volume), spacing, target))
    probabilities = one_hot(moved[0], label_manager) if certain else moved.astype(np.float32)
    return Presegmentation(probabilities, certain, str(path))


def read_label_map(
    what: str,
    path: Path,
    properties: Mapping[str, Any],
    image_shape: Sequence[int],
    plans_manager: PlansManager,
    label_manager: LabelManager,
    allow_ignored: bool = False,
) -> NDArray:
    """Read a label map (1, *image) with the geometry of its image.

    Args:
        what: what the label map is, for the error messages.
        path: path of the file.
        properties: properties of the image, as returned by nnU-Net's reader.
        image_shape: shape of the image.
        plans_manager: of the model.
        label_manager: of the model.
        allow_ignored: whether it may have the ignore label.

    Raises:
        ValueError: the file cannot be read, or geometry or labels do not match. The message names the file, the value found
            and the expected one.
    """
    try:
        found, theirs = plans_manager.image_reader_writer_class().read_seg(str(path))
    except Exception as error:  # the exception depends on the reader's library
        raise ValueError(f"The {what} {path} cannot be read: {one_line(error)}") from error
    if len(found) != 1:
        raise ValueError(
            f"The {what} {path} has {len(found)} channels (a colour image?), but must be a label map with one."
        )
    check_shape(what, path, found.shape[1:], image_shape)
    check_geometry(what, path, theirs, properties)
    known = set(map(int, label_manager.all_labels)) | {0}
    if allow_ignored and label_manager.has_ignore_label:
        known.add(label_manager.ignore_label)
    unknown = sorted(set(np.unique(found).tolist()) - known)
    if label_manager.has_ignore_label and label_manager.ignore_label in unknown:
        raise ValueError(
            f"The {what} {path} has the ignore label {label_manager.ignore_label}, which marks unknown voxels: replace it "
            "with the most likely class."
        )
    if unknown:
        raise ValueError(
            f"The {what} {path} has label {unknown[0]:g}, which is not in dataset.json ({sorted(known)}): map its labels "
            "to the model's."
        )
    return found.astype(np.int16)


def read_probabilities(
    what: str, path: Path, image_shape: Sequence[int], heads: int, regions: bool, reference: str = "its image"
) -> NDArray:
    """Read the probabilities (K, *image), float32, of an .npz file that nnU-Net wrote.

    Args:
        what: what they are, for the error messages.
        path: path of the file.
        image_shape: shape of the image.
        heads: K.
        regions: whether the heads are regions, whose probabilities need not sum to one.
        reference: what has that shape, for the error messages.

    Raises:
        ValueError: the file cannot be read, or its values are not such probabilities. The message names the file, the value
            found and the expected one.
    """
    try:
        with np.load(path) as content:  # allow_pickle is False
            if "probabilities" not in content:
                raise ValueError("it has no array 'probabilities'")
            probabilities = content["probabilities"]
    except Exception as error:  # for a damaged file zipfile, zlib, tokenize or numpy raise different exceptions
        raise ValueError(
            f"The {what} {path} is not an .npz of nnUNetv2_predict --save_probabilities: {error}"
        ) from error
    if len(probabilities) != heads:
        raise ValueError(
            f"The {what} {path} has {len(probabilities)} channels, but must have {heads}, one per class: "
            "give probabilities of the same dataset."
        )
    check_shape(what, path, probabilities.shape[1:], image_shape, reference)
    probabilities = probabilities.astype(np.float32)
    if not np.isfinite(probabilities).all() or probabilities.min() < -1e-3 or probabilities.max() > 1 + 1e-3:
        raise ValueError(
            f"The {what} {path} holds values from {probabilities.min()} to {probabilities.max()}, which are not "
            "probabilities: predict it again."
        )
    total = probabilities.sum(0)
    if not regions and np.abs(total - 1).max() > SUM_TOLERANCE:
        raise ValueError(
            f"The {what} {path} has probabilities whose sum over the classes is {total.min():.3f} to "
            f"{total.max():.3f} instead of 1: predict it again."
        )
    return probabilities.clip(0, 1)


def check_shape(
    what: str, path: Path, found: Sequence[int], expected: Sequence[int], reference: str = "its image"
) -> None:
    """Raise ValueError if a file has another shape than its reference; the arguments are those of `check_geometry`."""
    if list(found) != list(expected):
        raise ValueError(
            f"The {what} {path} has shape {tuple(found)}, {reference} {tuple(expected)}: resample it to that."
        )


def check_geometry(
    what: str, path: Path, theirs: Mapping[str, Any], properties: Mapping[str, Any], reference: str = "its image"
) -> None:
    """Compare the spacing and, if the reader returns them, origin and direction.

    Args:
        what: what the file is, for the error message.
        path: path of the file.
        theirs: properties of the file, as returned by nnU-Net's reader.
        properties: properties of its reference.
        reference: what these are of, for the error message.

    Raises:
        ValueError: one differs.
    """
    pairs = [("spacing", theirs["spacing"], properties["spacing"], SPACING_TOLERANCE * np.min(properties["spacing"]))]
    ours, others = properties.get("sitk_stuff"), theirs.get("sitk_stuff")
    if ours and others:
        limit = ORIGIN_TOLERANCE_VOXELS * min(ours["spacing"])
        pairs.append(("origin", others["origin"], ours["origin"], limit))
        pairs.append(("direction", others["direction"], ours["direction"], DIRECTION_TOLERANCE))
    ours, others = properties.get("nibabel_stuff"), theirs.get("nibabel_stuff")
    if ours and others:
        limit = ORIGIN_TOLERANCE_VOXELS * np.min(properties["spacing"])
        pairs.append(("affine", np.ravel(others["original_affine"]), np.ravel(ours["original_affine"]), limit))
    for name, found, expected, tolerance in pairs:
        if len(found) != len(expected) or np.abs(np.subtract(found, expected)).max() > tolerance:
            raise ValueError(
                f"The {what} {path} has {name} {tuple(map(float, found))}, {reference} "
                f"{tuple(map(float, expected))}: resample it to that."
            )


def one_hot(label_map: NDArray, label_manager: LabelManager) -> NDArray:
    """Return (K, *volume): classes, or masks of regions."""
    if label_manager.has_regions:
        heads = [np.isin(label_map, region) for region in label_manager.foreground_regions]
    else:
        heads = [label_map == label for label in label_manager.all_labels]
    return np.stack(heads).astype(np.float32)
