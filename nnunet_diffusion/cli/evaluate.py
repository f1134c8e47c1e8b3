"""`nnunet_diffusion evaluate`: segmentations and their uncertainty against the ground truth of one or several raters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.files import read_dictionary

FOLDER, SUMMARY, TABLE, PAGE = "evaluation", "evaluation.json", "cases.csv", "report.html"
MOST_PREDICTIONS = 2


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate` to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure segmentations, their calibration and uncertainty against the ground truth",
        description="Compares label maps of any program with the ground truth: Dice, surface Dice, HD95; where nnU-Net's .npz "
        "are beside them, calibration; where `predict --uncertainty` wrote its maps, whether they find the errors. Two "
        f"predictions (-p twice) are compared. Writes {SUMMARY}, {TABLE} and {PAGE}. Finished cases are not repeated.",
    )
    add = parser.add_argument
    add("-p", action="append", required=True, metavar="FOLDER", help="segmentations; give -p twice to compare")
    add("-g", action="append", required=True, metavar="FOLDER", help="ground truth; once for each rater")
    add("-o", metavar="FOLDER", help=f"output folder (FOLDER/{FOLDER} of the first -p)")
    add("-djfile", metavar="FILE", help="dataset.json (that in the folders of -p and -g, or above them)")
    add("-l", type=int, nargs="+", metavar="LABEL", help="labels to compare, instead of those of dataset.json")
    add("-np", type=int, default=None, help="number of processes (by cores and cases)")
    add("--tolerance", type=float, metavar="MM", help="of the surface Dice (1, or the in-plane spacing if larger)")
    add(
        "--images",
        metavar="FOLDER",
        help="images for the pictures of the page (the folder beside labelsTr or labelsTs)",
    )
    add("--chill", action="store_true", help="leave out cases without prediction, as nnUNetv2_evaluate_folder does")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate. Return 0; 1 if a case failed; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, or folders that do not go together.
    """
    predictions, truths = check_options(options)

    def how_far() -> str:
        return "; finished cases are kept, and the same command continues"

    return until_stopped("evaluate", lambda: _evaluate(options, predictions, truths), how_far)


def _evaluate(options: argparse.Namespace, predictions: Sequence[Path], truths: Sequence[Path]) -> int:
    # nnU-Net prints about its variables when it is imported: import it only now
    from nnunet_diffusion.evaluation.evaluation_files import write_evaluation

    with named_for_the_user(FileNotFoundError, ValueError, OSError):
        found = _prepared(options, predictions, truths)
        tasks, left_out = _tasks(options, predictions, truths, *found)
        for line in left_out:
            print(f"nnunet_diffusion evaluate: {line}", file=sys.stderr)
        evaluated = _evaluated(tasks, options.np)
        folder = output_folder(options)
        failures = {f"{name}: {case}": why for name, each in evaluated.items() for case, why in each.failures.items()}
        images = images_folder(options.images, truths)
        notes = [*left_out, *(f"{case} failed: {why}" for case, why in failures.items())]
        print(write_evaluation(folder, tasks, {name: each.numbers for name, each in evaluated.items()}, images, notes))
    print(f"Written to {folder}: {SUMMARY}, {TABLE}, {PAGE}")
    for case, why in failures.items():
        print(f"nnunet_diffusion evaluate: {case} failed: {why}", file=sys.stderr)
    return 1 if failures else 0


