"""`nnunet_diffusion install`: a model from nnUNetv2_export_model_to_zip, checked before anything of it is kept."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.folders import RESULTS, folder_in

BESIDE_MODELS = ("Dataset*/inference_information.*", "Dataset*/ensembles/*/*")
"""Where nnUNetv2_export_model_to_zip puts what is not a model's."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `install` to the command line."""
    parser = subparsers.add_parser(
        "install",
        help="install a model from a zip file after checking it",
        description="Install a model that nnUNetv2_export_model_to_zip made into nnUNet_results. Its plans and checkpoints "
        "are read first, without running code from them; nnUNetv2_install_pretrained_model_from_zip does not look.",
    )
    parser.add_argument("zip", type=Path, metavar="FILE.zip")
    parser.add_argument("--trust_checkpoint", action="store_true", help="install what may run code when it is loaded")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Install the model and print its folders.

    Raises:
        CommandError: the file is no model, is unsafe, or its place is taken.
    """
    for folder in install(options.zip, Path(folder_in(os.environ, RESULTS)), trust=options.trust_checkpoint):
        print(f"Installed {folder}")
    return 0


def install(path: Path, results: Path, *, trust: bool = False) -> list[Path]:
    """Check a zip file of models and move them into the results folder.

    Args:
        path: of the file.
        results: nnUNet_results.
        trust: skip the check of plans and checkpoints.

    Returns:
        The model folders.

    Raises:
        CommandError: the file is no zip of models, has files outside of its own folders, holds what may run code, or a model
            of that name is there already; nothing is installed then.
    """
    if not zipfile.is_zipfile(path):
        raise CommandError(f"{path} is no zip file, or is not there")
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"nnUNet_results is {results}, which is no folder and cannot be made ({error})") from error
    with tempfile.TemporaryDirectory(prefix=".installing_", dir=results) as aside, zipfile.ZipFile(path) as content:
        for name in content.namelist():
            parts = PurePosixPath(name.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in "".join(parts.parts[:1]):
                raise CommandError(f"{path} holds {name!r}, which lies outside of its folder: it is not installed")
        try:
            content.extractall(aside)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise CommandError(
                f"{path} is damaged or does not fit on the disk ({error}): nothing is installed"
            ) from error
        models = sorted({plans.parent for plans in Path(aside).glob("Dataset*/*/plans.json")})
        if not models:
            raise CommandError(
                f"{path} holds no model: it has no DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION/plans.json"
            )
        for file in _files(Path(aside)):
            inside = file.relative_to(aside)
            beside = any(inside.match(place) and len(inside.parts) == place.count("/") + 1 for place in BESIDE_MODELS)
            if not beside and not any(model in file.parents for model in models):
                raise CommandError(
                    f"{path} holds {inside}, which belongs to no model with plans in it and is nothing that nnU-Net exports "
                    "beside models: it is not installed"
                )
        targets = [results / model.relative_to(aside) for model in models]
        for model, target in zip(models, targets, strict=True):
            if target.exists():
                raise CommandError(f"{target} is there already: move it away to install {path}")
            _check_model(model, path, trust)
        for model, target in zip(models, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(model, target)
        _move_rest(Path(aside), results)
    return targets


def _move_rest(source: Path, results: Path) -> None:
    """Move what lies beside the models (nnU-Net's choice of the best one, ensembles); say what is there already."""
    for path in _files(source):
        target = results / path.relative_to(source)
        if target.exists():
            print(f"{target} is there already and stays as it is")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.rglob("*") if each.is_file())


def _check_model(model: Path, path: Path, trust: bool) -> None:
    from nnunet_diffusion.inference.loading import NoDiffusionModel, read_model

    names = {checkpoint.name for checkpoint in model.glob("fold_*/checkpoint_*.pth")}
    if not names:
        raise CommandError(f"{path} holds {model.name} without a checkpoint")
    try:
        for name in sorted(names):
            folds = [each.parent.name.removeprefix("fold_") for each in model.glob(f"fold_*/{name}")]
            read_model(model, folds, name, trust)
    except NoDiffusionModel as error:
        raise CommandError(
            f"{path} holds {model.name}, a model of nnU-Net's own, and is not installed: "
            "nnUNetv2_install_pretrained_model_from_zip installs it, without looking for code in it"
        ) from error
    except (ValueError, OSError) as error:
        raise CommandError(f"{path} is not installed: {error}".replace(f"{model.parents[1]}{os.sep}", "")) from error
