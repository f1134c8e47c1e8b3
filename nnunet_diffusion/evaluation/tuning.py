"""Choice of a model's inference settings by its validation cases: T', steps and the weight of the pre-segmentation.

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
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.comparison import PairedComparison, compare_paired, comparison_table, markdown_table
from nnunet_diffusion.evaluation.diagnostic import START_STEPS
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase, mean_dice
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.model import labels

STEPS = (1, 2, 5)
WEIGHTS = (0.0, 0.25, 0.5, 0.75)
SHOWN = 8


@dataclass(frozen=True)
class Choice:
    """Inference settings that are chosen together; with weight 1 there is no reverse process.

    Attributes:
        steps: evaluations of the reverse process; 0 without one.
        start_step: T'; 0 without a reverse process.
        presegmentation_weight: weight of nnU-Net's probabilities.
    """

    steps: int
    start_step: int
    presegmentation_weight: float

    def settings(self) -> dict[str, Any]:
        """Return the entries of the plans' `inference` section; T' and steps of before stay without a reverse process."""
        weight = {"presegmentation_weight": self.presegmentation_weight, "from_noise": False}
        return weight if self == NNUNET else {**weight, "start_step": self.start_step, "steps": self.steps}

    def __str__(self) -> str:
        """Describe the choice in words."""
        if self == NNUNET:
            return "nnU-Net alone"
        return f"T' = {self.start_step}, steps {self.steps}, weight of nnU-Net {self.presegmentation_weight:g}"


NNUNET = Choice(0, 0, 1.0)
Scores = Mapping[Choice, NDArray[np.float64]]
"""Mean Dice of each case, (N,), at each choice."""


@dataclass
class Tuning:
    """What was measured and chosen.

    Attributes:
        cases: names of the cases, N.
        scores: choice -> mean Dice of each case, in their order.
        chosen: by all cases.
        before: the model's own settings, with the samples asked for.
        unseen: the tuned settings against nnU-Net, and against the model's own settings, each case measured at what was
            chosen by the other half of the cases.
    """

    cases: list[str]
    scores: dict[Choice, NDArray[np.float64]]
    chosen: Choice
    before: Choice
    unseen: dict[str, PairedComparison]

    def tables(self) -> str:
        """Return two markdown tables: the best choices, and what tuning gives on cases that it did not see."""
        ranked = sorted(self.scores, key=lambda choice: -self.scores[choice].mean())
        shown = [*ranked[:SHOWN], *(each for each in (self.chosen, self.before, NNUNET) if each not in ranked[:SHOWN])]
        names = {self.chosen: " (chosen)", self.before: " (before)"}
        rows = [
            [f"{choice}{names.get(choice, '')}", f"{self.scores[choice].mean():.4f}"] for choice in dict.fromkeys(shown)
        ]
        return (
            f"Mean Dice of {len(self.cases)} validation cases, the best of {len(self.scores)} choices:\n\n"
            f"{markdown_table(['settings', 'Dice'], rows)}\n"
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
            "scores": [{**dataclasses.asdict(choice), "dice": list(dice)} for choice, dice in self.scores.items()],
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
    every = sorted({*weights, settings.presegmentation_weight} - {1.0})
    found: dict[Choice, list[float]] = {}
    for fold, name in cases:
        on_case(name)
        for choice, dice in measure(predictor_of[fold], load(name), grid, every).items():
            found.setdefault(choice, []).append(dice)
    scores = {choice: np.array(dice) for choice, dice in found.items()}
    weight = settings.presegmentation_weight
    before = NNUNET if weight == 1 else Choice(settings.steps, own, weight)
    return Tuning([name for _, name in cases], scores, choose(scores), before, on_unseen_cases(scores, before))


def measure(
    predictor: DiffusionPredictor,
    case: PreprocessedCase,
    grid: Sequence[tuple[int, int]],
    weights: Sequence[float],
) -> dict[Choice, float]:
    """Return the mean Dice of one case at each choice; 1 where neither truth nor segmentation has a foreground.

    Args:
        predictor: predictor of a fold that was not trained on the case.
        case: the case.
        grid: steps and T' of the reverse processes, which start from nnU-Net's output.
        weights: weights of nnU-Net's probabilities below 1.
    """
    network, manager, data = predictor.network, predictor.label_manager, torch.from_numpy(case.image)
    regions = network.settings.regions

    def probabilities(given: Presegmentation | None = None, **changes: Any) -> torch.Tensor:
        with network.overridden(from_noise=False, **changes):
            return labels.activate(predictor.predict_volume(data, given).logits[None], regions)[0]

    def score(found: torch.Tensor) -> float:
        segmentation = np.asarray(manager.convert_probabilities_to_segmentation(found))
        dice = mean_dice(segmentation, case.truth, manager)
        return 1.0 if math.isnan(dice) else dice

    nnunet = probabilities(presegmentation_weight=1.0)
    scores = {NNUNET: score(nnunet)}
    given = Presegmentation(nnunet.numpy(), True, "tuning")
    for steps, start_step in grid:
        denoised = probabilities(given, start_step=start_step, steps=steps, presegmentation_weight=0.0)
        for weight in weights:
            scores[Choice(steps, start_step, weight)] = score(torch.lerp(denoised, nnunet, weight))
    return scores


def choose(scores: Scores) -> Choice:
    """Return the cheapest choice that is worse than the best by at most one standard error of their paired difference.

    Among choices with as many evaluations it is the best. Cheap means few evaluations of the denoiser.
    """
    best = max(scores, key=lambda choice: (scores[choice].mean(), -choice.steps))

    def close(choice: Choice) -> bool:
        difference = scores[best] - scores[choice]
        return bool(difference.mean() <= difference.std(ddof=1) / math.sqrt(len(difference)))

    return min((choice for choice in scores if close(choice)), key=lambda each: (each.steps, -scores[each].mean()))


def on_unseen_cases(scores: Scores, before: Choice) -> dict[str, PairedComparison]:
    """Compare tuned settings with nnU-Net and with the settings before, each half of the cases at the other half's choice."""
    tuned = np.empty(len(scores[NNUNET]))
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - half.start, None, 2)
        chosen = choose({choice: dice[other] for choice, dice in scores.items()})
        tuned[half] = scores[chosen][half]
    against = {"nnU-Net": NNUNET, "the settings before": before}
    return {name: compare_paired(tuned, scores[choice]) for name, choice in against.items()}


def with_fold(predictor: DiffusionPredictor, place: int) -> DiffusionPredictor:
    """Return a predictor of one of the folds that a predictor has loaded, at a place in its list."""
    alone = copy.copy(predictor)
    alone.folds, alone.list_of_parameters = [predictor.folds[place]], [predictor.list_of_parameters[place]]
    return alone
