"""Dice against the number of network evaluations, for each sampler, start and seed (PGDiffSeg Fig. 10 and 11).

The denoiser is measured by itself: one sample, without nnU-Net's share in the result and without a presence threshold. A
sampler evaluates the network once in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_diffusion.diffusion.solvers import SOLVERS
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase
from nnunet_diffusion.evaluation.sweep_results import (
    NNUNET,
    NOISE,
    PRESEGMENTATION,
    Point,
    read_cases,
    remove_cases,
    write_case,
)
from nnunet_diffusion.evaluation.tuning import found_in
from nnunet_diffusion.inference.finished import hash_of_weights
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.inference.progress import Progress
from nnunet_diffusion.inference.staging import not_writable
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.settings import DiffusionSettings

ALONE: Mapping[str, Any] = {"samples": 1, "presegmentation_weight": 0.0, "presence_threshold": 0.0}
"""Inference settings of every point."""


@dataclass(frozen=True)
class Plan:
    """What a sweep measures.

    Attributes:
        points: of each case.
        left_out: what was asked for but cannot be measured, and why; one sentence each.
    """

    points: list[Point]
    left_out: list[str]

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser in all points of a case."""
        return sum(point.steps for point in self.points)


def points(
    settings: DiffusionSettings,
    samplers: Sequence[str],
    steps: Sequence[int],
    starts: Sequence[str],
    seeds: Sequence[int],
    start_step: int | None = None,
) -> Plan:
    """List the points of a sweep, without those that a model does not allow.

    Args:
        settings: of the model.
        samplers: names of samplers. Those of diffusers are left out if it is not installed, and with HiDiff.
        steps: numbers of steps, 1 or more; those above T' of a start are left out.
        starts: NOISE (T' is then T) and PRESEGMENTATION. Noise is left out with HiDiff, and where training drew no timesteps
            up to T.
        seeds: seeds of the noise.
        start_step: T' of PRESEGMENTATION; None for the model's.

    Raises:
        ValueError: T' is out of range or not known, or no point is left.
    """
    every = dict.fromkeys(starts, settings.timesteps)
    if PRESEGMENTATION in every:
        every[PRESEGMENTATION] = _checked_start_step(settings, start_step)
    reasons = {f"sampler {name}": _why_not_sampler(settings, name) for name in samplers}
    reasons |= {f"start {start}": _why_not_start(settings, start) for start in starts}
    allowed = {start: limit for start, limit in every.items() if not reasons[f"start {start}"]}
    for start, limit in allowed.items():
        if above := sorted({count for count in steps if count > limit}):
            reasons[f"steps {', '.join(map(str, above))} from {start}"] = f"more than T' = {limit}"
    found = [
        Point(sampler, start, limit, count, seed)
        for start, limit in allowed.items()
        for sampler in dict.fromkeys(samplers)
        if not reasons[f"sampler {sampler}"]
        for count in sorted(set(steps))
        if count <= limit
        for seed in seeds
    ]
    left_out = [f"{what}: {why}" for what, why in reasons.items() if why]
    if not found:
        raise ValueError(f"Nothing is left to measure. Left out: {'; '.join(left_out)}.")
    return Plan(found, left_out)


def _checked_start_step(settings: DiffusionSettings, given: int | None) -> int:
    if given is None:
        if settings.from_noise:
            raise ValueError(
                "This model starts from pure noise, so its plans name no T' for a start from nnU-Net's segmentation: give "
                f"--start_step, or leave that start out with --starts {NOISE}."
            )
        return settings.start_step
    if settings.is_hidiff and given != settings.timesteps:
        raise ValueError(
            f"start_step is {given}, but HiDiff always starts after all {settings.timesteps} noising steps: leave it out."
        )
    if not 1 <= given <= settings.max_train_step:
        raise ValueError(
            f"start_step is {given}, but must be 1 to the model's max_train_step, {settings.max_train_step}."
        )
    return given


def _why_not_sampler(settings: DiffusionSettings, name: str) -> str:
    if name not in SOLVERS:
        return ""
    if settings.is_hidiff:
        return "for Gaussian processes only, and HiDiff's is a Bernoulli process"
    return "" if find_spec("diffusers") else "needs diffusers: pip install diffusers"


