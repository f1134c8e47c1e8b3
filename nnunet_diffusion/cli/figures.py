"""`nnunet_diffusion figures`: models side by side and the reverse process of the same cases, for a publication."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.devices import DEVICES
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.evaluate import evaluated_by, tasks_of
from nnunet_diffusion.cli.folders import refuse_file_as_output
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder, with_drawn_process
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import COMPILE, find_images

COMPARISON, PROCESS = "comparison", "process"
TABLE, NAMED_TABLE = "figures.csv", "named_cases.csv"  # of all cases, and of those of --cases
ENDINGS = ("png", "pdf", "svg")
WIDTH_MM, STEPS = 180.0, 5
MM_PER_INCH = 25.4
SHOWN = 20  # names of cases in a message
MOST_CLASSES = 8  # in the legend of the truth


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `figures` to the command line."""
    parser = subparsers.add_parser(
        "figures",
        help="draw models side by side with their errors, and the reverse process, for a publication",
        description=f"Draws, at print size, {COMPARISON}: image, truth and an error map for each folder of predictions of any "
        f"program (PGDiffSeg, Fig. 9); and, if a trained diffusion model is named (-d or -m), {PROCESS}: its reverse process "
        f"of the same cases (Fig. 13). Without --cases, {TABLE} has the Dice of all cases, and those with the largest gain, "
        "the largest loss and the median difference in Dice between the last and the first -p are drawn; of one -p the best, "
        "the worst and the median. Cases without any foreground are not chosen. Of a volume, the slice is drawn in which the "
        "label maps differ in most voxels. Measured cases are kept in OUT/cases.",
        conflict_handler="resolve",  # here -p names predictions, as in evaluate, and --plans the model's plans
    )
    model = parser.add_argument_group("reverse process")
    add_model_arguments(model)  # a group adds arguments as a parser does
    model.add_argument("-m", metavar="FOLDER", help="model folder, instead of -d, --plans, -tr and -c")
    model.add_argument("--plans", metavar="NAME", help="name of the plans (that of the only trained model)")
    model.add_argument("-f", metavar="FOLD", help="fold (the first that is finished)")
    model.add_argument("-device", default="cuda", choices=DEVICES)
    model.add_argument("--steps", type=int, metavar="N", help=f"steps ({STEPS}, at most T')")
    model.add_argument("--start_step", type=int, metavar="T'", help="T' of the start (the model's)")
    add = parser.add_argument
    add("-i", required=True, metavar="FOLDER", help="images, with channel numbers (_0000)")
    add("-g", required=True, metavar="FOLDER", help="ground truth")
    add(
        "-p",
        action="append",
        required=True,
        metavar="FOLDER",
        help="segmentations; once for each model, the baseline first",
    )
    add("-o", required=True, metavar="FOLDER", help="output folder; created if it does not exist")
    add("--names", nargs="+", metavar="NAME", help="title of each -p (the names of the folders)")
    add("--cases", nargs="+", metavar="CASE", help="cases to draw (chosen by their Dice)")
    add("--axis", type=int, choices=(0, 1, 2), help="axis of a volume along which slices are taken, 0 for z (that with the "
        "largest spacing; the reverse process has its model's)")  # fmt: skip
    add("--width_mm", type=float, default=WIDTH_MM, metavar="MM", help=f"width of the figures ({WIDTH_MM:g})")
    add("--ending", nargs="+", default=ENDINGS[:2], choices=ENDINGS, help="formats (png pdf)")
    add("-djfile", metavar="FILE", help="dataset.json (that in the folders of -p and -g, or above them)")
    add("-l", type=int, nargs="+", metavar="LABEL", help="labels to compare, instead of those of dataset.json")
    add("-np", type=int, help="number of processes (by cores, cases and memory)")
    add("--chill", action="store_true", help="leave out cases without prediction")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draw the figures. Return 0; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, folders that do not go together, a file that cannot be read or written, or a model that
            cannot draw.
    """
    check_options(options)
    model = None
    if any(getattr(options, name) is not None for name in ("d", "m", "tr", "c", "plans", "f", "start_step")):
        model = _model(options)
        # not compiled: a few cases of different sizes
        os.environ.update({**with_trainers(os.environ), COMPILE: "f"})

    def how_far() -> str:
        return "; measured cases are kept, and the same command continues"

    return until_stopped("figures", lambda: _figures(options, model), how_far)


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if a folder does not exist, or an argument is out of range."""
    inputs = [("i", options.i), ("g", options.g), *(("p", folder) for folder in options.p)]
    for name, folder in inputs:
        if not Path(folder).is_dir():
            wrong = (
                "is a file: give the folder that it is in" if Path(folder).exists() else "does not exist: correct it"
            )
            raise CommandError(f"-{name} is {folder}, which {wrong}")
        if Path(options.o).resolve() == Path(folder).resolve():
            raise CommandError(f"-o and -{name} are the same folder, {folder}: choose another -o")
    refuse_file_as_output(options.o)
    if options.names is not None and len(options.names) != len(options.p):
        raise CommandError(
            f"--names has {len(options.names)} names ({', '.join(options.names)}), but -p is given {len(options.p)} times: "
            "give one name for each -p"
        )
    if not 0 < options.width_mm < math.inf:
        raise CommandError(f"--width_mm is {options.width_mm:g}, but must be a number of mm above 0")
    if options.steps is not None and options.steps < 1:
        raise CommandError(f"--steps is {options.steps}, but must be 1 or more")
    if options.np is not None and options.np < 0:
        raise CommandError(f"-np is {options.np}, but must be 0 (no further process) or more")


