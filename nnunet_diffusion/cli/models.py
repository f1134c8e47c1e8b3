"""Selection of the trained model for `nnunet_diffusion predict` and `diagnose`, without importing torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.devices import DEVICES, check_device
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import PREPROCESSED, RESULTS, dataset_prefix, datasets_in, folder_in
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import read_plans

NAME_PARTS = ("tr", "p", "c")  # arguments that form a model folder's name, in this order


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select a trained model (`model_folder`) to a command."""
    add = parser.add_argument
    add("-d", metavar="ID", help="dataset, number or name")
    add("-p", help="name of the plans (that of the only trained model)")
    add("-tr", help="name of the trainer (that of the only trained model)")
    add("-c", metavar="CONFIG", help="configuration, for example 2d (that of the only trained model)")
    add("-m", metavar="FOLDER", help="model folder, instead of -d, -p, -tr and -c")
    add("-chk", default="checkpoint_final.pth", help="checkpoint (checkpoint_final.pth)")


def model_folder(options: argparse.Namespace, environment: Mapping[str, str]) -> Path:
    """Return the folder of the model selected by `-m`, or by `-d` and any of `-tr`, `-p` and `-c`.

    Args:
        options: command-line options with m, d, tr, p, c (None if not given) and chk.
        environment: variables of the process.

    Raises:
        CommandError: no model or more than one matches; the message lists the models and the arguments that select them.
    """
    if options.m is not None:
        if not Path(options.m).is_dir():
            raise CommandError(
                f"-m is {options.m}, but there is no model folder of that name: correct it, or train first"
            )
        return Path(options.m)
    if options.d is None:
        raise CommandError(
            "give the model as -d ID (with -c, -p and -tr where several are trained), or its folder as -m"
        )
    dataset = _dataset_folder(options.d, Path(folder_in(environment, RESULTS, ", or give -m MODEL_FOLDER")))
    trained = [path for path in sorted(dataset.glob("*__*__*")) if any(path.glob(f"fold_*/{options.chk}"))]
    found = [path for path in trained if _fits(path, options)]
    if len(found) == 1:
        return found[0]
    given = " ".join(f"-{name} {value}" for name in ("d", *NAME_PARTS) if (value := getattr(options, name)) is not None)
    if found:
        raise CommandError(f"{len(found)} trained models fit {given}; type one of:\n{_to_type(found, options.d)}")
    if others := [path for path in trained if _is_of_diffusion_trainer(path)]:
        raise CommandError(f"no trained model fits {given}; there is:\n{_to_type(others, options.d)}")
    raise CommandError(
        f"{dataset} has no model of a diffusion trainer with {options.chk}; "
        f"train one: nnunet_diffusion train {options.d} CONFIG FOLD"
    )


def _dataset_folder(name_or_id: str, results: Path) -> Path:
    found = datasets_in(results, dataset_prefix(name_or_id))
    if len(found) > 1:
        raise CommandError(
            f"-d is {name_or_id}, but {results} has several such datasets; give one of: {', '.join(found)}"
        )
    if not found:
        raise CommandError(
            f"-d is {name_or_id}, but {results} has no models of that dataset: correct -d, or train first"
        )
    return results / found[0]


def _to_type(models: list[Path], dataset: str) -> str:
    lines = []
    for model in models:
        words = zip(NAME_PARTS, model.name.split("__"), strict=False)
        lines.append(f"  -d {dataset} " + " ".join(f"-{name} {value}" for name, value in words))
    return "\n".join(lines)


def _fits(model: Path, options: argparse.Namespace) -> bool:
    parts = zip(NAME_PARTS, model.name.split("__"), strict=False)
    if any(getattr(options, name) not in (None, part) for name, part in parts):
        return False
    return options.tr is not None or _is_of_diffusion_trainer(model)


def _is_of_diffusion_trainer(model: Path) -> bool:
    """Return whether a model's trainer is a diffusion trainer. nnU-Net's own trainers may use the same plans."""
    trainer, _, configuration = (*model.name.split("__"), "", "")[:3]
    if trainer.startswith("nnUNetTrainer"):
        return False
    try:
        plans = read_plans(model / "plans.json", "")
    except (OSError, ValueError):
        return True  # loading the model reports what is wrong with its plans
    trainer = re.sub(r"_half[01]$", "", trainer)  # trained on a half of the cases, for starts out of fold
    section = plans["configurations"].get(configuration, {}).get("diffusion")
    if section is None:
        return False
    inner = section.get("presegmentor")
    return trainer not in (
        section.get("presegmentor_trainer"),
        inner.get("trainer") if isinstance(inner, dict) else None,
    )


def finished_folds(model: Path, checkpoint: str) -> list[str]:
    """Return the names of the folds that have the checkpoint: numbers, or "all" if there are no numbered folds.

    Raises:
        CommandError: no fold has the checkpoint; the message lists the checkpoints that exist.
    """
    found = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{checkpoint}"))
    if not found:
        others = sorted({path.name for path in model.glob("fold_*/checkpoint_*.pth")})
        there = f", but there is {', '.join(others)}: choose it with -chk, or finish the training"
        raise CommandError(f"no fold of {model} has {checkpoint}{there if others else ': train first'}")
    return [fold for fold in found if fold != "all"] or found