def check_options(options: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Return the folders of predictions and truths.

    Raises:
        CommandError: a folder does not exist, is given twice, or an argument is out of range.
    """
    for name in ("p", "g"):
        for folder in getattr(options, name):
            if not Path(folder).is_dir():
                wrong = "is a file: give the folder that it is in" if Path(folder).exists() else "does not exist"
                raise CommandError(f"-{name} is {folder}, which {wrong}")
    if len(options.p) > MOST_PREDICTIONS:
        raise CommandError(f"-p is given {len(options.p)} times, but two predictions are compared at most")
    folders = [Path(folder).resolve() for folder in (*options.p, *options.g)]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise CommandError(f"{folder} is given twice: compare different folders")
    if options.o is not None and Path(options.o).exists() and not Path(options.o).is_dir():
        raise CommandError(f"-o is {options.o}, which is a file: give a folder for the output")
    if options.np is not None and options.np < 0:
        raise CommandError(f"-np is {options.np}, but must be 0 (no further process) or more")
    if options.tolerance is not None and not 0 <= options.tolerance < float("inf"):
        raise CommandError(f"--tolerance is {options.tolerance:g}, but must be a number of mm, 0 or more")
    if options.images is not None and not Path(options.images).is_dir():
        raise CommandError(f"--images is {options.images}, which does not exist")
    return [Path(folder) for folder in options.p], [Path(folder) for folder in options.g]


def _prepared(options: argparse.Namespace, predictions: Sequence[Path], truths: Sequence[Path]) -> tuple[Any, str, Any]:
    """Return the classes, the file ending, and nnU-Net's reader."""
    from nnunet_diffusion.evaluation import folders

    path = folders.find_dataset_json(options.djfile, (*predictions, *truths))
    description = None if path is None else read_dictionary(path, "give another one with -djfile", {"labels": dict})
    if description is None and options.l is None:
        raise CommandError(
            "there is no dataset.json in the folders of -p and -g or above them: give it (-djfile), or the labels to compare "
            "(-l 1 2 3)"
        )
    classes = (
        folders.classes_of_labels(options.l) if options.l else folders.classes_of(description or {}, Path(path or ""))
    )
    ending = (description or {}).get("file_ending") or folders.common_ending(truths[0])
    example = next((each for each in sorted(truths[0].iterdir()) if each.name.endswith(ending)), None)
    if example is None:
        raise CommandError(f"{truths[0]} has no file that ends with {ending}, the file ending of {path}")
    return classes, ending, folders.reader_for(ending, description, example)


def _tasks(
    options: argparse.Namespace,
    predictions: Sequence[Path],
    truths: Sequence[Path],
    classes: Any,
    ending: str,
    reader: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Return what is to be evaluated under the name of each prediction, and what is left out."""
    from nnunet_diffusion.evaluation.evaluate import CASES, Task
    from nnunet_diffusion.evaluation.folders import find_cases

    tasks, left_out = {}, []
    for name, folder in zip(names_of(predictions), predictions, strict=True):
        found = find_cases(folder, truths, ending)
        if found.without_prediction and not options.chill:
            raise CommandError(
                f"{folder} lacks {found.without_prediction[0]}{ending}, which {truths[0]} has ({len(found.without_prediction)} "
                "missing in all): predict it, or leave such cases out with --chill"
            )
        for what, cases in (("no ground truth", found.without_truth), ("no prediction", found.without_prediction)):
            if cases:
                left_out.append(f"{name}: {len(cases)} cases have {what} and are left out: {', '.join(cases[:5])}"
                                f"{' ...' if len(cases) > 5 else ''}")  # fmt: skip
        kept = (Path(options.o) / CASES / name) if options.o else folder / FOLDER / CASES
        tasks[name] = Task(found.cases, classes, reader, kept, options.tolerance)
    return tasks, left_out


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder, with that of the folder above where two are alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [
        f"{folder.resolve().parent.name}_{folder.resolve().name}_{place}" for place, folder in enumerate(folders, 1)
    ]


def _evaluated(tasks: dict[str, Any], processes: int | None) -> dict[str, Any]:
    from tqdm import tqdm

    from nnunet_diffusion.evaluation.evaluate import evaluate
    from nnunet_diffusion.inference.cases import available_cores

    cases = sum(len(task.cases) for task in tasks.values())
    if processes is None:
        processes = min(available_cores(), cases - 1)
    with tqdm(total=cases, unit="case", disable=None, leave=False) as bar:
        return {name: evaluate(task, processes, lambda case: bar.update()) for name, task in tasks.items()}


def output_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the output."""
    return Path(options.o) if options.o else Path(options.p[0]) / FOLDER


def images_folder(given: str | None, truths: Sequence[Path]) -> Path | None:
    """Return the folder of the images: the given one, or imagesTr beside labelsTr; None if there is none."""
    if given is not None:
        return Path(given)
    beside = truths[0].resolve()
    folder = beside.with_name(beside.name.replace("labels", "images"))
    return folder if folder != beside and folder.is_dir() else None
