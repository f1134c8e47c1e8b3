"""Reading nnU-Net's JSON files, and the names and commands that error messages recommend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRESEGMENTOR_FOLDER = "nnUNet_diffusion_presegmentor"
"""Environment variable: model folder of a trained nnU-Net to use as pre-segmentor, instead of training one."""

DEFAULT_PLANNER = "DiffusionPlanner"
PLANS_OF = {
    DEFAULT_PLANNER: "nnUNetDiffusionPlans",
    "DiffusionPlannerResEncM": "nnUNetDiffusionResEncUNetMPlans",
    "DiffusionPlannerResEncL": "nnUNetDiffusionResEncUNetLPlans",
}
"""Planner of this package -> default name of its plans."""

WORDS = {dict: "a dictionary", list: "a list", str: "text", int: "an integer"}


def read_dictionary(path: Path, cure: str, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a JSON file that holds a dictionary.

    Args:
        path: of the file.
        cure: advice if the file is not valid, as the end of a sentence, such as "run: ...".
        kinds: required key -> type of its value.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not UTF-8 JSON, not a dictionary, or a key is missing or has the wrong type.
        Both messages name the file and end with the cure.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {cure}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number too long, or nested too deeply
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}); {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_word(content)}, not a dictionary; {cure}")
    require(content, kinds or {}, path, cure)
    return content


def require(content: Mapping[str, Any], kinds: Mapping[str, type], path: Path, cure: str) -> None:
    """Raise ValueError, as `read_dictionary` does, if a key of `kinds` is missing or has the wrong type."""
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            found = _word(content[key]) if key in content else "missing"
            raise ValueError(f"{path}: '{key}' is {found}, but must be {WORDS[kind]}; {cure}")


def read_plans(path: Path, cure: str) -> dict[str, Any]:
    """Read plans. Configurations and their sections must be dictionaries, and inheritance must not be circular.

    Args:
        path: of the file.
        cure: as for `read_dictionary`.

    Raises:
        FileNotFoundError: as `read_dictionary`.
        ValueError: as `read_dictionary`, also for each configuration.
    """
    plans = read_dictionary(path, cure, {"configurations": dict})
    configurations = plans["configurations"]
    for name, configuration in configurations.items():
        if not isinstance(configuration, dict):
            raise ValueError(f"{path}: configuration '{name}' is {_word(configuration)}, not a dictionary; {cure}")
        for key in ("architecture", "diffusion"):
            if not isinstance(configuration.get(key, {}), dict):
                raise ValueError(
                    f"{path}: '{key}' of configuration '{name}' is {_word(configuration[key])}, not a dictionary; {cure}"
                )
    for name in configurations:
        seen, parent = [name], configurations[name].get("inherits_from")
        while parent is not None:
            if parent not in configurations or parent in seen:
                wrong = "in a circle" if parent in seen else f"from '{parent}', which is not there"
                raise ValueError(f"{path}: configuration '{name}' inherits {wrong}; {cure}")
            seen.append(parent)
            parent = configurations[parent].get("inherits_from")
    return plans


def _word(value: Any) -> str:
    return next((word for kind, word in WORDS.items() if type(value) is kind), type(value).__name__)


def preprocess_command(dataset_name: str, plans_name: str, configuration: str) -> str:
    """Return the command that preprocesses a configuration again; `dataset_name` is DatasetXXX_NAME."""
    return f"nnUNetv2_preprocess -d {int(dataset_name[7:10])} -plans_name {plans_name} -c {configuration}"


def says_not_found(error: Exception) -> bool:
    """True if nnU-Net's search found no trainer; False if a file failed to import during the search."""
    return "Could not find requested" in str(error)