def _model(options: argparse.Namespace) -> Path:
    try:
        return model_folder(argparse.Namespace(**{**vars(options), "p": options.plans}), os.environ)
    except CommandError as error:  # its messages name the plans as the other commands do
        raise CommandError(str(error).replace(" -p ", " --plans ")) from error


def _figures(options: argparse.Namespace, model: Path | None) -> int:
    predictor = None
    if model is not None:
        fold = options.f or finished_folds(model, options.chk)[0]
        predictor = with_drawn_process(options, model, fold, "figures", STEPS)
    # nnU-Net prints about its variables when it is imported: import it only now
    from nnunet_diffusion.explain.comparison_figure import comparison_figure, process_figure
    from nnunet_diffusion.explain.shown_cases import comparison_row, process_row

    written = {}
    with named_for_the_user(OSError, ValueError, RuntimeError, MemoryError):
        tasks = _tasks_of(options)
        measured = _measured(tasks, options.np)
        dice = [{case: each["dice"] for case, each in numbers.items()} for numbers in measured]
        chosen = _chosen(measured) if options.cases is None else dict.fromkeys(options.cases, "")
        cases = _read_cases(options, tasks, chosen)
        names = options.names or list(tasks)
        rows = [comparison_row(case, [each[case.name] for each in dice], options.axis) for case in cases]
        labels = {case.name: row.label.replace("\n", ", ") for case, row in zip(cases, rows, strict=True)}
        table = TABLE if options.cases is None else NAMED_TABLE
        write_table(Path(options.o) / table, names, dice, labels)
        note = "; Dice of the whole volume" if any(1 not in case.truth.shape for case in cases) else ""
        classes = _legend(next(iter(tasks.values())).classes, rows)
        paths = _paths(options, COMPARISON)
        written[COMPARISON] = comparison_figure(rows, names, paths, options.width_mm, classes, note)
        if predictor is not None:
            process = [process_row(case, predictor) for case in cases]
            written[PROCESS] = process_figure(process, _paths(options, PROCESS), options.width_mm)
    for label, row in zip(labels.values(), rows, strict=True):
        print(f"{label}: Dice " + ", ".join(f"{value:.3f}" for value in row.dice))
    for name, figure in written.items():
        width = figure.get_figwidth() * MM_PER_INCH
        if width > options.width_mm + 0.1:
            print(f"{name} is {width:.0f} mm wide, not {options.width_mm:g}: its texts would overlap")
    print(f"Written to {options.o}: {', '.join([*written, table])}")
    return 0


def _paths(options: argparse.Namespace, name: str) -> list[Path]:
    return [Path(options.o) / f"{name}.{ending}" for ending in dict.fromkeys(options.ending)]


