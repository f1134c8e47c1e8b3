"""Figures of predicted cases, drawn from the files of `nnunet_diffusion predict --figures`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.evaluation.folders import CasePaths, Classes, classes_of
from nnunet_diffusion.explain.uncertainty_figure import Case, contact_sheet, highest_entropy, uncertainty_figure
from nnunet_diffusion.files import read_dictionary
from nnunet_diffusion.inference.output import CONTACT_SHEET, UNCERTAINTY
from nnunet_diffusion.inference.reading import without_thickness
from nnunet_diffusion.training.checkpoints import write_aside

MOST = 40  # cases on the sheet
SCORE = "mean Dice between the samples"
HEADLINE = f"Least certain first ({SCORE})"
PREDICT = "predict again"
AGAIN = "Free some space, then give the command again with --continue_prediction."


def draw_predictions(
    folder: Path,
    images: Mapping[str, Sequence[str]],
    ending: str,
    reader: Any,
    on_case: Callable[[str], object] = lambda name: None,
) -> Path | None:
    """Draw each case with maps of uncertainty that is not drawn yet, and a sheet of the cases with the lowest scores.

    Args:
        folder: output folder of the prediction, with its dataset.json. The figures go into its folder `uncertainty`.
        images: name of each case -> its image files; other cases in the folder are on the sheet if they are drawn.
        ending: file ending of the segmentations.
        reader: instance of the model's reader of nnU-Net.
        on_case: called with the name of each case when it begins.

    Returns:
        The sheet; None if no case has maps.

    Raises:
        FileNotFoundError: dataset.json is missing.
        ValueError: a file of uncertainty or dataset.json cannot be read.
    """
    description = folder / "dataset.json"
    classes = classes_of(read_dictionary(description, PREDICT, {"labels": dict}), description)
    for name, files in images.items():
        paths = CasePaths(name, folder / f"{name}{ending}", ())
        if not (paths.prediction.is_file() and paths.uncertainty.is_file() and "entropy" in paths.maps()):
            continue  # a case that failed, which the prediction has reported
        figure = paths.uncertainty.with_suffix(".png")
        if figure.is_file() and figure.stat().st_mtime >= paths.uncertainty.stat().st_mtime:
            continue
        on_case(name)
        case = _read(paths, files, classes, reader)
        write_aside(lambda aside, case=case: uncertainty_figure(case, aside), figure, AGAIN)  # type: ignore[misc]
    return _draw_sheet(folder / UNCERTAINTY)


def _numbers(path: Path) -> dict[str, Any]:
    return read_dictionary(path, PREDICT, {"volume_mm3": dict})


def _draw_sheet(folder: Path) -> Path | None:
    """Draw the sheet of a folder's figures; several parts of one prediction may do so, the last one with all cases."""
    scores: dict[Path, float] = {}
    for path in sorted(folder.glob("*.json")):
        if path.with_suffix(".png").is_file():
            score = _numbers(path).get("score")
            scores[path.with_suffix(".png")] = 0.0 if score is None else float(score)
    if not scores:
        return None
    ranked = sorted(scores, key=lambda path: (scores[path], path.name))[:MOST]
    titled = [(f"{path.stem}   {scores[path]:.3f}", path) for path in ranked]
    write_aside(lambda aside: contact_sheet(titled, HEADLINE, aside), folder / CONTACT_SHEET, AGAIN)
    return folder / CONTACT_SHEET


def _read(paths: CasePaths, files: Sequence[str], classes: Classes, reader: Any) -> Case:
    image, properties = reader.read_images(list(files))
    numbers = _numbers(paths.uncertainty)
    score, volumes = numbers.get("score"), numbers["volume_mm3"]
    return Case(
        paths.name if score is None else f"{paths.name}   {SCORE}: {float(score):.3f}",
        image.mean(0),
        reader.read_seg(str(paths.prediction))[0][0],
        reader.read_images([str(paths.maps()["entropy"])])[0][0],
        [reader.read_seg(str(path))[0][0] for path in paths.samples()],
        without_thickness(properties["spacing"]),
        {_with_volume(name, volumes.get(name)): labels for name, labels in classes.labels.items()},
        highest_entropy(len(classes.heads), classes.regions),
    )


def _with_volume(name: str, volume: Mapping[str, Any] | None) -> str:
    """Return the legend of a class, such as `Anterior: mean 1763 mm³ (range of 5 samples: 1095 to 2480)`."""
    if volume is None:
        return name
    mean, low, high = (
        f"{volume[key]:.0f}" if volume[key] >= 100 else f"{volume[key]:.3g}" for key in ("mean", "low", "high")
    )
    return f"{name}: mean {mean} mm³ ({volume['interval']}: {low} to {high})"
