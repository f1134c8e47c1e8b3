"""Reuse of nnU-Net's folder of preprocessed data by a configuration, if its data are the same."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_diffusion.files import read_plans

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
"""Entries of a configuration that determine its preprocessed data."""
SAME_FOR_ALL = ("transpose_forward", "foreground_intensity_properties_per_channel")
"""Entries of the plans that determine the preprocessed data of all configurations."""
STOCK_PLANS = (
    "nnUNetPlans.json",
    "nnUNetResEncUNetMPlans.json",
    "nnUNetResEncUNetLPlans.json",
    "nnUNetResEncUNetXLPlans.json",
)
"""Files of nnU-Net's own plans. Those of the ResEnc presets name the data folder of the first."""
CURE = "Give the new plans another name (-overwrite_plans_name NAME), or remove that folder."


def shared_identifier(dataset_name: str, plans: Mapping[str, Any], configuration: str) -> str:
    """Return the data identifier of a configuration: nnU-Net's if the data are the same, else a separate one.

    Args:
        dataset_name: DatasetXXX_NAME.
        plans: the complete new plans.
        configuration: name of a configuration without `inherits_from`.

    Raises:
        ValueError: the folder of that name holds data of another spacing, normalisation or preprocessor.
    """
    preprocessed, identifier = Path(nnUNet_preprocessed) / dataset_name, f"{plans['plans_name']}_{configuration}"
    for path in filter(Path.is_file, (preprocessed / name for name in STOCK_PLANS)):
        theirs = read_plans(path, f"remove it, or run: nnUNetv2_plan_experiment -d {int(dataset_name[7:10])}")
        if not different_entries(theirs, plans, configuration):
            identifier = theirs["configurations"][configuration]["data_identifier"]
            break
    else:
        _refuse_other_preprocessing(preprocessed / identifier, plans, configuration)
    refuse_other_spacing(preprocessed / identifier, plans, configuration)
    return identifier


def different_entries(theirs: Mapping[str, Any], ours: Mapping[str, Any], configuration: str) -> list[str]:
    """Return the entries that determine preprocessed data and differ between two plans; empty if the data are the same."""
    one, other = (plans["configurations"].get(configuration) for plans in (theirs, ours))
    if one is None or other is None:
        return ["configurations"]
    different = [key for key in SAME_DATA if not same_entries(one.get(key), other.get(key))]
    return different + [key for key in SAME_FOR_ALL if not same_entries(theirs.get(key), ours.get(key))]


def _refuse_other_preprocessing(folder: Path, plans: Mapping[str, Any], configuration: str) -> None:
    """Raise ValueError if the data in the plans' own folder were made with different plans of the same name."""
    earlier = folder.parent / f"{plans['plans_name']}.json"
    if not earlier.is_file() or not finished_cases(folder):
        return
    theirs = read_plans(
        earlier, f"remove it, or plan under another name; what lies in {folder} was made with these plans"
    )
    changed = different_entries(theirs, plans, configuration) if configuration in theirs["configurations"] else []
    if set(changed) - {"spacing"}:  # `refuse_other_spacing` checks the spacing in the data themselves
        raise ValueError(f"{folder} holds data of another {', '.join(changed)} (according to {earlier.name}). {CURE}")


def finished_cases(folder: Path) -> list[str]:
    """Return the names of completely written cases in a folder of preprocessed data (nnU-Net writes the .pkl last)."""
    if not folder.is_dir():
        return []
    properties = {path.stem for path in folder.glob("*.pkl")}
    data = {path.stem for ending in ("b2nd", "npz") for path in folder.glob(f"*.{ending}")}
    return sorted(properties & data)


def refuse_other_spacing(folder: Path, plans: Mapping[str, Any], configuration: str) -> None:
    """Raise ValueError if the first case in `folder` was resampled to another spacing than the configuration's."""
    for case in finished_cases(folder)[:1]:
        with (folder / f"{case}.pkl").open("rb") as file:
            properties = pickle.load(file)  # written by nnU-Net's own preprocessing
        try:
            data = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)[0]
        except (AssertionError, KeyError) as error:
            raise ValueError(f"{folder} holds files that nnU-Net's preprocessing did not write: remove it.") from error
        order = list(plans["transpose_forward"])
        spacing = [float(s) for s in plans["configurations"][configuration]["spacing"]]
        before = [properties["spacing"][axis] for axis in order]
        if len(spacing) < len(before):  # 2d: slices are not resampled along the first axis
            spacing = [before[0], *spacing]
        wanted = compute_new_shape(properties["shape_after_cropping_and_before_resampling"], before, spacing)
        if not np.array_equal(wanted, data.shape[1:]):
            raise ValueError(
                f"{folder} holds data of another spacing: case {case} has the shape {tuple(data.shape[1:])}, spacing "
                f"{spacing} would give {tuple(int(edge) for edge in wanted)}. {CURE}"
            )


def is_complete(folder: Path, cases: list[str]) -> bool:
    """True if all cases are preprocessed in `folder` and their labels are where nnU-Net's validation expects them."""
    names = [path.name.split(".") for path in (folder.parent / "gt_segmentations").glob("*")]
    truths = {".".join(parts[:end]) for parts in names for end in range(1, len(parts))}  # a case's name may have dots
    return bool(cases) and set(cases) <= set(finished_cases(folder)) & truths


def same_entries(ours: Any, theirs: Any) -> bool:
    """True if two entries of plans are equal, with numbers rounded to six decimals and keys as text (as in JSON)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, (np.ndarray, list, tuple)):
            return [plain(entry) for entry in value]
        return round(float(value), 6) if isinstance(value, (float, np.floating)) else value

    return plain(ours) == plain(theirs)
