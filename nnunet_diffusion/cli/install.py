"""`nnunet_diffusion install`: install a model from nnUNetv2_export_model_to_zip after checking it."""

from __future__ import annotations

import argparse
import lzma
import os
import pickle
import shutil
import uuid
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from nnunet_diffusion.cli.errors import CommandError, first_line
from nnunet_diffusion.cli.folders import RESULTS, folder_in
from nnunet_diffusion.jobs.locks import HeldLock
from nnunet_diffusion.jobs.signals import terminated

ASIDE = ".installing_"
MB = 1e6
MAX_EXPANSION = 10  # largest ratio of the unpacked size to the size of the zip file
SMALL_BYTES = 100 * 10**6  # up to this unpacked size any ratio is accepted: plans and pictures compress well
POSTPROCESSING = (
    "nnunetv2.postprocessing.remove_connected_components",
    "remove_all_but_largest_component_from_segmentation",
)
BESIDE_MODELS = ("Dataset*/inference_information.*", "Dataset*/ensembles/*/*")
"""Files that nnUNetv2_export_model_to_zip writes beside model folders."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `install` to the command line."""
    parser = subparsers.add_parser(
        "install",
        help="install a model from a zip file after checking it",
        description="Install a model that nnUNetv2_export_model_to_zip made into nnUNet_results. Its plans and checkpoints "
        "are checked first, without running code from them; nnUNetv2_install_pretrained_model_from_zip does not check them.",
    )
    parser.add_argument("zip", type=Path, metavar="FILE.zip")
    parser.add_argument(
        "--trust_checkpoint", action="store_true", help="also install files that may run code when loaded"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Install the models of a zip file and print their folders.

    Raises:
        CommandError: the file contains no model, is unsafe, or a model of that name is already installed.
    """
    for folder in install(options.zip, Path(folder_in(os.environ, RESULTS)), trust=options.trust_checkpoint):
        print(f"Installed {folder}")
    return 0


def install(path: Path, results: Path, *, trust: bool = False) -> list[Path]:
    """Check a zip file of models and move the models into the results folder.

    Args:
        path: path of the zip file.
        results: nnUNet_results.
        trust: skip the check of plans and checkpoints.

    Returns:
        The model folders.

    Raises:
        CommandError: the file is not a zip file of models, expands more than `MAX_EXPANSION` times, has files outside of the
            model folders, holds files that may run code, or a model of that name is already installed. Nothing is installed.
    """
    if not zipfile.is_zipfile(path):
        raise CommandError(f"{path} is not a zip file, or does not exist")
    try:
        results.mkdir(parents=True, exist_ok=True)
        remove_abandoned(results)
    except OSError as error:
        raise CommandError(
            f"nnUNet_results is {results}, which cannot be created or written ({error}): "
            "export nnUNet_results=/another/folder"
        ) from error
    with terminated(), HeldLock(results / f"{ASIDE}{uuid.uuid4().hex}.lock") as lock:
        lock.acquire()
        aside = lock.path.with_suffix("")
        try:
            return _install_from(path, aside, results, trust)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(results: Path) -> None:
    """Remove temporary folders of killed installations from nnUNet_results: those whose lock is free."""
    for aside in results.glob(f"{ASIDE}*"):
        if aside.is_dir():
            with HeldLock(aside.with_name(f"{aside.name}.lock")) as lock:
                if lock.acquire():
                    shutil.rmtree(aside, ignore_errors=True)


def _install_from(path: Path, aside: Path, results: Path, trust: bool) -> list[Path]:
    """Unpack a zip file into the folder `aside`, check the files there and move the models into `results`."""
    _extract(path, aside)
    models = sorted({plans.parent for plans in aside.glob("Dataset*/*/plans.json")})
    if not models:
        raise CommandError(f"{path} holds no model: it has no DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION/plans.json")
    for file in _files(aside):
        inside = file.relative_to(aside)
        beside = any(inside.match(place) and len(inside.parts) == place.count("/") + 1 for place in BESIDE_MODELS)
        if not beside and not any(model in file.parents for model in models):
            raise CommandError(
                f"{path} holds {inside}, which is neither in a model folder with plans nor a file that nnU-Net exports "
                "beside models: nothing is installed"
            )
        if file.suffix == ".pkl" and not trust:
            _check_pickle(file, f"{path} holds {inside}")
    targets = [results / model.relative_to(aside) for model in models]
    for model, target in zip(models, targets, strict=True):
        if target.exists():
            raise CommandError(f"{target} exists already: move it away to install {path}")
        _check_model(model, path, trust)
    for model, target in zip(models, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(model, target)
    _move_rest(aside, results)
    return targets


def _extract(path: Path, aside: Path) -> None:
    """Unpack a zip file after checking its file names and size."""
    try:
        with zipfile.ZipFile(path) as content:
            for name in content.namelist():
                parts = PurePosixPath(name.replace("\\", "/"))
                if parts.is_absolute() or ".." in parts.parts or ":" in "".join(parts.parts[:1]):
                    raise CommandError(f"{path} holds {name!r}, which lies outside of its folder: nothing is installed")
            _check_size(path, content, aside.parent)
            content.extractall(aside)
    except NotImplementedError as error:
        raise CommandError(
            f"{path} is compressed in a way that cannot be read here ({error}): unpack it and zip it again without options"
        ) from error
    except RuntimeError as error:  # zipfile raises it if a password is needed
        raise CommandError(
            f"{path} is encrypted: unpack it with its password and zip it again without a password"
        ) from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise CommandError(f"{path} is damaged or does not fit on the disk ({error}): nothing is installed") from error


def _check_size(path: Path, content: zipfile.ZipFile, results: Path) -> None:
    """Raise CommandError if a zip file would expand too much, or does not fit on the disk."""
    unpacked = sum(entry.file_size for entry in content.infolist())
    limit = max(MAX_EXPANSION * path.stat().st_size, SMALL_BYTES)
    if unpacked > limit:
        raise CommandError(
            f"{path} would expand to {unpacked / MB:.0f} MB, more than {MAX_EXPANSION} times its size and more than "
            f"{SMALL_BYTES / MB:.0f} MB, which no model does: nothing is installed"
        )
    free = shutil.disk_usage(results).free
    if unpacked > free:
        raise CommandError(
            f"{path} needs {unpacked / MB:.0f} MB, but {results} has {free / MB:.0f} MB free: free some space, or export "
            "nnUNet_results=/another/folder"
        )


class _PostprocessingReader(pickle.Unpickler):
    """Reader of pickles from nnUNetv2_find_best_configuration, which hold plain values and references to one function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the name of nnU-Net's postprocessing function; refuse any other, because reading it could run code."""
        if (module, name) == POSTPROCESSING:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")


def _check_pickle(file: Path, what: str) -> None:
    """Raise CommandError if a pickle refers to anything but nnU-Net's postprocessing; nnU-Net's commands load it."""
    try:
        with file.open("rb") as stream:
            _PostprocessingReader(stream).load()
    except Exception as error:  # a malformed pickle may raise anything
        raise CommandError(
            f"{what}, a pickle that is not nnU-Net's postprocessing ({first_line(error)}) and could run code when it is used: "
            "nothing is installed; if you trust it, give --trust_checkpoint"
        ) from error


def _move_rest(source: Path, results: Path) -> None:
    """Move the files beside the models (nnU-Net's choice of the best one, ensembles); print which of them exist already."""
    for path in _files(source):
        target = results / path.relative_to(source)
        if target.exists():
            print(f"{target} exists already and is kept")
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
            "nnUNetv2_install_pretrained_model_from_zip installs it, without checking it for code"
        ) from error
    except (ValueError, OSError) as error:
        raise CommandError(f"{path} is not installed: {error}".replace(f"{model.parents[1]}{os.sep}", "")) from error
