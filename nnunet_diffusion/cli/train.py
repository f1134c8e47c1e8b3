"""`nnunet_diffusion train`: `nnUNetv2_train` that finds our trainers and first checks for common mistakes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.devices import check_device
from nnunet_diffusion.cli.errors import CommandError, first_line, named_for_the_user
from nnunet_diffusion.cli.folders import (
    PREPROCESSED,
    RAW,
    RESULTS,
    dataset_prefix,
    datasets_in,
    folder_in,
)
from nnunet_diffusion.cli.trainers_directory import trainers_directory, with_trainers
from nnunet_diffusion.files import (
    DEFAULT_PLANNER,
    FOR_HIDIFF,
    HIDIFF_TRAINER,
    PLAN_OPTIONS,
    PLANS_OF,
    PRESEGMENTOR_FOLDER,
    hidiff_plans,
    preprocess_command,
    read_dictionary,
    read_plans,
    says_not_found,
)

DEFAULT_TRAINER = "DiffusionTrainer"
UNET_TRAINER = "DiffusionTrainerUNet"
CHECKED = "checked_images.json"
DEFAULT_PLANS = "nnUNetPlans"  # nnUNetv2_train's default
STOCK_PLANS_NAME = re.compile("nnUNet(?:ResEncUNet(M|L|XL))?Plans")
HELP = "nnUNetv2_train with DiffusionTrainer as the default trainer (accepts all its arguments)"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `train` to the list of subcommands. Its arguments are passed to nnU-Net unchanged (see `main`)."""
    subparsers.add_parser("train", help=HELP, add_help=False)


def run(words: Sequence[str]) -> int:
    """Check the input, then run nnU-Net's own training entry point with `words`.

    Args:
        words: arguments of nnUNetv2_train; without `-tr` the trainer is DiffusionTrainer.

    Returns:
        0, if training succeeds.

    Raises:
        CommandError: environment, dataset, plans, device, trainer or weights are not ready for training.
    """
    words = list(words)
    if {"-h", "--help"} & set(words):
        print(f"Help of nnUNetv2_train, except that the default of -tr is {DEFAULT_TRAINER}:\n", flush=True)
    else:
        options = read_options(words)
        if options.tr is None:
            words += ["-tr", DEFAULT_TRAINER]
        check_input(options, os.environ)
        check_device(options.device)
    os.environ.update(with_trainers(os.environ))
    if {"-h", "--help"}.isdisjoint(words):
        check_raw_images(options, os.environ)
        trainer = check_trainer(options.tr or DEFAULT_TRAINER)
        if options.pretrained_weights is not None:
            check_pretrained_weights(options.pretrained_weights, hasattr(trainer, "presegmentor_trainer"))
        if continues_nnunet(options, words, trainer):
            from nnunet_diffusion.training.continued import train_or_continue

            train_or_continue(
                options.tr, find_dataset(options, check_folders(options, os.environ)), options.configuration, options.fold,
                options.p or DEFAULT_PLANS, options.device,
            )  # fmt: skip
            return 0
    # nnU-Net reads its paths and nnUNet_extTrainer from the environment when it is imported, so import it only now
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = ["nnunet_diffusion train", *words]
    run_training_entry()
    return 0


def continues_nnunet(options: argparse.Namespace, words: Sequence[str], trainer: Any) -> bool:
    """Whether one of nnU-Net's own trainers is to go on by --c on one device, with no option of nnU-Net's further ones."""
    others = {word for word in words if word.startswith("--")} - {"--c", "--npz"}
    plain = "--c" in words and not others and options.pretrained_weights is None and options.num_gpus == "1"
    return plain and not hasattr(trainer, "presegmentor_trainer")


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """Return those of nnUNetv2_train's arguments that the checks need; all others are left to nnU-Net."""
    parser = argparse.ArgumentParser(
        prog="nnunet_diffusion train",
        usage="nnunet_diffusion train DATASET CONFIGURATION FOLD [-tr TRAINER] [-p PLANS] ... (see --help)",
        add_help=False,
    )
    parser.add_argument("dataset_name_or_id")
    parser.add_argument("configuration")
    parser.add_argument("fold")
    for name, default in {"tr": None, "p": None, "pretrained_weights": None, "num_gpus": "1"}.items():
        parser.add_argument(f"-{name}", default=default)
    parser.add_argument("-device", default="cuda")
    return parser.parse_known_args(words)[0]


