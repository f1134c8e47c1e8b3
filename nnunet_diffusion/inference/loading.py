"""Reading a model folder without running code from it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.files import read_dictionary, read_plans
from nnunet_diffusion.networks.architectures import trusting
from nnunet_diffusion.training.checkpoints import DIFFUSION_KEY, read_checkpoint, refuse_unknown_networks
from nnunet_diffusion.training.presegmentor import trainer_class

CURE = "bring it back from where the model was trained, nnU-Net writes it when a training begins."


@dataclass(frozen=True)
class TrainedModel:
    """Content of a model folder.

    Attributes:
        plans: content of plans.json.
        dataset_json: content of dataset.json.
        configuration: name of the configuration, for example "2d".
        trainer_name: name of the trainer class.
        mirroring_axes: axes that nnU-Net may mirror in inference; None for no mirroring.
        weights: state dict of each fold.
        folds: names of the folds.
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
        folds: numbers or "all"; None for all finished folds.
        checkpoint_name: file name in each fold's folder.
        trust: also read checkpoints that hold more than tensors and plain values, and allow any class in the plans.

    Raises:
        FileNotFoundError: the folder, a file or a fold is missing. The message lists the existing folds.
        ValueError: a file is damaged or unsafe, or the model is not from a diffusion trainer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The model folder {folder} does not exist: train first, or correct -d, -c, -tr, -p or -m."
        )
    plans = read_plans(folder / "plans.json", CURE)
    dataset_json = read_dictionary(folder / "dataset.json", CURE, {"labels": dict, "file_ending": str})
    with trusting(trust):
        refuse_unknown_networks(plans, str(folder / "plans.json"))
    found = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint_name}"))
    wanted = [each for each in found if each != "all"] if folds is None else [str(fold) for fold in folds]
    missing = [fold for fold in wanted if fold not in found]
    if missing or not wanted:
        raise FileNotFoundError(
            f"{folder} has no {checkpoint_name} of fold {', '.join(missing) or '0'}. Folds that have one: "
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


def build_network(model: TrainedModel, folder: str, trust: bool) -> Any:
    """Build a model's network with the weights of its first fold, as its trainer builds it.

    Args:
        model: content of the folder.
        folder: its path, for messages.
        trust: allow any class in the plans.
    """
    plans = PlansManager(model.plans)
    configuration = plans.get_configuration(model.configuration)
    # nnU-Net prints the folders in which it searches for trainers
    with contextlib.redirect_stdout(io.StringIO()), trusting(trust):
        network = trainer_class(model.trainer_name, folder).build_network_architecture(
            plans,
            configuration,
            determine_num_input_channels(plans, configuration, model.dataset_json),
            plans.get_label_manager(model.dataset_json).num_segmentation_heads,
            enable_deep_supervision=False,
        )
    network.load_state_dict(model.weights[0])
    return network


class NoDiffusionModel(ValueError):
    """A checkpoint of a trainer that is not a diffusion trainer."""


def _read(path: Path, trust: bool) -> dict[str, Any]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=False) if trust else read_checkpoint(path)
    if DIFFUSION_KEY not in checkpoint:
        raise NoDiffusionModel(
            f"{path} is a checkpoint of {checkpoint.get('trainer_name')}, not of a diffusion trainer: predict with "
            "nnUNetv2_predict, or give -tr DiffusionTrainer."
        )
    missing = [key for key in ("init_args", "trainer_name", "network_weights") if key not in checkpoint]
    if missing or "configuration" not in checkpoint["init_args"]:
        raise ValueError(f"{path} is not a checkpoint of nnU-Net: it has no {(missing or ['configuration'])[0]!r}.")
    return checkpoint
