"""Files of an evaluation: summary as JSON, a table of all cases, and the page with its pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from nnunet_diffusion import __version__
from nnunet_diffusion.evaluation.case_metrics import ENTROPY
from nnunet_diffusion.evaluation.comparison import markdown_table, number
from nnunet_diffusion.evaluation.evaluate import Numbers, Task
from nnunet_diffusion.evaluation.folders import CasePaths, read_case
from nnunet_diffusion.evaluation.report_page import Picture, page, with_interval
from nnunet_diffusion.evaluation.summary import compare, risks, summarise
from nnunet_diffusion.explain import evaluation_figures as figures
from nnunet_diffusion.explain.uncertainty_figure import highest_entropy
from nnunet_diffusion.files import write_json
from nnunet_diffusion.inference.reading import one_line
from nnunet_diffusion.inference.uncertainty import entropy

SUMMARY, TABLE, PAGE = "evaluation.json", "cases.csv", "report.html"
WORST, BEST = 4, 2
"""Cases on the page."""
FEW_CASES = 10
SHORT = ("AUROC of the entropy", "normalised AURC")


def write_evaluation(
    folder: Path,
    tasks: Mapping[str, Task],
    numbers: Mapping[str, Mapping[str, Numbers]],
    images: Path | None,
    notes: Sequence[str],
) -> str:
    """Write `SUMMARY`, `TABLE` and `PAGE`.

    Args:
        folder: where they are written.
        tasks: name of each prediction -> what was evaluated.
        numbers: name of each prediction -> case -> its numbers; of two predictions only common cases are compared.
        images: folder of the images; None if there is none.
        notes: what was left out, or failed.

    Returns:
        A short table for the terminal.

    Raises:
        ValueError: no case was measured.
    """
    empty = [name for name, each in numbers.items() if not each]
    if empty:
        raise ValueError(f"no case of {empty[0]} could be measured: " + "; ".join(notes))
    summaries = {name: summarise(each) for name, each in numbers.items()}
    comparison = None
    if len(numbers) > 1:
        first, second = numbers.values()
        common = [case for case in first if case in second]
        if not common:
            raise ValueError("the two predictions have no case in common: compare predictions of the same cases")
        comparison = compare({case: first[case] for case in common}, {case: second[case] for case in common})
    notes = [*notes, *remarks(tasks, numbers)]
    folder.mkdir(parents=True, exist_ok=True)
    content = {"version": __version__, "notes": list(notes), "predictions": summaries, "comparison": comparison}
    write_json(content, folder / SUMMARY)
    write_table(folder / TABLE, numbers)
    name, task = next(iter(tasks.items()))
    pictures = case_pictures(task, numbers[name], images)
    (folder / PAGE).write_text(
        page(
            f"Evaluation of {', '.join(numbers)}", summaries, comparison, diagrams(summaries, numbers), pictures, notes
        ),
        encoding="utf-8",
    )
    return overview(summaries)


def overview(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table for the terminal; a column that no prediction has is left out."""
    header = ["prediction", "cases", "mean Dice (95 % interval)", "surface Dice", "ECE", *SHORT]
    rows = []
    for name, each in summaries.items():
        row = [name, str(each["cases"]), with_interval(each["dice"]), number(each["nsd"]["mean"])]
        row.append(number(each["calibration"]["pooled_ece"]) if "calibration" in each else "")
        errors, scores = each.get("errors", {}), each.get("failure_detection", {})
        auroc = (errors.get(ENTROPY) or errors.get("entropy") or {}).get("mean", math.nan)
        aurc = (scores.get("pairwise Dice") or scores.get("confidence") or {}).get("normalised", math.nan)
        row += [number(value) if math.isfinite(value) else "" for value in (auroc, aurc)]
        rows.append(row)
    kept = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return markdown_table([header[place] for place in kept], [[row[place] for place in kept] for row in rows])


def remarks(tasks: Mapping[str, Task], numbers: Mapping[str, Mapping[str, Numbers]]) -> list[str]:
    """Return what a reader of the summary must know: raters, tolerance, missing probabilities, few cases."""
    found = []
    raters = [str(path.parent) for path in next(iter(tasks.values())).cases[0].truths]
    if len(raters) > 1:
        found.append("Raters in this order, the first is the reference: " + ", ".join(raters))
    tolerances = sorted({f"{case['tolerance_mm']:g}" for cases in numbers.values() for case in cases.values()})
    found.append(f"Surface Dice at a tolerance of {', '.join(tolerances)} mm.")
    for name, cases in numbers.items():
        without = sum("calibration" not in case for case in cases.values())
        if 0 < without < len(cases):
            found.append(f"{name}: {without} of {len(cases)} cases have no .npz; calibration is that of the others.")
        if len(cases) < FEW_CASES:
            found.append(
                f"{name}: {len(cases)} cases are too few for intervals, tests and scores of cases to say much."
            )
    return found