def with_validation_cases(
    model: Path, folds: Sequence[str], options: argparse.Namespace, environment: Mapping[str, str], **settings: Any
) -> tuple[Any, dict[str, list[str]], Callable[[str], Any]]:
    """Load a trained model to measure it on its validation cases. nnU-Net's variables must be set, as it is imported here.

    Args:
        model: folder of the model.
        folds: names of its folds.
        options: command-line options with chk, device and cases.
        environment: variables of the process.
        settings: further arguments of DiffusionPredictor.

    Returns:
        The predictor, the names of each fold's validation cases, and a function that loads a case of that name.

    Raises:
        CommandError: the device is not there, or the model or its preprocessed data cannot be read.
    """
    import torch

    from nnunet_diffusion.evaluation.preprocessed import preprocessed_cases, validation_cases
    from nnunet_diffusion.inference import DiffusionPredictor

    check_device(options.device)
    preprocessed = Path(folder_in(environment, PREPROCESSED))
    with named_for_the_user(FileNotFoundError, ValueError, RuntimeError, NotImplementedError):
        predictor = DiffusionPredictor(device=torch.device(options.device), allow_tqdm=False, **settings)
        predictor.initialize_from_trained_model_folder(str(model), list(folds), options.chk)
        found = {fold: validation_cases(predictor, preprocessed, fold, options.cases) for fold in predictor.folds}
    folder = next(folder for _, folder in found.values())

    def load(name: str) -> Any:
        return next(preprocessed_cases(folder, [name], predictor.label_manager))

    return predictor, {fold: names for fold, (names, _) in found.items()}, load


@contextlib.contextmanager
def settings_named_as_options(options: argparse.Namespace) -> Iterator[None]:
    """Name a setting in an error's message as the user did, such as --steps, where an option of its name was given."""

    def option(found: re.Match[str]) -> str:
        return f"--{found[1]}" if getattr(options, found[1], None) is not None else found[0]

    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"diffusion\.inference\.(\w+)", option, str(error))) from error


def with_drawn_process(
    options: argparse.Namespace, model: Path, fold: str, command: str, most_steps: int, **settings: Any
) -> Any:
    """Load one fold of a model to draw its reverse process; nnU-Net's variables must be set, as it is imported here.

    Args:
        options: command-line options with chk, device, steps and start_step.
        model: folder of the model.
        fold: name of the fold.
        command: name of the subcommand, for messages.
        most_steps: steps where the user gave none; fewer where T' is smaller.
        settings: further arguments of DiffusionPredictor.

    Raises:
        CommandError: the device is not there, the model cannot be read, or it is the second stage of a cascade.
    """
    import torch

    from nnunet_diffusion.inference import DiffusionPredictor

    check_device(options.device)
    kinds = (FileNotFoundError, ValueError, RuntimeError, ImportError, NotImplementedError)
    with named_for_the_user(*kinds), settings_named_as_options(options):
        predictor = DiffusionPredictor(
            device=torch.device(options.device), allow_tqdm=False, steps=options.steps, start_step=options.start_step,
            **settings,
        )  # fmt: skip
        predictor.initialize_from_trained_model_folder(str(model), [fold], options.chk)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise CommandError(
            f"the model is the second stage of a cascade, which nnunet_diffusion {command} does not support: name a model of "
            "another configuration"
        )
    found = predictor.network.settings
    if options.steps is None:
        predictor.network.settings = dataclasses.replace(found, steps=min(most_steps, found.start_step))
    return predictor


@dataclass(frozen=True, eq=False)
class TrainedFolds:
    """Folds of a trained model, each with the validation cases that it was not trained on.

    Attributes:
        model: folder of the model.
        predictor: DiffusionPredictor with all folds.
        predictor_of: fold -> predictor with that fold alone.
        cases: (fold, name) of all validation cases.
        load: returns a case of that name.
    """

    model: Path
    predictor: Any
    predictor_of: dict[str, Any]
    cases: list[tuple[str, str]]
    load: Callable[[str], Any]


def add_fold_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `trained_folds` reads to a command."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("-f", nargs="+", metavar="FOLD", help="folds (all that are finished)")
    add("-device", default="cuda", choices=DEVICES)
    add(
        "--cases",
        type=int,
        metavar="N",
        help="number of validation cases of each fold, evenly spaced in their list (all)",
    )


def trained_folds(options: argparse.Namespace, **settings: Any) -> TrainedFolds:
    """Load the folds of a model whose plans.json will be written. nnU-Net is imported here, with its variables set.

    Args:
        options: of the command line, see `add_fold_arguments`.
        settings: further arguments of DiffusionPredictor.

    Raises:
        CommandError: a number is out of range, or the model cannot be read or written.
    """
    if options.cases is not None and options.cases < 1:
        raise CommandError(f"--cases is {options.cases}, but must be 1 or more")
    model = model_folder(options, os.environ)
    if not os.access(model, os.W_OK):
        raise CommandError(f"{model} cannot be written, but the result belongs into its plans.json: make it writable")
    folds = options.f or finished_folds(model, options.chk)
    os.environ.update(with_trainers(os.environ))
    from nnunet_diffusion.evaluation.tuning import with_fold

    predictor, found, load = with_validation_cases(model, folds, options, os.environ, **settings)
    cases = [(fold, name) for fold, names in found.items() for name in names]
    predictors = {fold: with_fold(predictor, place) for place, fold in enumerate(predictor.folds)}
    return TrainedFolds(model, predictor, predictors, cases, load)
