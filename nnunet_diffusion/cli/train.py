"""`nnunet_diffusion train`: `nnUNetv2_train` with our trainers found and the usual mistakes named first."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.folders import (
    PREPROCESSED,
    RAW,
    RESULTS,
    dataset_prefix,
    datasets_in,
    folder_in,
)
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.environment import PRESEGMENTOR_FOLDER

DEFAULT_TRAINER = "DiffusionTrainer"
HELP = "nnUNetv2_train with DiffusionTrainer as default trainer (takes all of its arguments)"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `train` to the list of subcommands; its arguments go to nnU-Net unread (see main)."""
    subparsers.add_parser("train", help=HELP, add_help=False)


def run(words: Sequence[str]) -> int:
    """Check the input, then run nnU-Net's own training entry point with `words`.

    Args:
        words: Arguments of nnUNetv2_train, unchanged; without `-tr` the trainer is DiffusionTrainer.

    Raises:
        CommandError: Environment, dataset, plans or device are not ready for training.
    """
    words = list(words)
    if not {"-h", "--help"} & set(words):
        options = read_options(words)
        if options.tr is None:
            words += ["-tr", DEFAULT_TRAINER]
        check_input(options, os.environ)
        check_device(options.device)
        if options.pretrained_weights is not None and DEFAULT_TRAINER in (options.tr or DEFAULT_TRAINER):
            check_pretrained_weights(options.pretrained_weights)
    os.environ.update(with_trainers(os.environ))
    # nnU-Net reads its paths and nnUNet_extTrainer from the environment: import it only now.
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = ["nnunet_diffusion train", *words]
    run_training_entry()
    return 0


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """What the checks need of nnUNetv2_train's arguments; flags that are not listed are left to nnU-Net."""
    parser = argparse.ArgumentParser(prog="nnunet_diffusion train", add_help=False)
    parser.add_argument("dataset_name_or_id")
    parser.add_argument("configuration")
    parser.add_argument("fold")
    for name, default in {"tr": None, "p": "nnUNetPlans", "pretrained_weights": None, "num_gpus": "1"}.items():
        parser.add_argument(f"-{name}", default=default)
    parser.add_argument("-device", default="cuda")
    return parser.parse_known_args(words)[0]


