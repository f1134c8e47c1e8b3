"""Choice of a model's inference settings by its validation cases: T', steps, the pre-segmentation's weight, presence.

The weight 1 is among the choices: nnU-Net alone, without a reverse process. What is cheaper is preferred to what is better
by less than one standard error, so that the reverse process has to be worth its cost (Breiman et al. 1984, section 3.4.3).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.comparison import PairedComparison, compare_paired, comparison_table, markdown_table
from nnunet_diffusion.evaluation.diagnostic import START_STEPS
from nnunet_diffusion.evaluation.metrics import dice, mean_known
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase, class_masks
from nnunet_diffusion.inference.fusion import absent, leave_out
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.model import labels

STEPS = (1, 2, 5)
WEIGHTS = (0.0, 0.25, 0.5, 0.75)
THRESHOLDS = (0.0, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Of presence; those above 0 are choices only where some choice finds a class that a case does not have."""
SHOWN = 8


@dataclass(frozen=True)
class Choice:
    """Inference settings that are chosen together; with weight 1 there is no reverse process.

    Attributes:
        steps: evaluations of the reverse process; 0 without one.
        start_step: T'; 0 without a reverse process.
        presegmentation_weight: weight of nnU-Net's probabilities.
        presence_threshold: largest probability below which a class is left out.
    """

    steps: int
    start_step: int
    presegmentation_weight: float
    presence_threshold: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Return the entries of the plans' `inference` section; T' and steps of before stay without a reverse process."""
        own = dataclasses.asdict(self) | {"from_noise": False}
        return {key: value for key, value in own.items() if self.steps or key not in ("steps", "start_step")}

    def __str__(self) -> str:
        """Describe the choice in words."""
        text = f"T' = {self.start_step}, steps {self.steps}, weight of nnU-Net {self.presegmentation_weight:g}"
        threshold = f", presence from {self.presence_threshold:g}" if self.presence_threshold else ""
        return (text if self.steps else "nnU-Net alone") + threshold


NNUNET = Choice(0, 0, 1.0)
Scores = Mapping[Choice, NDArray[np.float64]]
"""Mean Dice of each case, (N,), at each choice."""


@dataclass(frozen=True)
class Found:
    """One case at one choice.

    Attributes:
        dice: mean Dice of its classes; 1 where neither truth nor segmentation has a foreground.
        missed: classes that only the truth has.
        false_alarms: classes that only the segmentation has.
    """

    dice: float
    missed: int
    false_alarms: int


@dataclass
class Tuning:
    """What was measured and chosen.

    Attributes:
        cases: names of the cases, N.
        found: choice -> what was found in each case, in their order.
        chosen: by all cases.
        before: the model's own settings, with the samples asked for.
        unseen: the tuned settings against nnU-Net, against the model's own settings, and where thresholds were tried against
            nnU-Net with the best of them, each case measured at what was chosen by the other half of the cases.
    """

    cases: list[str]
    found: dict[Choice, list[Found]]
    chosen: Choice
    before: Choice
    unseen: dict[str, PairedComparison]

    def tables(self) -> str:
        """Return two markdown tables: the best choices, and what tuning gives on cases that it did not see."""
        scores = scores_of(self.found)
        ranked = sorted(scores, key=lambda choice: -scores[choice].mean())
        shown = [*ranked[:SHOWN], *(each for each in (self.chosen, self.before, NNUNET) if each not in ranked[:SHOWN])]
        names = {self.chosen: " (chosen)", self.before: " (before)"}
        rows = [
            [
                f"{choice}{names.get(choice, '')}",
                f"{scores[choice].mean():.4f}",
                *(str(sum(getattr(each, key) for each in self.found[choice])) for key in ("missed", "false_alarms")),
            ]
            for choice in dict.fromkeys(shown)
        ]
        return (
            f"Mean Dice of {len(self.cases)} validation cases, the best of {len(scores)} choices:\n\n"
            f"{markdown_table(['settings', 'Dice', 'classes missed', 'false alarms'], rows)}\n"
            "Tuned settings on the half of the cases that did not choose them, against:\n\n"
            f"{comparison_table(self.unseen)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of the tuning's JSON file."""
        return {
            "cases": self.cases,
            "chosen": dataclasses.asdict(self.chosen),
            "before": dataclasses.asdict(self.before),
            "unseen": {name: dataclasses.asdict(found) for name, found in self.unseen.items()},
            "found": [
                {**dataclasses.asdict(choice), "cases": [dataclasses.asdict(each) for each in found]}
                for choice, found in self.found.items()
            ],
        }


