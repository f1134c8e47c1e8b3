"""`nnunet_diffusion install`: a model from nnUNetv2_export_model_to_zip, checked before anything of it is kept."""

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
MAX_EXPANSION = 10  # unpacked size, as a multiple of the file's
SMALL_BYTES = 100 * 10**6  # plans and pictures of a small file may expand further than that
POSTPROCESSING = (
    "nnunetv2.postprocessing.remove_connected_components",
    "remove_all_but_largest_component_from_segmentation",
)
BESIDE_MODELS = ("Dataset*/inference_information.*", "Dataset*/ensembles/*/*")
"""Where nnUNetv2_export_model_to_zip puts what is not a model's."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `install` to the command line."""
    parser = subparsers.add_parser(
        "install",
        help="install a model from a zip file after checking it",
        description="Install a model that nnUNetv2_export_model_to_zip made into nnUNet_results. Its plans and checkpoints "
        "are checked first, without running code from them; nnUNetv2_install_pretrained_model_from_zip does not look.",
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
        CommandError: the file is not a zip of models, grows more than `MAX_EXPANSION` times, has files outside of its own
            folders, holds what may run code, or a model of that name is there already; nothing is installed then.
    """
    if not zipfile.is_zipfile(path):
        raise CommandError(f"{path} is not a zip file, or does not exist")
    try:
        results.mkdir(parents=True, exist_ok=True)
        remove_abandoned(results)
    except OSError as error:
        raise CommandError(f"nnUNet_results is {results}, which is not a folder that can be made ({error})") from error
    with terminated(), HeldLock(results / f"{ASIDE}{uuid.uuid4().hex}.lock") as lock:
        lock.acquire()
        aside = lock.path.with_suffix("")
        try:
            return _install_from(path, aside, results, trust)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(results: Path) -> None:
    """Remove what killed installations left in nnUNet_results: those whose lock nobody holds any more."""
    for aside in results.glob(f"{ASIDE}*"):
        if aside.is_dir():
            with HeldLock(aside.with_name(f"{aside.name}.lock")) as lock:
                if lock.acquire():
                    shutil.rmtree(aside, ignore_errors=True)


def _install_from(path: Path, aside: Path, results: Path, trust: bool) -> list[Path]:
    """Unpack a zip file into the folder `aside`, check it there and move its models into `results`."""
    _extract(path, aside)
    models = sorted({plans.parent for plans in aside.glob("Dataset*/*/plans.json")})
    if not models:
        raise CommandError(f"{path} holds no model: it has no DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION/plans.json")
    for file in _files(aside):
        inside = file.relative_to(aside)
        beside = any(inside.match(place) and len(inside.parts) == place.count("/") + 1 for place in BESIDE_MODELS)
        if not beside and not any(model in file.parents for model in models):
            raise CommandError(
                f"{path} holds {inside}, which belongs to no model with plans in it and is nothing that nnU-Net exports "
                "beside models: it is not installed"
            )
        if file.suffix == ".pkl" and not trust:
            _check_pickle(file, f"{path} holds {inside}")
    targets = [results / model.relative_to(aside) for model in models]
    for model, target in zip(models, targets, strict=True):
        if target.exists():
            raise CommandError(f"{target} is there already: move it away to install {path}")
        _check_model(model, path, trust)
    for model, target in zip(models, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(model, target)
    _move_rest(aside, results)
    return targets


def _extract(path: Path, aside: Path) -> None:
    """Unpack a zip file whose names, size and compression have been checked."""
    try:
        with zipfile.ZipFile(path) as content:
            for name in content.namelist():
                parts = PurePosixPath(name.replace("\\", "/"))
                if parts.is_absolute() or ".." in parts.parts or ":" in "".join(parts.parts[:1]):
                    raise CommandError(f"{path} holds {name!r}, which lies outside of its folder: it is not installed")
            _check_size(path, content, aside.parent)
            content.extractall(aside)
    except NotImplementedError as error:
        raise CommandError(
            f"{path} is compressed in a way that cannot be read here ({error}): unpack it and zip it again without options"
        ) from error
    except RuntimeError as error:  # what zipfile raises without a password
        raise CommandError(f"{path} is encrypted: unpack it with its password and zip it again without") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise CommandError(f"{path} is damaged or does not fit on the disk ({error}): nothing is installed") from error


def _check_size(path: Path, content: zipfile.ZipFile, results: Path) -> None:
    """Refuse a file that would grow out of proportion, or beyond the disk."""
    unpacked = sum(entry.file_size for entry in content.infolist())
    limit = max(MAX_EXPANSION * path.stat().st_size, SMALL_BYTES)
    if unpacked > limit:
        raise CommandError(
            f"{path} would grow to {unpacked / MB:.0f} MB, more than {MAX_EXPANSION} times its size and than "
            f"{SMALL_BYTES / MB:.0f} MB, as no model does: it is not installed"
        )
    free = shutil.disk_usage(results).free
    if unpacked > free:
        raise CommandError(
            f"{path} needs {unpacked / MB:.0f} MB, but {results} has {free / MB:.0f} MB free: free some space, or export "
            "nnUNet_results=/another/folder"
        )


class _PostprocessingReader(pickle.Unpickler):
    """Reads what nnUNetv2_find_best_configuration writes: references to one function, and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """Return nnU-Net's own step; refuse anything else, as reading it could run code."""
        if (module, name) == POSTPROCESSING:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")


def _check_pickle(file: Path, what: str) -> None:
    """Raise CommandError if a pickle, which nnU-Net's commands load, refers to anything but nnU-Net's postprocessing."""
    try:
        with file.open("rb") as stream:
            _PostprocessingReader(stream).load()
    except Exception as error:  # a malformed pickle raises anything
        raise CommandError(
            f"{what}, a pickle that is not nnU-Net's postprocessing ({first_line(error)}) and could run code when it is used: "
            "nothing is installed; if you trust it, give --trust_checkpoint"
        ) from error


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
