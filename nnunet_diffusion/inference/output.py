"""Files of a predicted case: written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
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

UNFINISHED = ".unfinished_"
FOREIGN_SECONDS = 86400.0
SAMPLES, REPORTS = "samples", "reports"
Managers = tuple[PlansManager, ConfigurationManager, dict[str, Any]]
"""Plans, configuration and dataset.json of a model."""


@dataclass(frozen=True, eq=False)
class PredictedCase:
    """A prediction on the network's grid and what describes it.

    Attributes:
        name: of the case.
        target: output file without its ending; None to return the result.
        logits: (K, *volume) of the mean probabilities.
        decision: logits whose decision is the segmentation; None where it is that of `logits`.
        properties: of the preprocessed image.
        samples: name -> logits of each sample that is kept.
        report: JSON-ready.
    """

    name: str
    target: str | None
    logits: NDArray
    decision: NDArray | None
    properties: dict[str, Any]
    samples: Mapping[str, NDArray] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def write_case(case: PredictedCase, managers: Managers, save_probabilities: bool) -> Any:
    """Resample a case to its image and write its files, or return what nnU-Net's predictor returns.

    Files are made in a folder of their own and renamed, the segmentation last: where it is, all others are.

    Args:
        case: the prediction.
        managers: of the model.
        save_probabilities: also write (or return) the mean probabilities.

    Returns:
        None if files were written, else the segmentation (*image), with `save_probabilities` a pair with the probabilities
        (K, *image).

    Raises:
        OSError: a file cannot be written; names it and the cure.
    """
    if case.target is None:
        return _converted(case, managers, save_probabilities)
    target = Path(case.target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{UNFINISHED}{os.getpid()}_{socket.gethostname()}_"
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            _write_all(case, stage, managers, save_probabilities)
            made = [path for path in stage.rglob("*") if path.is_file()]
            segmentation = stage / f"{case.name}{managers[2]['file_ending']}"
            for path in sorted(made, key=lambda each: each == segmentation):
                place = target.parent / path.relative_to(stage)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"The prediction of {case.name} could not be written to {target.parent}: {error}. Free some space or make the "
            "folder writable, then run again with --continue_prediction."
        ) from error
    return None


def _write_all(case: PredictedCase, stage: Path, managers: Managers, save_probabilities: bool) -> None:
    plans_manager, configuration_manager, dataset_json = managers

    def export(logits: NDArray, folder: Path, probabilities: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        export_prediction_from_logits(
            logits, case.properties, configuration_manager, plans_manager, dataset_json, str(folder / case.name),
            probabilities,
        )  # fmt: skip

    export(case.logits, stage, save_probabilities)
    if case.decision is not None:
        export(case.decision, stage)  # over the segmentation of the mean, beside its probabilities
    for name, logits in case.samples.items():
        export(logits.astype(np.float32), stage / SAMPLES / name)
    (stage / REPORTS).mkdir()
    (stage / REPORTS / f"{case.name}.json").write_text(json.dumps(case.report, indent=2) + "\n")


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


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left half made in an output folder, but nothing that another run is still making."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Whether the process that its name tells has ended; on another machine, whether it is a day old."""
    process, _, rest = path.name.removeprefix(UNFINISHED).partition("_")
    try:
        # elsewhere than on POSIX, signal 0 is no question
        if os.name != "posix" or not (process.isdigit() and rest.startswith(f"{socket.gethostname()}_")):
            return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
        os.kill(int(process), 0)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, ProcessLookupError)
    except FileNotFoundError:  # renamed or removed meanwhile
        return False
    return False
