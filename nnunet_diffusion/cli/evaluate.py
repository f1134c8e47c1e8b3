"""`nnunet_diffusion evaluate`: segmentations and their uncertainty against the ground truth of one or several raters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import refuse_file_as_output
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.files import read_dictionary

FOLDER = "evaluation"
MOST_PREDICTIONS = 2
SHOWN = 5  # names of cases in a message


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate` to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure segmentations, their calibration and uncertainty against the ground truth",
        description="Compares label maps of any program with the ground truth: Dice, surface Dice, HD95; where nnU-Net's .npz "
        "are beside them, calibration; where `predict --uncertainty` wrote its maps, whether they find the errors. Two "
        "predictions (-p twice) are compared. Writes a summary as JSON, a table of all cases as CSV, and a page as HTML. "
        "Finished cases are not repeated.",
    )
    add = parser.add_argument
    add("-p", action="append", required=True, metavar="FOLDER", help="segmentations; give -p twice to compare")
    add("-g", action="append", required=True, metavar="FOLDER", help="ground truth; once for each rater")
    add("-o", metavar="FOLDER", help=f"output folder ({FOLDER} in that of -p; needed for two)")
    add("-djfile", metavar="FILE", help="dataset.json (that in the folders of -p and -g, or above them)")
    add(
        "-l",
        type=int,
        nargs="+",
        metavar="LABEL",
        help="labels to compare, instead of those of dataset.json; without .npz",
    )
    add("-np", type=int, default=None, help="number of processes (by cores, cases and memory)")
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
    from nnunet_diffusion.evaluation.evaluation_files import PAGE, SUMMARY, TABLE, write_evaluation

    with named_for_the_user(FileNotFoundError, ValueError, OSError):
        tasks, left_out = tasks_of(options, predictions, truths)
        for line in left_out:
            print(f"nnunet_diffusion evaluate: {line}", file=sys.stderr)
        evaluated = evaluated_by(tasks, options.np)
        folder = Path(options.o) if options.o else predictions[0] / FOLDER
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
    if len(options.p) > 1 and options.o is None:
        raise CommandError(
            "two predictions (-p) are compared, and either could hold the result: name its folder with -o"
        )
    folders = [Path(folder).resolve() for folder in (*options.p, *options.g)]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise CommandError(f"{folder} is given twice: compare different folders")
    refuse_file_as_output(options.o)
    if options.np is not None and options.np < 0:
        raise CommandError(f"-np is {options.np}, but must be 0 (no further process) or more")
    if options.tolerance is not None and not 0 <= options.tolerance < float("inf"):
        raise CommandError(f"--tolerance is {options.tolerance:g}, but must be a number of mm, 0 or more")
    if options.images is not None and not Path(options.images).is_dir():
        raise CommandError(f"--images is {options.images}, which does not exist")
    return [Path(folder) for folder in options.p], [Path(folder) for folder in options.g]


def _classes(options: argparse.Namespace, folders: Sequence[Path]) -> tuple[Any, dict[str, Any] | None]:
    """Return the classes, and the content of dataset.json; None without one."""
    from nnunet_diffusion.evaluation.folders import classes_of, classes_of_labels, find_dataset_json

    path = find_dataset_json(options.djfile, folders)
    if path is None:
        if options.l is None:
            raise CommandError(
                "there is no dataset.json in the folders of -p and -g or above them: give it (-djfile), or the labels to "
                "compare (-l 1 2 3)"
            )
        return classes_of_labels(options.l), None
    description = read_dictionary(path, "give another one with -djfile", {"labels": dict})
    classes = classes_of(description, path)
    return (classes_of_labels(options.l, classes.ignore) if options.l else classes), description


def tasks_of(
    options: argparse.Namespace, predictions: Sequence[Path], truths: Sequence[Path]
) -> tuple[dict[str, Any], list[str]]:
    """Return what is to be evaluated under the name of each prediction, and what is left out."""
    from nnunet_diffusion.evaluation.evaluate import CASES, Task
    from nnunet_diffusion.evaluation.folders import common_ending, find_cases, reader_for

    classes, description = _classes(options, (*predictions, *truths))
    ending = (description or {}).get("file_ending") or common_ending(truths[0])
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
                shown = ", ".join(cases[:SHOWN]) + (" ..." if len(cases) > SHOWN else "")
                left_out.append(f"{name}: {len(cases)} cases have {what} and are left out: {shown}")
        reader = reader_for(ending, description, [case.truths[0] for case in found.cases])
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


def evaluated_by(tasks: dict[str, Any], processes: int | None) -> dict[str, Any]:
    """Evaluate the tasks of several predictions with a bar; `processes` None: as cores, cases and memory allow."""
    from tqdm import tqdm

    from nnunet_diffusion.evaluation.evaluate import evaluate, needed_bytes
    from nnunet_diffusion.inference.cases import fitting_processes

    cases = sum(len(task.cases) for task in tasks.values())
    if processes is None:
        processes = fitting_processes([needed_bytes(case) for task in tasks.values() for case in task.cases])
    with tqdm(total=cases, unit="case", disable=None, leave=False) as bar:
        return {name: evaluate(task, processes, lambda case: bar.update()) for name, task in tasks.items()}


def images_folder(given: str | None, truths: Sequence[Path]) -> Path | None:
    """Return the folder of the images: the given one, or imagesTr beside labelsTr; None if there is none."""
    if given is not None:
        return Path(given)
    beside = truths[0].resolve()
    folder = beside.with_name(beside.name.replace("labels", "images"))
    return folder if folder != beside and folder.is_dir() else None
