"""nnU-Net's folders, as its variables name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from nnunet_diffusion.cli.errors import CommandError

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"


def folder_in(environment: Mapping[str, str], name: str, otherwise: str = "") -> str:
    """Value of one of nnU-Net's variables.

    Raises:
        CommandError: it is not set; says how to, and `otherwise` what else helps.
    """
    if not environment.get(name):
        raise CommandError(f"{name} is not set; run: export {name}=/path/to/{name}{otherwise}")
    return environment[name]


def dataset_prefix(name_or_id: str) -> str:
    """Beginning of the name of the dataset's folder, such as Dataset004_ for 4; a full name is its own.

    Raises:
        CommandError: it is neither a number nor a name.
    """
    if re.fullmatch(r"Dataset\d{3}_.+", name_or_id):
        return name_or_id
    if name_or_id.isdecimal():
        return f"Dataset{int(name_or_id):03d}_"
    raise CommandError(
        f"dataset is '{name_or_id}', but must be a number such as 4 or a full name such as Dataset004_Name"
    )


def datasets_in(folder: Path | None, prefix: str) -> list[str]:
    """Names of the datasets in `folder` that begin with `prefix`, or equal it if it is a full name."""
    found = sorted(path.name for path in folder.glob("Dataset*") if path.is_dir()) if folder else []
    return [name for name in found if name == prefix or (prefix.endswith("_") and name.startswith(prefix))]
