"""Evaluation of folders of segmentations, case by case in several processes; finished cases are kept and not repeated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnunet_diffusion import __version__
from nnunet_diffusion.evaluation.case_metrics import measure_case
from nnunet_diffusion.evaluation.folders import CasePaths, Classes, read_case
from nnunet_diffusion.files import write_json
from nnunet_diffusion.inference.cases import run_each
from nnunet_diffusion.inference.staging import not_writable
from nnunet_diffusion.training.checkpoints import write_aside

CASES = "cases"
AGAIN = "Free some space or choose another folder (-o), then give the command again: finished cases are kept."
BYTES_PER_VOXEL = 60  # label maps, masks, and the distances from borders
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One prediction to evaluate.

    Attributes:
        cases: its cases.
        classes: what is compared.
        reader: instance of nnU-Net's reader.
        folder: where the numbers of each case are kept.
        tolerance_mm: of the surface Dice; None for the default.
    """

    cases: Sequence[CasePaths]
    classes: Classes
    reader: Any
    folder: Path
    tolerance_mm: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation gave.

    Attributes:
        numbers: name of each case -> what `measure_case` returned; NaN where the file has null.
        failures: name of each case that failed -> why.
    """

    numbers: dict[str, Numbers]
    failures: dict[str, str]


def evaluate(task: Task, processes: int, on_case: Callable[[str], object] = lambda name: None) -> Evaluated:
    """Measure all cases that are not measured yet. A case that fails does not stop the others.

    Args:
        task: what to evaluate.
        processes: number of further processes; 0 for none.
        on_case: called with the name of each case when it is finished.

    Raises:
        OSError: nothing can be written to the folder.
    """
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(task.folder, error) from error
    numbers: dict[str, Numbers] = {}
    for case in task.cases:
        if (kept := kept_numbers(task, case)) is not None:
            numbers[case.name] = kept
            on_case(case.name)
    jobs = {
        case.name: (task.classes, task.reader, task.folder, task.tolerance_mm, case)
        for case in task.cases
        if case.name not in numbers
    }
    failures = run_each(_measure, jobs, processes, on_case)
    numbers |= {name: read_numbers(task.folder / f"{name}.json") for name in jobs if name not in failures}
    ordered = [case.name for case in task.cases]
    return Evaluated({name: numbers[name] for name in ordered if name in numbers}, failures)


def needed_bytes(case: CasePaths) -> float:
    """Return a rough estimate of the memory of a case, from the headers of its files; 0 if they cannot be read."""
    try:
        image = sitk.ImageFileReader()
        image.SetFileName(str(case.prediction))
        image.ReadImageInformation()
    except RuntimeError:  # reported when the case is read
        return 0
    heads = 0
    unreadable = (OSError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*unreadable), zipfile.ZipFile(case.probabilities) as archive:
        # float32, and the float16 of the file; uncompressed size of its array
        heads = 3 * archive.getinfo("probabilities.npy").file_size
    maps = 4 * len(case.maps())
    return math.prod(image.GetSize()) * (BYTES_PER_VOXEL + maps) + heads


def _measure(classes: Classes, reader: Any, folder: Path, tolerance_mm: float | None, case: CasePaths) -> None:
    """Measure one case and write its numbers, at once or not at all."""
    begun = fingerprint(classes, tolerance_mm, case)
    numbers = measure_case(read_case(case, classes, reader, with_samples=len(case.truths) > 1), classes, tolerance_mm)
    content = {"fingerprint": begun, **numbers}
    write_aside(lambda aside: write_json(content, Path(aside)), folder / f"{case.name}.json", AGAIN)


def fingerprint(classes: Classes, tolerance_mm: float | None, case: CasePaths) -> str:
    """Return a hash of what decides a case's numbers: its files with size and time, classes, tolerance and version."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in case.used()]
    content = repr((files, classes, tolerance_mm, __version__))
    return hashlib.sha256(content.encode()).hexdigest()


def kept_numbers(task: Task, case: CasePaths) -> Numbers | None:
    """Return the numbers of a case if they are there, and of just these files; else None."""
    path = task.folder / f"{case.name}.json"
    if not path.is_file():
        return None
    try:
        found = read_numbers(path)
    except (KeyError, ValueError):  # damaged
        return None
    return found if found.get("fingerprint") == fingerprint(task.classes, task.tolerance_mm, case) else None


def read_numbers(path: Path) -> Numbers:
    """Return the numbers of a case, with NaN for null, and an infinite HD95 where one of truth and prediction is empty."""
    numbers = _with_nan(json.loads(path.read_text(encoding="utf-8")))
    for each in numbers["classes"].values():
        if (each["true_mm3"] > 0) != (each["predicted_mm3"] > 0):
            each["hd95_mm"] = math.inf
    return numbers


def _with_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value