def _why_not_start(settings: DiffusionSettings, start: str) -> str:
    if start != NOISE:
        return ""
    if settings.is_hidiff:
        return "HiDiff always starts from a draw of nnU-Net's probabilities"
    if settings.max_train_step < settings.timesteps:
        return (
            f"the denoiser was trained up to T' = {settings.max_train_step} of {settings.timesteps} noising steps only"
        )
    return ""


def measure(predictor: DiffusionPredictor, case: PreprocessedCase, points: Sequence[Point]) -> dict[Point, float]:
    """Return the Dice of one case at each point, and at NNUNET.

    nnU-Net is evaluated once, mirrored as in prediction; every reverse process starts from this result or sees it as the
    model's own pre-segmentation.

    Args:
        predictor: predictor with a loaded model of one fold, which was not trained on the case.
        case: the case.
        points: to measure.

    Returns:
        Point -> mean Dice of the classes in truth or segmentation, 0..1; 1 where neither has a foreground.

    Raises:
        ImportError: a point's sampler needs diffusers, which is not installed.
        ValueError: a point contradicts the model's settings.
    """
    network, manager, data = predictor.network, predictor.label_manager, torch.from_numpy(case.image)
    regions = network.settings.regions

    def probabilities(given: Presegmentation | None = None, **changes: Any) -> torch.Tensor:
        with network.overridden(**{**ALONE, **changes}):
            return labels.activate(predictor.predict_volume(data, given).logits[None], regions)[0]

    def dice_of(mean: torch.Tensor) -> float:
        return found_in(np.asarray(manager.convert_probabilities_to_segmentation(mean)), case.truth, manager).dice

    nnunet = probabilities(presegmentation_weight=1.0)
    given = Presegmentation(nnunet.numpy(), True, "sweep")
    return {NNUNET: dice_of(nnunet)} | {point: dice_of(probabilities(given, **point.settings())) for point in points}


def sweep(
    predictor: DiffusionPredictor,
    cases: Sequence[str],
    load: Callable[[str], PreprocessedCase],
    points: Sequence[Point],
    folder: Path,
    overwrite: bool = False,
) -> dict[str, dict[Point, float]]:
    """Measure cases, and keep each finished one in a file of its own; those that have one already are read.

    It shows a bar over the cases in a terminal, otherwise one line for each.

    Args:
        predictor: predictor with a loaded model of one fold.
        cases: names of the cases, which the model was not trained on.
        load: returns a case of that name.
        points: to measure in each case.
        folder: output folder; created if it does not exist.
        overwrite: measure finished cases again.

    Returns:
        Case -> point -> Dice, as `measure`; in the order of `cases`.

    Raises:
        ImportError: as `measure`.
        OSError: nothing can be written to the folder.
        ValueError: as `measure`, or a finished case was measured with other settings.
    """
    settings = deciding_settings(predictor, points)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder, error) from error
    if overwrite:
        remove_cases(folder, cases)
    found = read_cases(folder, cases, settings)
    left = [name for name in cases if name not in found]
    if found:
        print(f"{len(found)} of {len(cases)} cases are finished already", flush=True)
    if not left:
        return found
    progress = Progress(len(left), bar=True)
    try:
        for name in left:
            found[name] = measure(predictor, load(name), points)
            write_case(folder, name, settings, found[name])
            progress.count(name, "")
    finally:
        progress.close()
    return {name: found[name] for name in cases}


def deciding_settings(predictor: DiffusionPredictor, points: Sequence[Point]) -> dict[str, Any]:
    """Return all that determines what is measured in a case, JSON-serialisable.

    Args:
        predictor: predictor with a loaded model of one fold.
        points: of the sweep.
    """
    values = {key: sorted({getattr(point, key) for point in points}) for key in ("sampler", "steps", "seed")}
    return {
        **predictor.identity,
        "folds": predictor.folds,
        "weights_sha256": [hash_of_weights(weights) for weights in predictor.list_of_parameters],
        "eta": predictor.network.settings.eta,
        "draw": predictor.network.settings.draw,
        "mirrored_presegmentation": bool(predictor.use_mirroring and predictor.allowed_mirroring_axes),
        "start_steps": {point.start: point.start_step for point in points},
        **values,
    }
