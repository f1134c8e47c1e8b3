"""Figures of predicted cases, drawn from the files of `nnunet_diffusion predict --figures`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.evaluation.folders import CasePaths
from nnunet_diffusion.explain.uncertainty_figure import Case, contact_sheet, uncertainty_figure
from nnunet_diffusion.files import read_dictionary
from nnunet_diffusion.inference.output import UNCERTAINTY
from nnunet_diffusion.inference.reading import without_thickness

SHEET = "contact_sheet.png"


def draw_predictions(
    folder: Path,
    images: Mapping[str, Sequence[str]],
    ending: str,
    reader: Any,
    on_case: Callable[[str], object] = lambda name: None,
) -> Path | None:
    """Draw each case with maps of uncertainty, and a sheet of all, the lowest score first.

    Args:
        folder: output folder of the prediction. The figures go into its folder `uncertainty`.
        images: name of each case -> its image files.
        ending: file ending of the segmentations.
        reader: instance of the model's reader of nnU-Net.
        on_case: called with the name of each case when it begins.

    Returns:
        The sheet; None if no case has maps.

    Raises:
        ValueError: a file of uncertainty cannot be read.
    """
    scores: dict[str, float] = {}
    for name, files in images.items():
        paths = CasePaths(name, folder / f"{name}{ending}", ())
        if not (paths.prediction.is_file() and paths.uncertainty.is_file() and "entropy" in paths.maps()):
            continue  # a case that failed, which the prediction has reported
        on_case(name)
        numbers = read_dictionary(paths.uncertainty, "predict again", {"volume_mm3": dict})
        scores[name] = 0.0 if numbers.get("score") is None else float(numbers["score"])
        uncertainty_figure(_read(paths, files, numbers, reader), _figure(folder, name))
    if not scores:
        return None
    ranked = sorted(scores, key=lambda name: (scores[name], name))
    sheet = folder / UNCERTAINTY / SHEET
    contact_sheet([(f"{name}: score {scores[name]:.3f}", _figure(folder, name)) for name in ranked], sheet)
    return sheet


def _figure(folder: Path, name: str) -> Path:
    return folder / UNCERTAINTY / f"{name}.png"


def _read(paths: CasePaths, files: Sequence[str], numbers: Mapping[str, Any], reader: Any) -> Case:
    image, properties = reader.read_images(list(files))
    volumes = [
        f"{name} {each['mean']:.4g} mm³ ({each['low']:.4g} to {each['high']:.4g})"
        for name, each in numbers["volume_mm3"].items()
    ]
    return Case(
        paths.name,
        image.mean(0),
        reader.read_seg(str(paths.prediction))[0][0],
        reader.read_images([str(paths.maps()["entropy"])])[0][0],
        [reader.read_seg(str(path))[0][0] for path in paths.samples()],
        without_thickness(properties["spacing"]),
        "   ".join([f"score {float(numbers['score']):.3f}" if numbers.get("score") is not None else "", *volumes]),
    )
