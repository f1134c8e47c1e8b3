"""Datasets that consist of a fingerprint: planners look at nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def write_fingerprint_dataset(
    raw: Path,
    preprocessed: Path,
    shapes: Sequence[Sequence[int]],
    spacing: Sequence[float],
    channels: Sequence[str] = ("CT",),
    labels: Sequence[str] = ("background", "organ"),
) -> None:
    """Write a raw dataset of tiny images whose fingerprint says what is wanted.

    Args:
        raw: folder of the dataset, to be made.
        preprocessed: folder for its fingerprint, to be made.
        shapes: of each case, in voxels, slices first.
        spacing: of all cases, in millimetres.
        channels: their names.
        labels: their names, background first.
    """
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    empty = sitk.GetImageFromArray(np.zeros((2, 2, 2), np.uint8))
    for case in range(len(shapes)):
        sitk.WriteImage(empty, str(raw / "labelsTr" / f"case{case}.nii.gz"))
        for channel in range(len(channels)):
            sitk.WriteImage(empty, str(raw / "imagesTr" / f"case{case}_{channel:04d}.nii.gz"))
    names = {str(number): channel for number, channel in enumerate(channels)}
    description = {
        "channel_names": names,
        "numTraining": len(shapes),
        "file_ending": ".nii.gz",
        "labels": {label: number for number, label in enumerate(labels)},
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    keys = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    properties = {
        "foreground_intensity_properties_per_channel": {number: dict.fromkeys(keys, 1.0) for number in names},
        "median_relative_size_after_cropping": 1.0,
        "shapes_after_crop": [list(map(int, shape)) for shape in shapes],
        "spacings": [list(map(float, spacing))] * len(shapes),
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(properties))
