"""`nnunet_diffusion trainers_directory`: print the folder in which nnU-Net finds the trainers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "nnUNet_extTrainer"


def trainers_directory() -> Path:
    """Return the absolute path of nnunet_diffusion.trainers, found without importing a trainer.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec("nnunet_diffusion.trainers")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("package nnunet_diffusion.trainers is not installed: run pip install . in its clone")
    return Path(spec.origin).resolve().parent


def search_path(environment: Mapping[str, str]) -> list[str]:
    """Return the folders listed in `nnUNet_extTrainer`, in their order; an empty list if it is not set."""
    return [folder for folder in environment.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def with_trainers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `environment` in which `nnUNet_extTrainer` lists our trainers first, then the user's folders."""
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
    """Print the folder of the trainers."""
    print(trainers_directory())
    return 0
