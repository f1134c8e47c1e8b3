"""`nnunet_diffusion trainers_directory`: where nnU-Net has to look for the trainers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "nnUNet_extTrainer"


def trainers_directory() -> Path:
    """Absolute folder of nnunet_diffusion.trainers, found without importing a trainer.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = find_spec("nnunet_diffusion.trainers")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("package nnunet_diffusion.trainers is not installed: run pip install . in its clone")
    return Path(spec.origin).resolve().parent


def search_path(environment: Mapping[str, str]) -> list[str]:
    """Folders that `nnUNet_extTrainer` names in `environment`, in their order; empty if it is unset."""
    return [folder for folder in environment.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def with_trainers(environment: Mapping[str, str]) -> dict[str, str]:
    """Copy of `environment` whose `nnUNet_extTrainer` names our trainers first and then the user's folders."""
    ours = trainers_directory()
    others = [folder for folder in search_path(environment) if Path(folder).resolve() != ours]
    return {**environment, VARIABLE: os.pathsep.join([str(ours), *others])}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `trainers_directory` to the command line."""
    parser = subparsers.add_parser(
        "trainers_directory",
        help="print the folder for nnUNet_extTrainer",
        description=f'Print the folder of the trainers: export {VARIABLE}="$(nnunet_diffusion trainers_directory)"',
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the folder."""
    print(trainers_directory())
    return 0