def write_table(path: Path, numbers: Mapping[str, Mapping[str, Numbers]]) -> None:
    """Write one row per prediction, case and class; what is not defined is left empty."""
    rows = []
    for prediction, cases in numbers.items():
        for case, found in cases.items():
            of_case = {"case_dice": found["dice"], "case_nsd": found["nsd"]}
            for where in ("band", "box") if "calibration" in found else ():
                of_case |= {f"{key}_{where}": value for key, value in found["calibration"][where].items()}
            of_case |= {f"auroc_{key}": value for key, value in found["errors"].items()}
            of_case |= {f"score_{key}": value for key, value in found["scores"].items()}
            for name, metrics in found["classes"].items():
                of_class = {**metrics, **_single(found.get("raters", {}).get(name, {}))}
                of_class |= found.get("volumes", {}).get(name, {})
                rows.append({"prediction": prediction, "case": case, "class": name, **of_class, **of_case})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.replace(" ", "_") for column in columns])
        writer.writeheader()
        for row in rows:
            writer.writerow({key.replace(" ", "_"): _cell(value) for key, value in row.items()})


def _single(of_raters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers against several raters, one column each."""
    dice = {f"dice_rater_{place}": value for place, value in enumerate(of_raters.get("dice", ()), 1)}
    return dice | {key: value for key, value in of_raters.items() if key != "dice"}


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and not math.isfinite(value) else value


def diagrams(summaries: Mapping[str, Any], numbers: Mapping[str, Mapping[str, Numbers]]) -> list[Picture]:
    """Return the reliability diagram, and for each score risk against coverage and Dice against the score."""
    pictures = []
    reliability = {
        name: each["calibration"]["reliability"]
        for name, each in summaries.items()
        if "calibration" in each and sum(each["calibration"]["reliability"][0])
    }
    if reliability:
        figure = figures.reliability_diagram(reliability)
        pictures.append(Picture("Reliability in the band, all cases together", figures.png(figure)))
    scores = sorted({score for each in summaries.values() for score in each.get("failure_detection", {})})
    for score in scores:
        series = {name: risks(list(cases.values()), score) for name, cases in numbers.items()}
        series = {name: each for name, each in series.items() if len(each[0]) > 1}
        if series:
            curves = figures.png(figures.risk_coverage_figure(series))
            pictures.append(Picture(f"Risk of the most trusted cases by the score {score}", curves))
            pictures.append(Picture(f"Dice against the score {score}", figures.png(figures.score_figure(series))))
    return pictures


def case_pictures(task: Task, numbers: Mapping[str, Numbers], images: Path | None) -> list[Picture]:
    """Return pictures of the cases of lowest Dice and of a few of the highest."""
    ranked = sorted((each["dice"], name) for name, each in numbers.items() if math.isfinite(each["dice"]))
    shown = dict.fromkeys([*ranked[:WORST], *ranked[-BEST:]])
    cases = {case.name: case for case in task.cases}
    return [Picture(f"{name}: Dice {dice:.3f}", _picture(cases[name], task, images)) for dice, name in shown]


def _picture(case: CasePaths, task: Task, images: Path | None) -> bytes:
    arrays = read_case(case, task.classes, task.reader)
    uncertainty = arrays.maps.get("entropy")
    if uncertainty is None and arrays.probabilities is not None:
        uncertainty = entropy(torch.from_numpy(arrays.probabilities), task.classes.regions).numpy()
    prediction, truth = arrays.compared(task.classes)
    image = None if images is None else _image(case, images, task.reader, truth.shape)
    highest = highest_entropy(len(task.classes.heads), task.classes.regions)
    raters = [arrays.compared(task.classes, rater)[1] for rater in range(1, len(arrays.truths))]
    figure = figures.case_figure(image, truth, prediction, uncertainty, arrays.spacing_mm, highest, raters)
    return figures.png(figure)


def _image(case: CasePaths, images: Path, reader: Any, shape: tuple[int, ...]) -> NDArray | None:
    """Return the mean of the channels of a case's first image file; None if it is not there, or not an image of this shape."""
    ending = case.prediction.name.removeprefix(case.name)
    path = images / f"{case.name}_0000{ending}"
    if not path.is_file():
        return None
    try:
        image = reader.read_images([str(path)])[0]
    except Exception as error:  # the exception depends on the reader's library
        print(f"{path} cannot be read, so the picture of {case.name} has no image: {one_line(error)}", flush=True)
        return None
    return image.mean(0) if image.shape[1:] == shape else None