def check_input(options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Raise CommandError if folders, dataset, plans, configuration or fold are not ready for training.

    Args:
        options: command-line options from `read_options`.
        environment: variables of the process.
    """
    folders = check_folders(options, environment)
    dataset = find_dataset(options, folders)
    preprocessed = folders["nnUNet_preprocessed"] / dataset
    for name in ("dataset.json", "dataset_fingerprint.json"):
        if not (preprocessed / name).is_file():
            raise CommandError(f"{preprocessed} has no {name}; run: {planning_commands(options, from_raw=True)}")
    with named_for_the_user(ValueError):
        read_dictionary(preprocessed / "dataset.json", f"run: {planning_commands(options)}")
    plans = plans_of(preprocessed, options, dataset)
    check_configuration(plans, options.configuration, preprocessed, options.p or DEFAULT_PLANS)
    if options.fold != "all" and not options.fold.isdecimal():
        raise CommandError(f"fold is '{options.fold}', but must be 0, 1, 2, ... or 'all'")


def check_raw_images(options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Raise CommandError if a raw NIfTI image is damaged or has NaN voxels, which preprocessing has read as 0.

    Names, sizes and modification times of valid images are saved beside the preprocessed data, so that each image is
    checked once. Without raw data nothing is checked.
    """
    folders = check_folders(options, environment)
    if RAW not in folders:
        return
    dataset = find_dataset(options, folders)
    memory = folders[PREPROCESSED] / dataset / CHECKED
    with named_for_the_user(ValueError):
        known = read_dictionary(memory, "remove it") if memory.is_file() else {}
    images = sorted((folders[RAW] / dataset / "imagesTr").glob("*.nii*"))
    found = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in images}
    new = [path for path in found if known.get(path.name) != found[path]]
    if not new:
        return
    from nnunet_diffusion.training.checkpoints import write_aside

    problems = nan_problems(new)
    good = {path.name: seen for path, seen in found.items() if path not in problems}
    with contextlib.suppress(OSError):  # if the folder is read-only, the images are checked in each run
        write_aside(lambda aside: Path(aside).write_text(json.dumps(good)), memory)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        again = preprocess_command(dataset, options.p or DEFAULT_PLANS, options.configuration)
        raise CommandError(f"{next(iter(problems.values()))}{more}, then preprocess again: {again}")


