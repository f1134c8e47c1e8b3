"""nnU-Net's JSON files and environment variables, and the names and commands that error texts recommend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRESEGMENTOR_FOLDER = "nnUNet_diffusion_presegmentor"
"""Model folder of a trained network of nnU-Net's, to start from instead of training one."""

DEFAULT_PLANNER = "DiffusionPlanner"
PLANS_OF = {
    DEFAULT_PLANNER: "nnUNetDiffusionPlans",
    "DiffusionPlannerResEncM": "nnUNetDiffusionResEncUNetMPlans",
    "DiffusionPlannerResEncL": "nnUNetDiffusionResEncUNetLPlans",
}
"""Our planners -> the default name of their plans."""

WORDS = {dict: "a dictionary", list: "a list", str: "text", int: "an integer"}


def read_dictionary(path: Path, cure: str, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a file that holds a dictionary.

    Args:
        path: of the file.
        cure: what to do if it is not what it should be; a sentence's end, such as "run: ...".
        kinds: key -> type of its value, of the keys that must be there.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no UTF-8 JSON or no dictionary, or a key is missing or of another type.
        Both name the file and end with the cure.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {cure}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, not UTF-8, a number too long, or nested too deep
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}); {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_word(content)}, not a dictionary; {cure}")
    require(content, kinds or {}, path, cure)
    return content


def require(content: Mapping[str, Any], kinds: Mapping[str, type], path: Path, cure: str) -> None:
    """Raise ValueError, as `read_dictionary` does, if a key of `kinds` is missing or of another type."""
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            found = _word(content[key]) if key in content else "missing"
            raise ValueError(f"{path}: '{key}' is {found}, but must be {WORDS[kind]}; {cure}")


def read_plans(path: Path, cure: str) -> dict[str, Any]:
    """Read plans, whose configurations and their sections must be dictionaries and must not inherit in a circle.

    Args:
        path: of the file.
        cure: as for `read_dictionary`.

    Raises:
        FileNotFoundError: as `read_dictionary`.
        ValueError: as `read_dictionary`, for each configuration too.
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
    """Return the command that preprocesses a configuration anew; `dataset_name` is DatasetXXX_NAME."""
    return f"nnUNetv2_preprocess -d {int(dataset_name[7:10])} -plans_name {plans_name} -c {configuration}"


def says_not_found(error: Exception) -> bool:
    """Whether nnU-Net's search for a trainer ended without one; else a file on its way failed to import."""
    return "Could not find requested" in str(error)