def check_input(options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Raise CommandError unless nnU-Net has all it needs to begin training.

    Args:
        options: As given by `read_options`.
        environment: Variables of the process.
    """
    folders = check_folders(environment)
    dataset = find_dataset(options.dataset_name_or_id, folders, options.configuration)
    number, preprocessed = dataset[7:10], folders["nnUNet_preprocessed"] / dataset
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if not (preprocessed / name).is_file():
            raise CommandError(
                f"{preprocessed} has no {name}; run: nnUNetv2_extract_fingerprint -d {int(number)} "
                f"&& nnUNetv2_plan_experiment -d {int(number)}"
            )
    plans = read_plans(preprocessed, options.p, dataset)
    check_configuration(plans, options.configuration, preprocessed, options.p)
    if options.fold != "all" and not options.fold.isdecimal():
        raise CommandError(f"fold is '{options.fold}', but must be 0, 1, 2, ... or 'all'")


def check_folders(environment: Mapping[str, str]) -> dict[str, Path]:
    """Folders of nnU-Net that are set, after checking that the two which training needs are usable."""
    preprocessed = folder_in(environment, "nnUNet_preprocessed")
    folder_in(environment, RESULTS)
    if not Path(preprocessed).is_dir():
        raise CommandError(
            f"nnUNet_preprocessed is {preprocessed}, which is no folder; correct it, or create and fill it with: "
            f"nnUNetv2_plan_and_preprocess -d ID --verify_dataset_integrity"
        )
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return {name: Path(environment[name]) for name in names if environment.get(name)}


def find_dataset(name_or_id: str, folders: Mapping[str, Path], configuration: str) -> str:
    """Name of the preprocessed dataset that `name_or_id` means, such as Dataset004_Hippocampus."""
    prefix = dataset_prefix(name_or_id)
    preprocessed, raw = (datasets_in(folders.get(key), prefix) for key in (PREPROCESSED, RAW))
    if len(set(preprocessed + raw)) > 1:
        raise CommandError(
            f"dataset {name_or_id} is ambiguous: {', '.join(sorted({*preprocessed, *raw}))}; "
            f"give each dataset a number of its own"
        )
    if preprocessed:
        return preprocessed[0]
    if raw:
        raise CommandError(
            f"{raw[0]} is not preprocessed yet; run: nnUNetv2_plan_and_preprocess -d {int(raw[0][7:10])} "
            f"-c {configuration} --verify_dataset_integrity"
        )
    places = " and ".join(str(folders[key]) for key in ("nnUNet_raw", "nnUNet_preprocessed") if key in folders)
    raise CommandError(
        f"dataset {name_or_id} is not in {places}; put it into nnUNet_raw in nnU-Net's format and run: "
        f"nnUNetv2_plan_and_preprocess -d ID -c {configuration} --verify_dataset_integrity"
    )


def read_plans(preprocessed: Path, plans_name: str, dataset: str) -> dict[str, Any]:
    """Plans `plans_name` of a dataset, refused if missing, unreadable or made for another dataset."""
    path = preprocessed / f"{plans_name}.json"
    number = int(dataset[7:10])
    if not path.is_file():
        others = [other.stem for other in sorted(preprocessed.glob("*Plans*.json"))]
        choices = f"there are: {', '.join(others)} (choose with -p); or " if others else ""
        cure = f"nnUNetv2_plan_experiment -d {number}" + ("" if plans_name == "nnUNetPlans" else " -pl PLANNER")
        raise CommandError(f"{preprocessed} has no plans {plans_name}; {choices}run: {cure}")
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        cure = f"nnUNetv2_plan_experiment -d {number}"
        raise CommandError(f"{path} is no valid JSON ({error}); correct it or run: {cure}") from error
    if plans.get("dataset_name") != dataset:
        raise CommandError(
            f"{path} was made for {plans.get('dataset_name')}, not for {dataset}; "
            f"run: nnUNetv2_plan_experiment -d {number} (or nnUNetv2_move_plans_between_datasets)"
        )
    return plans


def check_configuration(plans: Mapping[str, Any], configuration: str, preprocessed: Path, plans_name: str) -> None:
    """Raise CommandError unless `configuration` is in the plans and its data are preprocessed."""
    configurations = plans.get("configurations", {})
    if configuration not in configurations:
        raise CommandError(
            f"plans {plans_name} have no configuration '{configuration}'; choose one of: {', '.join(configurations)}"
        )
    section = configurations[configuration]
    while "data_identifier" not in section and section.get("inherits_from") in configurations:
        section = configurations[section["inherits_from"]]
    identifier = section.get("data_identifier", f"{plans_name}_{configuration}")
    folder = preprocessed / identifier
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CommandError(
            f"{folder} holds no preprocessed cases; run: nnUNetv2_preprocess -d {int(preprocessed.name[7:10])} "
            f"-plans_name {plans_name} -c {configuration}"
        )


def check_device(device: str) -> None:
    """Raise CommandError if `device` is a GPU that this machine or this torch does not offer."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("-device is cuda (the default), but torch finds no CUDA GPU; add: -device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise CommandError("-device is mps, but torch finds none; add: -device cpu")


def check_pretrained_weights(path: str) -> None:
    """Raise CommandError unless `path` is a checkpoint of a diffusion trainer, whose weights alone fit the network."""
    from nnunet_diffusion.training.checkpoints import DIFFUSION_KEY, read_checkpoint

    try:
        checkpoint = read_checkpoint(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"-pretrained_weights: {error}") from error
    if DIFFUSION_KEY not in checkpoint:
        raise CommandError(
            f"-pretrained_weights is {path}, a checkpoint of {checkpoint.get('trainer_name')}, not of a diffusion trainer; "
            f"to start from a trained nnU-Net leave it out and export {PRESEGMENTOR_FOLDER}=MODEL_FOLDER"
        )
