"""`nnunet_diffusion ensemble`: the mean of several prediction folders, and the uncertainty of their disagreement."""

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


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `ensemble` to the command line."""
    parser = subparsers.add_parser(
        "ensemble",
        help="average prediction folders, such as nnU-Net's five folds, with maps of their disagreement",
        description="Averages the probabilities of several prediction folders as nnUNetv2_ensemble does, for example those of "
        "nnUNetv2_predict -f K --save_probabilities for each fold K, and writes the maps of uncertainty and the numbers of "
        "`predict --uncertainty`, with each folder as a sample. `evaluate` reads the result. Finished cases are not repeated.",
    )
    add = parser.add_argument
    add("-i", nargs="+", required=True, metavar="FOLDER", help="two or more folders with segmentations and .npz")
    add("-o", required=True, metavar="FOLDER", help="output folder; created if it does not exist")
    add("-djfile", metavar="FILE", help="dataset.json (that in the folders of -i, or above them)")
    add("-np", type=int, default=None, help="number of processes (by cores, cases and memory)")
    add("--save_probabilities", action="store_true", help="also write the mean probabilities (.npz)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Average the folders. Return 0; 1 if a case failed; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, or folders that do not go together.
    """
    folders = check_options(options)

    def how_far() -> str:
        return "; finished cases are kept, and the same command continues"

    return until_stopped("ensemble", lambda: _ensemble(options, folders), how_far)


def check_options(options: argparse.Namespace) -> list[Path]:
    """Return the input folders.

    Raises:
        CommandError: there are fewer than two, one does not exist or is given twice or is the output, or an argument is out of
            range.
    """
    folders = [Path(folder) for folder in options.i]
    if len(folders) < 2:
        raise CommandError(f"-i is {folders[0]} alone, but an ensemble has two folders or more: give the others, too")
    for place, folder in enumerate(folders):
        if not folder.is_dir():
            wrong = (
                "is a file: give the folder that it is in" if folder.exists() else "does not exist: correct the path"
            )
            raise CommandError(f"-i has {folder}, which {wrong}")
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise CommandError(f"-i has {folder} twice: give different folders")
        if folder.resolve() == Path(options.o).resolve():
            raise CommandError(f"-o is {options.o}, which is also one of -i: choose another folder for the output")
    refuse_file_as_output(options.o)
    if options.np is not None and options.np < 0:
        raise CommandError(f"-np is {options.np}, but must be 0 (no further process) or more")
    return folders


def _ensemble(options: argparse.Namespace, folders: Sequence[Path]) -> int:
    # nnU-Net prints about its variables when it is imported: import it only now
    from tqdm import tqdm

    from nnunet_diffusion.inference.folds import average_folders, find_cases

    with named_for_the_user(FileNotFoundError, ValueError, OSError, NotImplementedError):
        description = _dataset_json(options.djfile, folders)
        cases = find_cases(folders, description["file_ending"])
        ensemble = _members(options, folders, description, cases)
        with tqdm(total=len(cases), unit="case", disable=None, leave=False) as bar:
            failures = average_folders(ensemble, cases, options.np, lambda case: bar.update())
    print(f"{len(cases) - len(failures)} of {len(cases)} cases are in {options.o}")
    for case, why in failures.items():
        print(f"nnunet_diffusion ensemble: {case} failed: {why}", file=sys.stderr)
    return 1 if failures else 0


def _dataset_json(given: str | None, folders: Sequence[Path]) -> dict[str, Any]:
    from nnunet_diffusion.evaluation.folders import classes_of, find_dataset_json

    path = find_dataset_json(given, folders)
    if path is None:
        raise CommandError("there is no dataset.json in the folders of -i or above them: give it (-djfile)")
    description = read_dictionary(path, "give another one with -djfile", {"labels": dict, "file_ending": str})
    classes_of(description, path)  # raises if nnU-Net does not accept the labels
    return description


def _members(
    options: argparse.Namespace, folders: Sequence[Path], description: dict[str, Any], cases: Sequence[str]
) -> Any:
    from nnunet_diffusion.evaluation.folders import reader_for
    from nnunet_diffusion.inference.folds import Ensemble

    ending = description["file_ending"]
    reader = reader_for(ending, description, [folders[0] / f"{case}{ending}" for case in cases])
    return Ensemble(tuple(folders), Path(options.o), description, reader, options.save_probabilities)
