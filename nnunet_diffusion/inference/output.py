"""Writing the files of a predicted case, either all or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_diffusion.files import write_json
from nnunet_diffusion.inference.maps import map_ending, to_image, writer_of
from nnunet_diffusion.inference.uncertainty import AGREEMENT, MAPS

SAMPLES, REPORTS, UNCERTAINTY = "samples", "reports", "uncertainty"
CONTACT_SHEET = "contact_sheet.png"
"""Picture of all cases in `UNCERTAINTY`."""
Managers = tuple[PlansManager, ConfigurationManager, dict[str, Any]]
"""Plans, configuration and dataset.json of a model."""


@dataclass(frozen=True, eq=False)
class PredictedCase:
    """A prediction on the network's grid, with its metadata.

    Attributes:
        name: name of the case.
        target: output file without its ending; None to return the result.
        logits: logits of the mean probabilities, (K, *volume).
        decision: logits that give the segmentation; None if `logits` do.
        properties: properties of the preprocessed image.
        samples: name -> logits of each kept sample.
        report: content of the report, JSON-serialisable.
        maps: name -> map of uncertainty, (*volume).
        numbers: what is written beside the maps, JSON-serialisable.
    """

    name: str
    target: str | None
    logits: NDArray
    decision: NDArray | None
    properties: dict[str, Any]
    samples: Mapping[str, NDArray] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[str, NDArray] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


def mask_of(target: str | Path, ending: str) -> Path:
    """Return the path of a case's segmentation; `target` is this path without the file ending."""
    return Path(f"{target}{ending}")


def report_of(target: str | Path) -> Path:
    """Return the path of a case's report."""
    return Path(target).parent / REPORTS / f"{Path(target).name}.json"


def map_of(target: str | Path, name: str, ending: str) -> Path:
    """Return the path of a case's map of uncertainty; `ending` is that of its segmentation."""
    return Path(target).parent / UNCERTAINTY / f"{Path(target).name}_{name}{map_ending(ending)}"


def numbers_file_of(target: str | Path) -> Path:
    """Return the path of the numbers beside a case's maps of uncertainty."""
    return Path(target).parent / UNCERTAINTY / f"{Path(target).name}.json"


def remove_case(target: str | Path, ending: str) -> None:
    """Remove all files of a case. The segmentation is removed first, because a case without it does not count as finished.

    Args:
        target: path of the segmentation without its file ending.
        ending: of the segmentation.
    """
    target = Path(target)
    mask = mask_of(target, ending)
    maps = [map_of(target, name, ending) for name in MAPS]
    figure = numbers_file_of(target).with_suffix(".png")
    others = (Path(f"{target}.npz"), Path(f"{target}.pkl"), report_of(target), numbers_file_of(target), figure, *maps)
    for path in (mask, *others):
        path.unlink(missing_ok=True)
    # it has pictures of this case as it was
    (target.parent / UNCERTAINTY / CONTACT_SHEET).unlink(missing_ok=True)
    _remove_if_empty(target.parent / UNCERTAINTY)
    samples = target.parent / SAMPLES
    for folder in samples.iterdir() if samples.is_dir() else ():
        if folder.is_dir():
            (folder / mask.name).unlink(missing_ok=True)
            _remove_if_empty(folder)
    _remove_if_empty(samples)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        with contextlib.suppress(OSError):  # another run may have written a sample to it meanwhile
            folder.rmdir()


def write_case(case: PredictedCase, managers: Managers, save_probabilities: bool, stages: Mapping[Path, Path]) -> Any:
    """Resample a case to its image and write its files, or return the same result as nnU-Net's predictor.

    Files are written to a staging folder and renamed, the segmentation last. So if the segmentation exists, all other files
    do, and a case that fails has no files.

    Args:
        case: the prediction.
        managers: of the model.
        save_probabilities: also write (or return) the mean probabilities.
        stages: output folder -> staging folder of this run in it, see `staging_folders`.

    Returns:
        None if files were written, else the segmentation (*image), with `save_probabilities` a pair with the probabilities
        (K, *image).

    Raises:
        OSError: a file cannot be written. The message names it and what to do.
    """
    if case.target is None:
        return _converted(case, managers, save_probabilities)
    ending = managers[2]["file_ending"]
    with written_at_once(Path(case.target), ending, stages, "run again with --continue_prediction") as stage:
        _write_all(case, stage, managers, save_probabilities)
    return None