def nan_problems(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the NIfTI files that are damaged or have NaN or infinite voxels, with each error; show a progress bar.

    Only files with floating-point voxels are read completely, because others cannot have NaN.
    """
    from tqdm import tqdm

    from nnunet_diffusion.inference.reading import check_nifti

    def problem(path: Path) -> str:
        try:
            check_nifti(path, whole=False)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # gzip releases Python's global lock while it unpacks
        found = list(tqdm(pool.map(problem, paths), "Checking raw images for NaN", len(paths), disable=None))
    return {path: text for path, text in zip(paths, found, strict=True) if text}


def check_folders(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Path]:
    """Return nnU-Net's folders that are set, after checking the two that training needs."""
    preprocessed = folder_in(environment, "nnUNet_preprocessed")
    folder_in(environment, RESULTS)
    if not Path(preprocessed).is_dir():
        raise CommandError(
            f"nnUNet_preprocessed is {preprocessed}, which is not a folder; correct the variable, or create and fill the "
            f"folder with: {planning_commands(options, from_raw=True)}"
        )
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return {name: Path(environment[name]) for name in names if environment.get(name)}


def planning_commands(options: argparse.Namespace, *, from_raw: bool = False) -> str:
    """Return the commands that plan and preprocess for the given options.

    The planner is one of ours unless `-p` names the plans of one of nnU-Net's planners.

    Args:
        options: command-line options from `read_options`.
        from_raw: whether the dataset's fingerprint must be extracted first.
    """
    number = int(dataset_prefix(options.dataset_name_or_id)[7:10])
    stock_suffices = options.tr is not None and options.tr.startswith(UNET_TRAINER) and options.device != "cpu"
    hidiff = options.tr is not None and options.tr.startswith(HIDIFF_TRAINER)
    ours = PLANS_OF[DEFAULT_PLANNER]
    name = options.p or (DEFAULT_PLANS if stock_suffices else hidiff_plans(ours) if hidiff else ours)
    if stock := STOCK_PLANS_NAME.fullmatch(name):
        chosen = f" -pl nnUNetPlannerResEnc{stock[1]}" if stock[1] else ""
        return f"nnUNetv2_plan_and_preprocess -d {number}{chosen} -c {options.configuration} --verify_dataset_integrity"
    command = f"nnunet_diffusion plan -d {number} --preprocess -c {options.configuration}"
    if name in PLAN_OPTIONS:
        command += PLAN_OPTIONS[name]
    else:
        command += f"{FOR_HIDIFF if hidiff else ''} -overwrite_plans_name {name}"
    if options.device == "cpu":
        command += " -device cpu"
    if from_raw:
        command = f"nnUNetv2_extract_fingerprint -d {number} --verify_dataset_integrity && {command}"
    return command if options.p else f"{command}, then train with -p {name}"


def find_dataset(options: argparse.Namespace, folders: Mapping[str, Path]) -> str:
    """Return the name of the preprocessed dataset selected by the options, such as Dataset004_Hippocampus."""
    name_or_id = options.dataset_name_or_id
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
        raise CommandError(f"{raw[0]} is not preprocessed yet; run: {planning_commands(options, from_raw=True)}")
    places = " and ".join(str(folders[key]) for key in ("nnUNet_raw", "nnUNet_preprocessed") if key in folders)
    raise CommandError(
        f"dataset {name_or_id} is not in {places}; put it into nnUNet_raw in nnU-Net's format and run: "
        f"{planning_commands(options, from_raw=True)}"
    )


def plans_of(preprocessed: Path, options: argparse.Namespace, dataset: str) -> dict[str, Any]:
    """Return the plans named by `-p`; raise CommandError if they are missing, damaged or made for another dataset."""
    name, command = options.p or DEFAULT_PLANS, planning_commands(options)
    path = preprocessed / f"{name}.json"
    if not path.is_file():
        others = [other.stem for other in sorted(preprocessed.glob("*Plans*.json"))]
        choices = f"choose existing plans with -p {' or -p '.join(others)}, or " if others else ""
        raise CommandError(f"{preprocessed} has no plans {name}; {choices}run: {command}")
    with named_for_the_user(ValueError):
        plans = read_plans(path, f"correct it or run: {command}")
    if plans.get("dataset_name") != dataset:
        raise CommandError(
            f"{path} was made for {plans.get('dataset_name')}, not for {dataset}; "
            f"run: {command} (or nnUNetv2_move_plans_between_datasets)"
        )
    return plans


def check_configuration(plans: Mapping[str, Any], configuration: str, preprocessed: Path, plans_name: str) -> None:
    """Raise CommandError unless `configuration` is in the plans and its data are preprocessed."""
    configurations = plans["configurations"]
    if configuration not in configurations:
        raise CommandError(
            f"plans {plans_name} have no configuration '{configuration}'; choose one of: {', '.join(configurations)}"
        )
    folder = preprocessed / data_identifier(plans, configuration, plans_name)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CommandError(
            f"{folder} holds no preprocessed cases; run: {preprocess_command(preprocessed.name, plans_name, configuration)}"
        )


def data_identifier(plans: Mapping[str, Any], configuration: str, plans_name: str) -> str:
    """Return the name of the folder of a configuration's preprocessed data."""
    section = plans["configurations"][configuration]
    while "data_identifier" not in section and section.get("inherits_from"):
        section = plans["configurations"][section["inherits_from"]]
    return section.get("data_identifier", f"{plans_name}_{configuration}")


def check_trainer(name: str) -> Any:
    """Return the trainer of that name; raise CommandError unless nnU-Net finds it."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides where the search looks
            return recursive_find_trainer_class_by_name(name)
    except Exception as error:  # any trainer file in a folder of the variable may raise anything
        if not says_not_found(error):
            raise CommandError(
                f"nnU-Net's search for the trainer {name} stopped with {type(error).__name__}: {first_line(error)}; for the "
                "cause run: nnunet_diffusion doctor"
            ) from error
        ours = sorted(path.stem for path in trainers_directory().glob("*Diff*.py"))
        raise CommandError(
            f"-tr is {name}, which nnU-Net finds neither among its own trainers nor in nnUNet_extTrainer; this package has: "
            f"{', '.join(ours)} (_1epoch, _5epochs, _10epochs, _20epochs, ...)"
        ) from error


def check_pretrained_weights(path: str, diffusion: bool) -> None:
    """Raise CommandError if a checkpoint cannot be read without running code, or does not fit the kind of trainer.

    nnU-Net itself would run code in the file given as -pretrained_weights.

    Args:
        path: path of the checkpoint.
        diffusion: whether the training starts with a diffusion trainer, whose network fits only weights of such a trainer.
    """
    from nnunet_diffusion.training.checkpoints import DIFFUSION_KEY, read_checkpoint

    try:
        checkpoint = read_checkpoint(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"-pretrained_weights: {error}") from error
    if diffusion and DIFFUSION_KEY not in checkpoint:
        raise CommandError(
            f"-pretrained_weights is {path}, a checkpoint of {checkpoint.get('trainer_name')}, not of a diffusion trainer; "
            f"to start from a trained nnU-Net leave it out and export {PRESEGMENTOR_FOLDER}=MODEL_FOLDER"
        )