def tune(
    predictor_of: Mapping[str, DiffusionPredictor],
    cases: Sequence[tuple[str, str]],
    load: Callable[[str], PreprocessedCase],
    start_steps: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    weights: Sequence[float] = WEIGHTS,
    on_case: Callable[[str], object] = lambda name: None,
) -> Tuning:
    """Measure all choices on the validation cases of a model's folds, and choose.

    Args:
        predictor_of: fold -> predictor with that fold of the model.
        cases: (fold, name) of at least four cases, each of a fold that was not trained on it.
        load: returns a case of that name.
        start_steps: values of T'; those above the model's `max_train_step` are left out. None for `START_STEPS` and that one.
        steps: numbers of steps; those above T' are left out. None for `STEPS`.
        weights: weights of nnU-Net's probabilities below 1.
        on_case: called with the name of each case when it begins.

    Raises:
        NotImplementedError: the model starts from pure noise.
        ValueError: fewer than four cases, or no T' within `max_train_step`.
    """
    settings = next(iter(predictor_of.values())).network.settings
    if settings.from_noise:
        raise NotImplementedError(
            "Tuning chooses the start from nnU-Net's segmentation, but this model starts from pure noise "
            "(diffusion.inference.from_noise in its plans.json): set that to false, and start_step to a T', first."
        )
    limit, own = settings.max_train_step, settings.start_step
    asked = {*START_STEPS, limit, own} if start_steps is None else {*start_steps, own}
    grid = [
        (count, step)
        for step in sorted(asked)
        for count in sorted({*(STEPS if steps is None else steps), settings.steps})
        if count <= step <= limit
    ]
    if len(cases) < 4 or len(grid) == 0:
        raise ValueError(
            f"Tuning got {len(cases)} cases and start steps {sorted(asked)}. It needs at least four cases, and a start step "
            f"from 1 to the model's max_train_step, {limit}."
        )
    weight, threshold = settings.presegmentation_weight, settings.presence_threshold
    every, thresholds = sorted({*weights, weight} - {1.0}), sorted({*THRESHOLDS, threshold})
    found: dict[Choice, list[Found]] = {}
    for fold, name in cases:
        on_case(name)
        for choice, one in measure(predictor_of[fold], load(name), grid, every, thresholds).items():
            found.setdefault(choice, []).append(one)
    if not any(each.false_alarms for one in found.values() for each in one):
        # without a false alarm a threshold can only miss
        found = {choice: one for choice, one in found.items() if choice.presence_threshold in (0.0, threshold)}
    scores = scores_of(found)
    before = Choice(0, 0, 1.0, threshold) if weight == 1 else Choice(settings.steps, own, weight, threshold)
    return Tuning([name for _, name in cases], found, choose(scores), before, on_unseen_cases(scores, before))


def scores_of(found: Mapping[Choice, Sequence[Found]]) -> dict[Choice, NDArray[np.float64]]:
    """Return the mean Dice of each case, (N,), at each choice."""
    return {choice: np.array([each.dice for each in one]) for choice, one in found.items()}


