"""Which folder of preprocessed data a configuration uses: nnU-Net's own where its data are the same."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

SAME_DATA = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
)
"""Entries of a configuration that decide what its preprocessed data are."""


def shared_identifier(dataset_name: str, plans: Mapping[str, Any], configuration: str) -> str:
    """Return the data identifier of a configuration: that of nnU-Net's data where they are the same, else one of its own.

    Args:
        dataset_name: DatasetXXX_NAME.
        plans: new plans, all of them.
        configuration: one that inherits from no other.

    Raises:
        ValueError: data of another spacing lie in the folder of that name.
    """
    preprocessed, own = Path(nnUNet_preprocessed) / dataset_name, plans["configurations"][configuration]
    identifier = f"{plans['plans_name']}_{configuration}"
    stock = preprocessed / "nnUNetPlans.json"
    theirs = json.loads(stock.read_text()) if stock.is_file() else None
    if theirs is not None:
        other = theirs["configurations"].get(configuration, {})
        same = theirs["transpose_forward"] == list(plans["transpose_forward"])
        if same and all(_same(own.get(key), other.get(key)) for key in SAME_DATA):
            identifier = other["data_identifier"]
    refuse_other_spacing(preprocessed / identifier, plans, configuration)
    return identifier


def refuse_other_spacing(folder: Path, plans: Mapping[str, Any], configuration: str) -> None:
    """Raise ValueError if a case in `folder` was resampled to another spacing than the configuration's."""
    if not folder.is_dir():
        return
    cases = infer_dataset_class(str(folder)).get_identifiers(str(folder)) if any(folder.iterdir()) else []
    for case in cases[:1]:
        with (folder / f"{case}.pkl").open("rb") as file:
            properties = pickle.load(file)  # written by nnU-Net's own preprocessing
        data = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)[0]
        order = list(plans["transpose_forward"])
        spacing = [float(s) for s in plans["configurations"][configuration]["spacing"]]
        before = [properties["spacing"][axis] for axis in order]
        if len(spacing) < len(before):  # 2d: slices are not resampled along the first axis
            spacing = [before[0], *spacing]
        wanted = compute_new_shape(properties["shape_after_cropping_and_before_resampling"], before, spacing)
        if not np.array_equal(wanted, data.shape[1:]):
            raise ValueError(
                f"{folder} holds data of another spacing: case {case} has the shape {tuple(data.shape[1:])}, spacing "
                f"{spacing} would give {tuple(int(edge) for edge in wanted)}. Give the new plans another name "
                "(-overwrite_plans_name), or remove that folder."
            )


def is_complete(folder: Path, cases: list[str]) -> bool:
    """Whether all cases are preprocessed in `folder`, so that nothing has to be done again."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    return set(cases) <= set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


def _same(ours: Any, theirs: Any) -> bool:
    def plain(value: Any) -> Any:
        if isinstance(value, (np.ndarray, list, tuple)):
            return [plain(entry) for entry in value]
        return round(float(value), 6) if isinstance(value, (float, np.floating)) else value

    return plain(ours) == plain(theirs)
