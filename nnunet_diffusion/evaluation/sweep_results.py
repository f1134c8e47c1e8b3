"""What a sweep found: the files of its finished cases, means and variances over seeds, tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_diffusion.evaluation.comparison import markdown_table, number
from nnunet_diffusion.files import read_dictionary, write_json
from nnunet_diffusion.training.checkpoints import write_aside

NOISE, PRESEGMENTATION = "noise", "presegmentation"
CASES, TABLE, SUMMARY = "cases", "sweep.csv", "sweep_summary.csv"
"""Files of the output folder: one of each finished case, the Dice of each case at each point, means and variances."""
CURE = "measure all cases again with --overwrite, or choose another output folder (-o)"
AGAIN = "Free some space or make the folder writable, then give the command again: finished cases are kept."


@dataclass(frozen=True)
class Point:
    """One reverse process.

    Attributes:
        sampler: its name.
        start: NOISE or PRESEGMENTATION.
        start_step: T'.
        steps: evaluations of the denoiser.
        seed: of the noise.
    """

    sampler: str
    start: str
    start_step: int
    steps: int
    seed: int

    def settings(self) -> dict[str, Any]:
        """Return the inference settings of this point."""
        own = dataclasses.asdict(self)
        return {"from_noise": own.pop("start") == NOISE, **own}


NNUNET = Point("nnU-Net", "none", 0, 0, 0)
"""nnU-Net alone, without a reverse process."""
Found = Mapping[str, Mapping[Point, float]]
"""Case -> point -> Dice, each case at the same points."""


@dataclass(frozen=True)
class Summary:
    """The points that differ in their seed only.

    Attributes:
        sampler: as in `Point`.
        start: as in `Point`.
        start_step: T'.
        evaluations: evaluations of the denoiser in one reverse process, the steps of `Point`; 0 for nnU-Net alone.
        mean: mean over the seeds of the mean Dice over cases.
        variance: sample variance (n - 1) over the seeds of the mean Dice over cases; NaN with one seed.
        seeds: number of seeds.
        cases: number of cases.
    """

    sampler: str
    start: str
    start_step: int
    evaluations: int
    mean: float
    variance: float
    seeds: int
    cases: int


def summarise(found: Found) -> list[Summary]:
    """Return mean and variance over seeds, in the order of the points.

    Args:
        found: Dice of at least one case.
    """
    by_process: dict[Point, list[float]] = {}
    for point in next(iter(found.values())):
        over_cases = float(np.mean([dice[point] for dice in found.values()]))
        by_process.setdefault(dataclasses.replace(point, seed=0), []).append(over_cases)
    return [
        Summary(
            process.sampler,
            process.start,
            process.start_step,
            process.steps,
            float(np.mean(means)),
            float(np.var(means, ddof=1)) if len(means) > 1 else math.nan,
            len(means),
            len(found),
        )
        for process, means in by_process.items()
    ]


def markdown(summaries: Sequence[Summary]) -> str:
    """Return a markdown table of mean Dice by start, sampler and number of evaluations.

    Args:
        summaries: of a sweep, nnU-Net's among them.
    """
    nnunet = next(each for each in summaries if each.sampler == NNUNET.sampler)
    denoised = [each for each in summaries if each is not nnunet]
    counts = sorted({each.evaluations for each in denoised})
    rows: dict[tuple[str, int, str], dict[int, float]] = {}
    for each in denoised:
        rows.setdefault((each.start, each.start_step, each.sampler), {})[each.evaluations] = each.mean
    cells = [
        [f"{sampler} from {start}", str(step), *(number(means.get(count, math.nan)) for count in counts)]
        for (start, step, sampler), means in rows.items()
    ]
    table = markdown_table(["sampler", "T'", *map(str, counts)], cells)
    counted = f"cases: {nnunet.cases}, seeds: {denoised[0].seeds}"
    return f"Mean Dice by number of evaluations ({counted}; nnU-Net: {number(nnunet.mean)}):\n\n{table}"


def write_tables(found: Found, summaries: Sequence[Summary], folder: Path) -> None:
    """Write TABLE, with a row for each case at each point, and SUMMARY into a folder; NaN is an empty cell.

    Raises:
        OSError: a file cannot be written.
    """
    head = [each.name for each in dataclasses.fields(Point)]
    rows = [
        [*dataclasses.astuple(point), case, _cell(dice)] for case, own in found.items() for point, dice in own.items()
    ]
    _write_csv([*head, "case", "dice"], rows, folder / TABLE)
    names = {"mean": "mean_dice"}
    head = [names.get(each.name, each.name) for each in dataclasses.fields(Summary)]
    _write_csv(head, [[_cell(value) for value in dataclasses.astuple(each)] for each in summaries], folder / SUMMARY)


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.8g}"


def _write_csv(head: Sequence[str], rows: Sequence[Sequence[Any]], path: Path) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    write_aside(lambda aside: Path(aside).write_text(out.getvalue(), encoding="utf-8"), path, AGAIN)


def write_case(folder: Path, case: str, settings: Mapping[str, Any], dice: Mapping[Point, float]) -> None:
    """Write the file of a finished case; it is complete or absent.

    Args:
        folder: output folder.
        case: name of the case.
        settings: all that determines the Dice.
        dice: point -> Dice.

    Raises:
        OSError: the file cannot be written.
    """
    path = _path_of(folder, case)
    content = {"settings": settings, "points": [{**dataclasses.asdict(point), "dice": dice[point]} for point in dice]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(lambda aside: write_json(content, Path(aside)), path, AGAIN)


def read_cases(folder: Path, cases: Sequence[str], settings: Mapping[str, Any]) -> dict[str, dict[Point, float]]:
    """Read the files of finished cases.

    Args:
        folder: output folder; it need not exist.
        cases: names of the cases of this run.
        settings: all that determines the Dice in this run.

    Returns:
        Case -> point -> Dice, of the cases that are finished.

    Raises:
        ValueError: a file is damaged, or was measured with other settings. The message names it and the cure.
    """
    found = {}
    for case in cases:
        path = _path_of(folder, case)
        if not path.is_file():
            continue
        content = read_dictionary(path, CURE, {"settings": dict, "points": list})
        for key, now in json.loads(json.dumps(settings)).items():
            before = content["settings"].get(key)
            if before != now:
                raise ValueError(f"{path} was measured with {key} {before}, which is {now} now: {CURE}.")
        found[case] = {_point_of(entry): entry["dice"] for entry in content["points"]}
    return found


def _point_of(entry: Mapping[str, Any]) -> Point:
    return Point(**{key: value for key, value in entry.items() if key != "dice"})


def remove_cases(folder: Path, cases: Sequence[str]) -> None:
    """Remove the files of these cases, where there are any.

    Raises:
        OSError: a file cannot be removed.
    """
    for case in cases:
        _path_of(folder, case).unlink(missing_ok=True)


def _path_of(folder: Path, case: str) -> Path:
    return folder / CASES / f"{case}.json"