def measure(
    predictor: DiffusionPredictor,
    case: PreprocessedCase,
    grid: Sequence[tuple[int, int]],
    weights: Sequence[float],
    thresholds: Sequence[float] = (0.0,),
) -> dict[Choice, Found]:
    """Return what is found in one case at each choice.

    Args:
        predictor: predictor of a fold that was not trained on the case.
        case: the case.
        grid: steps and T' of the reverse processes, which start from nnU-Net's output.
        weights: weights of nnU-Net's probabilities below 1.
        thresholds: of presence.
    """
    network, manager, data = predictor.network, predictor.label_manager, torch.from_numpy(case.image)
    regions = network.settings.regions

    def probabilities(given: Presegmentation | None = None, **changes: Any) -> torch.Tensor:
        with network.overridden(from_noise=False, presence_threshold=0.0, **changes):
            return labels.activate(predictor.predict_volume(data, given).logits[None], regions)[0]

    scores: dict[Choice, Found] = {}

    def score(choice: Choice, mean: torch.Tensor) -> None:
        known: dict[tuple[bool, ...], Found] = {}  # most thresholds leave out the same classes
        for threshold in thresholds:
            classes = absent(mean, threshold, regions)
            key = tuple(classes.tolist())
            if key not in known:
                kept = leave_out(mean, classes) if any(key) else mean
                segmentation = np.asarray(manager.convert_probabilities_to_segmentation(kept))
                known[key] = found_in(segmentation, case.truth, manager)
            scores[dataclasses.replace(choice, presence_threshold=threshold)] = known[key]

    nnunet = probabilities(presegmentation_weight=1.0)
    score(NNUNET, nnunet)
    given = Presegmentation(nnunet.numpy(), True, "tuning")
    for steps, start_step in grid:
        denoised = probabilities(given, start_step=start_step, steps=steps, presegmentation_weight=0.0)
        for weight in weights:
            score(Choice(steps, start_step, weight), torch.lerp(denoised, nnunet, weight))
    return scores


def found_in(segmentation: NDArray, truth: NDArray, manager: LabelManager) -> Found:
    """Compare a label map with the truth, both (*volume), as `mean_dice` does."""
    pairs = list(class_masks(segmentation, truth, manager))
    mean = mean_known([dice(ours, theirs) for ours, theirs in pairs])
    there = [(bool(ours.any()), bool(theirs.any())) for ours, theirs in pairs]
    return Found(1.0 if math.isnan(mean) else mean, there.count((False, True)), there.count((True, False)))


def choose(scores: Scores) -> Choice:
    """Return the cheapest choice that is worse than the best by at most one standard error of their paired difference.

    Cheap means few evaluations of the denoiser, then no threshold, which can miss what is there; among the rest it is the best.
    """
    best = max(scores, key=lambda choice: (scores[choice].mean(), -choice.steps))

    def close(choice: Choice) -> bool:
        difference = scores[best] - scores[choice]
        return bool(difference.mean() <= difference.std(ddof=1) / math.sqrt(len(difference)))

    def cost(choice: Choice) -> tuple[float, ...]:
        return choice.steps, choice.presence_threshold > 0, -scores[choice].mean()

    return min((choice for choice in scores if close(choice)), key=cost)


def on_unseen_cases(scores: Scores, before: Choice) -> dict[str, PairedComparison]:
    """Compare tuned settings with nnU-Net and with the settings before, each half of the cases at the other half's choice."""

    def unseen(scores: Scores) -> NDArray[np.float64]:
        tuned = np.empty(len(scores[NNUNET]))
        for half in (slice(0, None, 2), slice(1, None, 2)):
            other = slice(1 - half.start, None, 2)
            chosen = choose({choice: dice[other] for choice, dice in scores.items()})
            tuned[half] = scores[chosen][half]
        return tuned

    tuned = unseen(scores)
    found = {
        name: compare_paired(tuned, scores[choice])
        for name, choice in (("nnU-Net", NNUNET), ("the settings before", before))
    }
    nnunet = {choice: dice for choice, dice in scores.items() if not choice.steps}
    if len(nnunet) > 1:
        found["nnU-Net with a tuned presence threshold"] = compare_paired(tuned, unseen(nnunet))
    return found


def with_fold(predictor: DiffusionPredictor, place: int) -> DiffusionPredictor:
    """Return a predictor of one of the folds that a predictor has loaded, at a place in its list."""
    alone = copy.copy(predictor)
    alone.folds, alone.list_of_parameters = [predictor.folds[place]], [predictor.list_of_parameters[place]]
    return alone
