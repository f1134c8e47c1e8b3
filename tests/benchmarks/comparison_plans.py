"""Folders, plans and splits of the comparison: nnU-Net's own planning, then smaller copies of its plans."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
STOCK_PLANS = "nnUNetPlans"
TRAINERS_VARIABLE = "nnUNet_extTrainer"
BENCHMARK_TRAINERS = Path(__file__).parent / "trainers"  # nnU-Nets that take part in comparisons alone
SMALLEST_FEATURE_MAP = 4
"""Edge in voxels below which nnU-Net's planner pools no further."""


@dataclass(frozen=True)
class Folders:
    """Where the comparison of one dataset keeps what it makes."""

    work: Path
    dataset: str

    @property
    def raw(self) -> Path:
        """Raw data (a link to the dataset given)."""
        return self.work / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """Plans, splits and preprocessed cases."""
        return self.work / "nnUNet_preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        """Trained models."""
        return self.work / "nnUNet_results" / self.dataset

    @property
    def control_trainers(self) -> Path:
        """Trainers written for control lengths that nnU-Net does not have."""
        return self.work / "trainers"

    def model(self, trainer: str, plans_name: str, configuration: str) -> Path:
        """Folder of one model."""
        return self.results / f"{trainer}__{plans_name}__{configuration}"


def set_up_folders(dataset: Path, work: Path) -> Folders:
    """Make nnU-Net's three folders, point its environment there and link the raw data; call before importing nnunetv2.

    Raises:
        FileNotFoundError: `dataset` is no raw dataset of nnU-Net's.
    """
    if not (dataset / "dataset.json").is_file() or not dataset.name.startswith("Dataset"):
        raise FileNotFoundError(
            f"--dataset {dataset} is not a raw dataset (DatasetXXX_NAME with dataset.json and imagesTr)"
        )
    folders = enter_workdir(work, dataset.name)
    if not folders.raw.exists():
        folders.raw.symlink_to(dataset.resolve())
    return folders


def enter_workdir(work: Path, dataset: str) -> Folders:
    """Make nnU-Net's three folders in `work` and point its environment there; call before importing nnunetv2."""
    folders = Folders(work.resolve(), dataset)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folders.work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folders.work / name)
    folders.control_trainers.mkdir(exist_ok=True)
    ours = [str(REPOSITORY / "trainers"), str(BENCHMARK_TRAINERS), str(folders.control_trainers)]
    os.environ.pop("nnUNet_diffusion_presegmentor", None)  # the user's, for trainings of their own
    given = os.environ.get(TRAINERS_VARIABLE, "").split(os.pathsep)
    os.environ[TRAINERS_VARIABLE] = os.pathsep.join(dict.fromkeys([*ours, *filter(None, given)]))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return folders


def plan_and_preprocess(
    folders: Folders, configuration: str, processes: int, spacing: Sequence[float] | None = None
) -> str:
    """Run stock nnUNetv2_plan_and_preprocess unless it is done, then take the dataset's own split along.

    Args:
        folders: of the dataset.
        configuration: to preprocess.
        processes: for fingerprint and preprocessing.
        spacing: target spacing of the configuration's axes instead of nnU-Net's choice (`-overwrite_target_spacing`).

    Returns:
        Name of the plans.
    """
    name = STOCK_PLANS
    number = folders.dataset[7:10]
    words = ["-d", str(int(number)), "-c", configuration, "-npfp", str(processes), "-np", str(processes)]
    if spacing:
        name += "_spacing_" + "_".join(f"{size:g}" for size in spacing)
        # nnU-Net wants three numbers; a 2D image's third axis has a spacing of 999
        target = [*[999.0] * (3 - len(spacing)), *spacing]
        words += ["-overwrite_target_spacing", *map(str, target), "-overwrite_plans_name", name]
    done = folders.preprocessed / f".{name}_{configuration}_is_preprocessed"
    if not done.is_file():
        command = [sys.executable, "-m", "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"]
        # nnU-Net's planner takes the number of augmentation workers for its threads and fails on 0
        subprocess.run([*command, *words], check=True, env={**os.environ, "nnUNet_n_proc_DA": str(processes)})
        done.touch()
    take_split(folders)
    return name