@contextlib.contextmanager
def written_at_once(target: Path, ending: str, stages: Mapping[Path, Path], again: str) -> Iterator[Path]:
    """Provide a folder for the files of a case in a `with` block, after which they are moved to the output folder.

    Args:
        target: path of the segmentation without its file ending.
        ending: of the segmentation, which is moved last.
        stages: as for `write_case`.
        again: how to continue, for the error message.

    Raises:
        OSError: a file cannot be written. The message names it and what to do.
    """
    try:
        stage = stages[target.parent] / target.name
        stage.mkdir(exist_ok=True)  # it exists if a process was killed while it wrote this case
        try:
            yield stage
            _publish(stage, target, ending)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"{target}{ending} could not be written ({error.strerror or error}): free some space or make the folder writable, "
            f"then {again}"
        ) from error


def _publish(stage: Path, target: Path, ending: str) -> None:
    """Move all files of a case to the output folder; files are synced to disk before they are renamed, folders afterwards."""
    mask = stage / mask_of(target, ending).name
    others = [path for path in stage.rglob("*") if path.is_file() and path != mask]
    for path in (*others, mask):
        _to_disk(path)
    try:
        for path in others:
            _rename(path, target.parent / path.relative_to(stage))
        for folder in {path.parent for path in others}:
            _to_disk(target.parent / folder.relative_to(stage))
        _rename(mask, target.parent / mask.name)
        _to_disk(target.parent)
    except BaseException:  # also if a signal ends the run: a case is written completely or not at all
        remove_case(target, ending)
        raise


def _rename(path: Path, place: Path) -> None:
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(path, place)
            return
        except FileNotFoundError:  # another run removed the folder because it was empty
            if not path.is_file():
                raise


def _to_disk(path: Path) -> None:
    """Sync a file or folder to disk."""
    if os.name != "posix":  # other systems can neither open folders nor sync files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(case: PredictedCase, stage: Path, managers: Managers, save_probabilities: bool) -> None:
    plans_manager, configuration_manager, dataset_json = managers

    def export(logits: NDArray, folder: Path, probabilities: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        export_prediction_from_logits(
            logits, case.properties, configuration_manager, plans_manager, dataset_json, str(folder / stage.name),
            probabilities,
        )  # fmt: skip

    export(case.logits, stage, save_probabilities)
    if case.decision is not None:
        export(case.decision, stage)  # replaces the segmentation of the mean and keeps its probabilities
    for name, logits in case.samples.items():
        export(logits.astype(np.float32), stage / SAMPLES / name)
    if case.maps:
        _write_uncertainty(case, stage / stage.name, managers)
    (stage / REPORTS).mkdir()
    (stage / REPORTS / f"{stage.name}.json").write_text(json.dumps(case.report, indent=2) + "\n")


def _write_uncertainty(case: PredictedCase, target: Path, managers: Managers) -> None:
    plans_manager, configuration_manager, dataset_json = managers
    write = writer_of(plans_manager.image_reader_writer_class)
    numbers_file_of(target).parent.mkdir(exist_ok=True)
    for name, values in case.maps.items():
        # all members agree on the background that was cropped away
        outside = 1.0 if name == AGREEMENT else 0.0
        image = to_image(values, outside, case.properties, plans_manager, configuration_manager)
        write(image, map_of(target, name, dataset_json["file_ending"]), case.properties)
    write_json(case.numbers, numbers_file_of(target))


def _converted(case: PredictedCase, managers: Managers, save_probabilities: bool) -> Any:
    plans_manager, configuration_manager, dataset_json = managers
    label_manager = plans_manager.get_label_manager(dataset_json)

    def convert(logits: NDArray, probabilities: bool) -> Any:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans_manager, configuration_manager, label_manager, case.properties, probabilities
        )

    if case.decision is None:
        return convert(case.logits, save_probabilities)
    segmentation = convert(case.decision, False)
    return (segmentation, convert(case.logits, True)[1]) if save_probabilities else segmentation
