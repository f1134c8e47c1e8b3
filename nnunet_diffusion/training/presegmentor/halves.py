"""Two nnU-Nets, each trained on one half of a fold's training cases, that segment the other half (layer 3).

A network segments the cases it was trained on too well, so its output there does not show the mistakes it makes on new ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER
from nnunet_diffusion.model.out_of_fold import OutOfFold
from nnunet_diffusion.training.checkpoints import write_aside
from nnunet_diffusion.training.presegmentor.fit import build_presegmentor, load_presegmentor_weights
from nnunet_diffusion.training.presegmentor.lock import agreed
from nnunet_diffusion.training.presegmentor.train import ensure_presegmentor

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer

CASES = "cases.json"


def halves_of(cases: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the first and the last half of the sorted cases: images of one patient, named alike, mostly stay together.

    Raises:
        ValueError: fewer than two cases.
    """
    if len(cases) < 2:
        raise ValueError(
            "diffusion.training.starts has a share of out_of_fold, which needs two training cases, but this fold has "
            f"{len(cases)}: leave that share out."
        )
    known = sorted(cases)
    middle = len(known) // 2
    return known[:middle], known[middle:]


def half_trainer(trainer: type[nnUNetTrainer], half: int) -> type[nnUNetTrainer]:
    """Return a trainer for one half of each fold's training cases and half of the epochs, validated on the other half.

    Args:
        trainer: trainer of nnU-Net for all training cases.
        half: 0 or 1.
    """
    base: Any = trainer

    class Half(base):
        def __init__(
            self,
            plans: dict,
            configuration: str,
            fold: int,
            dataset_json: dict,
            device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
        ) -> None:
            super().__init__(
                plans=plans, configuration=configuration, fold=fold, dataset_json=dataset_json, device=device
            )
            self.num_epochs: int = max(1, self.num_epochs // 2)

        def do_split(self) -> tuple[list[str], list[str]]:
            halves = halves_of(super().do_split()[0])
            return halves[half], halves[1 - half]

    Half.__name__ = half_name(trainer.__name__, half)  # nnU-Net names the folder by it
    return Half


def half_name(trainer: str, half: int) -> str:
    """Return the name of a half's trainer, which is that of its folder too."""
    return f"{trainer}_half{half}"


def out_of_fold(trainer: DiffusionTrainer) -> OutOfFold:
    """Return the two networks of a training's fold, which are trained first if they do not exist.

    Args:
        trainer: initialised trainer of the denoiser.

    Raises:
        NotImplementedError: the pre-segmentor is one that the user named, of other plans.
        ValueError: the networks do not fit, or were trained on other cases.
    """
    if trainer.given_presegmentor is not None:
        raise NotImplementedError(
            "diffusion.training.starts out_of_fold trains nnU-Net on halves of the training cases by these plans, but "
            f"{PRESEGMENTOR_FOLDER} names a network of other plans: unset it, or leave that share out."
        )
    manager, configuration, fold = trainer.plans_manager, trainer.configuration_name, trainer.fold
    name, halves = trainer.settings.presegmentor_trainer, halves_of(trainer.do_split()[0])
    networks, network_of = [], {}
    for half, cases in enumerate(halves):
        place: Any = (manager.dataset_name, half_name(name, half), manager.plans_name, configuration, fold)
        folder = Path(get_output_folder(*place))
        _keep_cases(folder, cases, trainer.local_rank == 0)
        path = ensure_presegmentor(
            name, manager.dataset_name, configuration, fold, manager.plans_name, trainer.device,
            trainer.print_to_log_file, partial(half_trainer, half=half),
        )  # fmt: skip
        weights = load_presegmentor_weights(path, manager.plans, configuration, fold, trainer.dataset_json, [])
        channels = trainer.num_input_channels, trainer.segmenter.denoiser.state_channels
        network = build_presegmentor(name, manager, trainer.configuration_manager, *channels)
        network.load_state_dict(weights)
        networks.append(network.to(trainer.device))
        network_of.update(dict.fromkeys(halves[1 - half], half))
    return OutOfFold(networks, network_of, trainer.settings.regions)


def _keep_cases(folder: Path, cases: list[str], first_rank: bool) -> None:
    """Write the cases of a half into its folder before its training begins.

    Raises:
        ValueError: the half was trained on other cases, or nobody knows on which.
    """
    record, content = folder / CASES, json.dumps({"training": cases}, indent=2)
    if agreed(not record.is_file() and not any(folder.glob("checkpoint_*.pth"))):
        if first_rank:
            folder.mkdir(parents=True, exist_ok=True)
            write_aside(lambda aside: Path(aside).write_text(content, encoding="utf-8"), record)
    elif agreed(not record.is_file() or record.read_text(encoding="utf-8") != content):
        raise ValueError(
            f"{folder} is an nnU-Net trained on other cases than this fold's ({CASES} there): the split has changed since. "
            "Restore splits_final.json, or move that folder away and start again."
        )
