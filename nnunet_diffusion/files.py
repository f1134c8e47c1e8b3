"""nnU-Net's files: its JSON and the names of images; and names and commands that error messages recommend."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPILE = "nnUNet_compile"
"""nnU-Net's environment variable for torch.compile."""
PRESEGMENTOR_FOLDER = "nnUNet_diffusion_presegmentor"
"""Environment variable: model folder of a trained nnU-Net to use as pre-segmentor, instead of training one."""

DEFAULT_PLANNER = "DiffusionPlanner"
PLANS_OF = {
    DEFAULT_PLANNER: "nnUNetDiffusionPlans",
    "DiffusionPlannerResEncM": "nnUNetDiffusionResEncUNetMPlans",
    "DiffusionPlannerResEncL": "nnUNetDiffusionResEncUNetLPlans",
}
"""Planner of this package -> default name of its plans."""
HIDIFF_TRAINER = "HiDiffTrainer"
FOR_HIDIFF = " -denoiser hidiff"
"""Option of `nnunet_diffusion plan` that sizes HiDiff's refiner."""


def hidiff_plans(name: str) -> str:
    """Return the default name of a planner's plans for HiDiff (`-denoiser hidiff`)."""
    return name.replace("Diffusion", "HiDiff")


PLAN_OPTIONS = {plans: "" if planner == DEFAULT_PLANNER else f" -pl {planner}" for planner, plans in PLANS_OF.items()}
PLAN_OPTIONS |= {hidiff_plans(plans): options + FOR_HIDIFF for plans, options in PLAN_OPTIONS.items()}
"""Default name of plans of this package -> options of `nnunet_diffusion plan` that make them."""

IMAGE_ENDINGS = (
    ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg", ".dcm",
)  # fmt: skip
"""Endings of image files. Files with other endings, such as nnU-Net's .json, are ignored."""

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


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON, with null for NaN and infinite numbers, which JSON does not have."""
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


@dataclass(frozen=True)
class InputFiles:
    """Images of a folder.

    Attributes:
        cases: case name -> its files from channel 0 on, sorted by name; missing channels are included.
        left_out: each image whose name does not follow nnU-Net's convention -> why it is left out.
    """

    cases: dict[str, list[str]]
    left_out: dict[str, str]


def find_images(folder: str | Path, ending: str) -> InputFiles:
    """Find the cases of a folder; hidden files and files that are not images are ignored.

    Args:
        folder: folder of the images.
        ending: file ending of the model's images, from its dataset.json.

    Raises:
        ValueError: no file name follows nnU-Net's convention. The message names one such file and what to do.
    """
    folder = Path(folder)
    channels: dict[str, set[int]] = {}
    left_out: dict[str, str] = {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for name in names:
        if named := re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", name):
            channels.setdefault(named[1], set()).add(int(named[2]))
        elif name.endswith(ending):
            left_out[name] = f"nnU-Net wants {name.removesuffix(ending)}_0000{ending}"
        elif name.lower().endswith(IMAGE_ENDINGS):
            left_out[name] = f"the model's images end with {ending}"
    if not channels:
        raise ValueError(_without_images(folder, ending, left_out))
    cases = {
        case: [str(folder / f"{case}_{channel:04d}{ending}") for channel in range(max(found) + 1)]
        for case, found in sorted(channels.items())
    }
    return InputFiles(cases, left_out)


def _without_images(folder: Path, ending: str, left_out: Mapping[str, str]) -> str:
    if not left_out:
        return f"{folder} holds no image: no file in it ends with _0000{ending}, as the model's images do."
    name, why = next(iter(left_out.items()))
    cure = "rename" if name.endswith(ending) else "convert"
    return f"{folder} holds no image of this model: you have {name}; {why}. Please {cure} the files."


def refuse_overwriting(
    targets: Sequence[Path], ending: str, cases: Sequence[Sequence[str]], folders: Mapping[str, str | None]
) -> None:
    """Check that every output has its own file and that no output is written to an input folder.

    Args:
        targets: output file of each case, without its ending.
        ending: file ending of the output.
        cases: input files of each case.
        folders: command-line option of each input -> its folder, or None if it is not given.

    Raises:
        ValueError: two cases have the same output, or an output would lie in an input folder. The message names them.
    """
    first: dict[Path, str] = {}
    inputs = {Path(file).resolve() for files in cases for file in files}
    for target, files in zip(targets, cases, strict=True):
        output = target.with_name(target.name + ending).resolve()
        if output in inputs:
            raise ValueError(f"{output} is an input and would be overwritten: give the output another name or folder.")
        if output in first:
            raise ValueError(
                f"{first[output]} and {files[0]} would both be written to {output}: give one of the cases another name."
            )
        first[output] = files[0]
    outputs = {output.parent for output in first}
    for name, folder in folders.items():
        if folder is not None and Path(folder).resolve() in outputs:
            raise ValueError(
                f"-o and {name} are the same folder, {folder}: choose another -o, where nothing of the input is overwritten."
            )
