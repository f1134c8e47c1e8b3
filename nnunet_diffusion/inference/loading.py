"""Reading a model folder without running code from it."""

from __future__ import annotations

import pydoc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_diffusion.json_files import read_dictionary, read_plans
from nnunet_diffusion.settings import PLANS_KEY
from nnunet_diffusion.training.checkpoints import DIFFUSION_KEY, read_checkpoint

ALLOWED_PACKAGES = ("torch.nn", "dynamic_network_architectures", "nnunetv2", "nnunet_diffusion")
CURE = "bring it back from where the model was trained, nnU-Net writes it when a training begins."
TRUST = "give --trust_checkpoint (trust_checkpoint=True) if you know where it comes from"


@dataclass(frozen=True)
class TrainedModel:
    """What a model folder holds.

    Attributes:
        plans: its plans.json.
        dataset_json: its dataset.json.
        configuration: for example "2d".
        trainer_name: of the training.
        mirroring_axes: that nnU-Net may mirror in inference; None for none.
        weights: state dict of each fold.
        folds: their names.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    trainer_name: str
    mirroring_axes: Sequence[int] | None
    weights: list[dict[str, torch.Tensor]]
    folds: list[str]


def read_model(folder: Path, folds: Sequence[int | str] | None, checkpoint_name: str, trust: bool) -> TrainedModel:
    """Read plans, dataset.json and the checkpoints of some folds.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION.
        folds: numbers or "all"; None for all folds that are finished.
        checkpoint_name: file in each fold's folder.
        trust: read checkpoints that hold more than tensors and plain values, and classes of any package in the plans.

    Raises:
        FileNotFoundError: folder, file or fold is missing; names what there is.
        ValueError: a file is damaged or unsafe, or the model is none of a diffusion trainer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}: train first, or correct -d, -c, -tr, -p or -m.")
    plans = read_plans(folder / "plans.json", CURE)
    dataset_json = read_dictionary(folder / "dataset.json", CURE, {"labels": dict, "file_ending": str})
    refuse_foreign_classes(plans, folder / "plans.json", trust)
    found = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint_name}"))
    wanted = [each for each in found if each != "all"] if folds is None else [str(fold) for fold in folds]
    missing = [fold for fold in wanted if fold not in found]
    if missing or not wanted:
        raise FileNotFoundError(
            f"{folder} has no {checkpoint_name} of fold {', '.join(missing) or '0'}; of these folds there is one: "
            f"{', '.join(found) or 'none'}. Train the missing folds, or choose others with -f."
        )
    paths = [folder / f"fold_{fold}" / checkpoint_name for fold in wanted]
    checkpoints = [_read(path, trust) for path in paths]
    first = checkpoints[0]
    return TrainedModel(
        plans,
        dataset_json,
        first["init_args"]["configuration"],
        first["trainer_name"],
        first.get("inference_allowed_mirroring_axes"),
        [checkpoint["network_weights"] for checkpoint in checkpoints],
        wanted,
    )


class NoDiffusionModel(ValueError):
    """A checkpoint of a trainer that is no diffusion trainer."""


def _read(path: Path, trust: bool) -> dict[str, Any]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=False) if trust else read_checkpoint(path)
    if DIFFUSION_KEY not in checkpoint:
        raise NoDiffusionModel(
            f"{path} is a checkpoint of {checkpoint.get('trainer_name')}, not of a diffusion trainer: predict with "
            "nnUNetv2_predict, or give -tr DiffusionTrainer."
        )
    missing = [key for key in ("init_args", "trainer_name", "network_weights") if key not in checkpoint]
    if missing or "configuration" not in checkpoint["init_args"]:
        raise ValueError(f"{path} is no checkpoint of nnU-Net's: it has no {(missing or ['configuration'])[0]!r}.")
    return checkpoint


def refuse_foreign_classes(plans: Mapping[str, Any], path: Path, trust: bool) -> None:
    """Raise ValueError if the plans name a class that is no module of the packages networks are built from.

    nnU-Net imports what `network_class_name` and `_kw_requires_import` name and calls it with arguments of the plans: plans
    are code unless these names are checked.

    Args:
        plans: as read.
        path: of their file.
        trust: accept any.
    """
    if trust:
        return
    for architecture in _architectures(plans):
        keywords = architecture.get("arch_kwargs", {})
        named = [keywords.get(key) for key in architecture.get("_kw_requires_import", [])]
        for name in [architecture.get("network_class_name"), *named]:
            if name is not None and not _is_network_class(name):
                raise ValueError(
                    f"{path} names {name!r}, which is no network class of {', '.join(ALLOWED_PACKAGES)}: it is not loaded; "
                    f"{TRUST}."
                )


def _architectures(plans: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for configuration in plans.get("configurations", {}).values():
        yield configuration.get("architecture", {})
        yield configuration.get(PLANS_KEY, {}).get("presegmentor_architecture", {})


def _is_network_class(name: Any) -> bool:
    """Whether `name` is the path of a network class; nothing outside the allowed packages is imported to find out."""
    if not isinstance(name, str) or not any(name.startswith(f"{package}.") for package in ALLOWED_PACKAGES):
        return False
    found = pydoc.locate(name)
    if found is None:  # it may have moved: nnU-Net then looks for its last name among these architectures
        return name.startswith("dynamic_network_architectures.")
    return (
        isinstance(found, type)
        and issubclass(found, nn.Module)
        and any(found.__module__.startswith(package) for package in ALLOWED_PACKAGES)
    )
