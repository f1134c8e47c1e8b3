"""nnU-Net's folders, as set in its environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from nnunet_diffusion.cli.errors import CommandError

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"


def folder_in(environment: Mapping[str, str], name: str, otherwise: str = "") -> str:
    """Return the value of one of nnU-Net's environment variables.

    Args:
        environment: variables of the process.
        name: name of the variable.
        otherwise: alternative to setting the variable, appended to the error message.

    Raises:
        CommandError: the variable is not set.
    """
    if not environment.get(name):
        raise CommandError(f"{name} is not set; run: export {name}=/path/to/{name}{otherwise}")
    return environment[name]


def refuse_file_as_output(output: str | None) -> None:
    """Raise CommandError if -o, where it is given, is a file, or lies in one."""
    if output is None:
        return
    there = next((path for path in (Path(output), *Path(output).parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        which = "which" if there == Path(output) else f"but {there}"
        raise CommandError(f"-o is {output}, {which} is a file: give a folder for the output")


def dataset_prefix(name_or_id: str) -> str:
    """Return the prefix of the dataset folder's name, such as Dataset004_ for 4; a full name is returned unchanged.

    Raises:
        CommandError: the argument is neither a number nor a full name.
    """
    if re.fullmatch(r"Dataset\d{3}_.+", name_or_id):
        return name_or_id
    if name_or_id.isdecimal():
        return f"Dataset{int(name_or_id):03d}_"
    raise CommandError(
        f"dataset is '{name_or_id}', but must be a number such as 4 or a full name such as Dataset004_Name"
    )


def datasets_in(folder: Path | None, prefix: str) -> list[str]:
    """Return the names of the datasets in `folder` that begin with `prefix`, or equal it if it is a full name."""
    found = sorted(path.name for path in folder.glob("Dataset*") if path.is_dir()) if folder else []
    return [name for name in found if name == prefix or (prefix.endswith("_") and name.startswith(prefix))]