def _tasks_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is measured under the name of each -p: the cases of --cases, or those that all folders have."""
    chill = options.chill or options.cases is not None
    given = argparse.Namespace(**{**vars(options), "chill": chill, "tolerance": None})
    tasks, left_out = tasks_of(given, [Path(folder) for folder in options.p], [Path(options.g)])
    for line in left_out if options.cases is None else ():
        print(f"nnunet_diffusion figures: {line}", file=sys.stderr)
    found = [{case.name: case for case in task.cases} for task in tasks.values()]
    names = [name for name in found[0] if all(name in each for each in found)]
    if not names:
        raise CommandError(f"{', '.join(options.p)} have no case in common: give predictions of the same cases (-p)")
    if options.cases is not None:
        _check_cases(options, found, names)
        names = list(dict.fromkeys(options.cases))
    return {
        name: dataclasses.replace(task, cases=[each[case] for case in names])
        for (name, task), each in zip(tasks.items(), found, strict=True)
    }


def _check_cases(options: argparse.Namespace, found: Sequence[Mapping[str, Any]], there: Sequence[str]) -> None:
    """Raise CommandError if a case of --cases is not in all folders of predictions."""
    for name in options.cases:
        lacking = [folder for folder, cases in zip(options.p, found, strict=True) if name not in cases]
        if len(lacking) == len(found):
            listed = ", ".join(there[:SHOWN]) + (f" ... ({len(there)} in all)" if len(there) > SHOWN else "")
            raise CommandError(f"--cases has {name}, but the cases in all folders (-g and -p) are: {listed}")
        if lacking:
            raise CommandError(f"{lacking[0]} lacks {name}, which --cases names: predict it, or leave it out")


def _measured(tasks: Mapping[str, Any], processes: int | None) -> list[Mapping[str, Any]]:
    """Return what `measure_case` found in each case, for each folder of predictions."""
    evaluated = evaluated_by(dict(tasks), processes)
    failures = [f"{case} of {name}: {why}" for name, each in evaluated.items() for case, why in each.failures.items()]
    if failures:
        others = f" ({len(failures)} cases failed in all)" if len(failures) > 1 else ""
        raise CommandError(f"{failures[0]}{others}")
    return [each.numbers for each in evaluated.values()]


def _chosen(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the cases that are drawn -> why; those without any foreground only if all are."""
    from nnunet_diffusion.explain.shown_cases import choose_cases

    def has_foreground(case: str) -> bool:
        classes = [each for numbers in measured for each in numbers[case]["classes"].values()]
        return any(each["true_mm3"] > 0 or each["predicted_mm3"] > 0 for each in classes)

    names = [case for case in measured[0] if has_foreground(case)] or list(measured[0])
    return choose_cases([{case: numbers[case]["dice"] for case in names} for numbers in measured])


def _read_cases(options: argparse.Namespace, tasks: Mapping[str, Any], chosen: Mapping[str, str]) -> list[Any]:
    from nnunet_diffusion.explain.shown_cases import read_shown_case

    first = next(iter(tasks.values()))
    ending = first.cases[0].prediction.name.removeprefix(first.cases[0].name)
    images = find_images(options.i, ending).cases
    if missing := [name for name in chosen if name not in images]:
        raise CommandError(f"-i is {options.i}, which has no image of {missing[0]}: add {missing[0]}_0000{ending}")
    found = [{case.name: case for case in task.cases} for task in tasks.values()]
    return [
        read_shown_case([each[name] for each in found], why, images[name], first.classes, first.reader)
        for name, why in chosen.items()
    ]


def _legend(classes: Any, rows: Sequence[Any]) -> dict[int, str] | None:
    """Return label -> name of the classes in the drawn truths; None if there is one class, or too many."""
    if classes.regions or len(classes.labels) == 1:
        return None
    there = {int(label) for row in rows for label in set(row.truth.ravel().tolist())}
    named = {label: name for name, labels in classes.labels.items() for label in labels if label in there}
    return named if 0 < len(named) <= MOST_CLASSES else None


def write_table(
    path: Path, names: Sequence[str], dice: Sequence[Mapping[str, float]], shown: Mapping[str, str]
) -> None:
    """Write the mean foreground Dice of all cases, one column per folder, and the labels of those that are drawn.

    Args:
        path: the CSV file.
        names: title of each folder of predictions.
        dice: for each folder, case -> Dice.
        shown: case -> label in the figures.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *names, "last - first", "shown"])
        for case in dice[0]:
            values = [each[case] for each in dice]
            writer.writerow([case, *values, values[-1] - values[0], shown.get(case, "")])