def take_split(folders: Folders) -> None:
    """Use the dataset's own split, if it has one and no other is there."""
    split = folders.raw / "splits_final.json"
    if split.is_file() and not (folders.preprocessed / split.name).is_file():
        shutil.copyfile(split, folders.preprocessed / split.name)


def write_plans(folders: Folders, plans: Mapping[str, Any]) -> None:
    """Write plans under their name.

    Raises:
        ValueError: other plans of that name are there already: their models would be mistaken for these.
    """
    path = folders.preprocessed / f"{plans['plans_name']}.json"
    text = json.dumps(plans, indent=2)
    if path.is_file():
        if json.loads(path.read_text()) != json.loads(text):
            raise ValueError(f"{path} holds other plans: choose another --plans-name or variant name, or remove it")
        return
    # other comparisons of the dataset may be reading it
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def read_plans(folders: Folders, name: str) -> dict[str, Any]:
    """Read plans of the preprocessed dataset."""
    return json.loads((folders.preprocessed / f"{name}.json").read_text())


def planned_before(folders: Folders, name: str, configuration: str) -> dict[str, Any]:
    """Read plans that another command made and preprocessed; the dataset's own split is taken along.

    Raises:
        FileNotFoundError: the plans, or their preprocessed data, are missing.
    """
    path = folders.preprocessed / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: plan first, or give --patch, --batch or --features")
    plans = read_plans(folders, name)
    data = folders.preprocessed / plans["configurations"][configuration]["data_identifier"]
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data} is missing: nnUNetv2_preprocess -d {int(folders.dataset[7:10])} -plans_name {name} -c {configuration}"
        )
    take_split(folders)
    return plans


def smaller_plans(
    stock: Mapping[str, Any],
    name: str,
    configuration: str,
    patch: Sequence[int] | None,
    batch: int | None,
    features: Sequence[int] | None,
) -> dict[str, Any]:
    """Return a copy of `stock` with another patch size, batch size or widths; the preprocessed data stay the same.

    Strides and kernels follow nnU-Net's planner for the new patch, cut to as many stages as `features` has.

    Raises:
        ValueError: the patch has the wrong number of axes, is not divisible by the strides, or is too small for as
            many stages.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    plans = copy.deepcopy(dict(stock))
    plans["plans_name"] = name
    section = plans["configurations"][configuration]
    arguments = section["architecture"]["arch_kwargs"]
    if patch is not None and len(patch) != len(section["patch_size"]):
        raise ValueError(f"--patch {patch} must have {len(section['patch_size'])} axes, as {configuration}")
    patch = list(section["patch_size"] if patch is None else patch)
    _, strides, kernels, _, _ = get_pool_and_conv_props(section["spacing"], patch, SMALLEST_FEATURE_MAP, 999)
    features = list(features or arguments["features_per_stage"][: len(strides)])
    stages = len(features)
    if stages > len(strides):
        raise ValueError(f"--features has {stages} stages, a patch of {patch} allows {len(strides)}: give fewer")
    strides, kernels = strides[:stages], kernels[:stages]
    total = np.prod(strides, axis=0)
    if any(np.mod(patch, total)):
        raise ValueError(f"--patch {patch} must be divisible by the product of the strides, {total.tolist()}")
    old_stages = arguments["n_stages"]
    for key, value in arguments.items():
        if isinstance(value, (list, tuple)) and key.startswith("n_") and len(value) in (old_stages, old_stages - 1):
            length = stages - (old_stages - len(value))
            arguments[key] = [*value, *[value[-1]] * length][:length]
    arguments |= {
        "n_stages": stages,
        "features_per_stage": features,
        "strides": [list(stride) for stride in strides],
        "kernel_sizes": [list(kernel) for kernel in kernels],
    }
    section |= {"patch_size": patch, "batch_size": batch or section["batch_size"]}
    return plans


def diffusion_plans(
    base: Mapping[str, Any], configuration: str, variant: str, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a copy of `base` named BASE_variant whose `diffusion` section is `section`."""
    plans = copy.deepcopy(dict(base))
    plans["plans_name"] = f"{base['plans_name']}_{variant}"
    plans["configurations"][configuration]["diffusion"] = dict(section)
    return plans
