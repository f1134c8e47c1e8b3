"""Images in a folder, one file per channel, named by nnU-Net's convention: CASE_0000.ENDING, CASE_0001.ENDING and so on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_ENDINGS = (
    ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg", ".dcm",
)  # fmt: skip
"""Endings of image files. Files with other endings, such as nnU-Net's .json, are ignored."""


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
