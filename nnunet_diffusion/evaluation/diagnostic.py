"""What a trained denoiser does with its start: is the noisy state copied, used or ignored, and which parts matter.

From each of four starts one step is taken at several T'. A denoiser that copies its state returns the start, however wrong;
one that ignores it returns the same from every start (unless the start is also an input of the condition flow, by
`condition_on_presegmentation`). Then parts of the denoiser are switched off, one at a time. Neither network is mirrored.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.evaluation.metrics import mean_known
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase, mean_dice
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import Presegmentation, one_hot
from nnunet_diffusion.model import labels
from nnunet_diffusion.networks.hidiff import HiDiffRefiner

START_STEPS = (50, 100, 300, 500, 700)
"""Default values of T'; the model's largest, `max_train_step`, is added."""
TRUTH, NNUNET, EMPTY, OTHER = "truth", "nnU-Net", "empty", "mask of another image"
OTHER_IMAGE = "image of another case"


@dataclass(frozen=True)
class Ablation:
    """Effect of switching off one part of the denoiser, in one step from nnU-Net's output at the model's own T'.

    Attributes:
        change: mean absolute change of the probabilities over voxels that are foreground in the truth or in either result.
        largest: largest change of a probability.
        dice: mean Dice without the part.
    """

    change: float
    largest: float
    dice: float


@dataclass
class Diagnostic:
    """Mean Dice over cases on the preprocessed grid.

    Attributes:
        model: trainer, plans, configuration, checkpoint and folds.
        cases: names of the cases.
        nnunet: mean Dice of the embedded nnU-Net.
        start_step: T' of the ablations.
        intact: mean Dice of one step from nnU-Net's output at that T', without ablation.
        snr: T' -> signal-to-noise ratio of the start.
        dice: start -> T' -> mean Dice after one step.
        ablations: part -> effect of switching it off.
    """

    model: dict[str, Any]
    cases: list[str]
    nnunet: float
    start_step: int
    intact: float
    snr: dict[int, float]
    dice: dict[str, dict[int, float]]
    ablations: dict[str, Ablation] = field(default_factory=dict)

    def tables(self) -> str:
        """Return two markdown tables: starts and ablations."""
        steps = list(self.snr)
        head = ["start", *(f"T' = {step} (SNR {self.snr[step]:.2g})" for step in steps)]
        rows = [[start, *(f"{self.dice[start][step]:.4f}" for step in steps)] for start in self.dice]
        parts = [["none", "-", "-", f"{self.intact:.4f}"]] + [
            [name, f"{found.change:.4f}", f"{found.largest:.4f}", f"{found.dice:.4f}"]
            for name, found in self.ablations.items()
        ]
        return (
            f"Mean Dice after one step, by start and T' ({len(self.cases)} cases; nnU-Net {self.nnunet:.4f}; nothing is "
            f"mirrored):\n\n"
            f"{markdown_table(head, rows)}\n"
            f"Parts switched off, one step from nnU-Net's output at T' = {self.start_step}; change of probabilities in voxels "
            f"of foreground:\n\n{markdown_table(['off', 'mean change', 'largest change', 'Dice'], parts)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of the diagnostic's JSON file."""
        return dataclasses.asdict(self)


def diagnose(
    predictor: DiffusionPredictor,
    cases: Sequence[str],
    load: Callable[[str], PreprocessedCase],
    start_steps: Sequence[int] | None = None,
    on_case: Callable[[str], object] = lambda name: None,
) -> Diagnostic:
    """Measure what a model's denoiser does with its start.

    Args:
        predictor: predictor with a loaded model of one fold.
        cases: names of at least two cases that the model was not trained on.
        load: returns a case of that name.
        start_steps: values of T'; those above the model's `max_train_step` are left out. None for `START_STEPS` and that one,
            with HiDiff for that one alone.
        on_case: called with the name of each case when it begins.

    Raises:
        ValueError: fewer than two cases, no T' within `max_train_step`, or with HiDiff another T'.
    """
    # a mirrored nnU-Net beside a denoiser that is not mirrored would have an advantage (0.006 Dice on Hippocampus 2d)
    predictor = copy.copy(predictor)
    predictor.use_mirroring = False
    settings, limit = predictor.network.settings, predictor.network.settings.max_train_step
    every = (limit,) if settings.is_hidiff else (*START_STEPS, limit)
    asked = every if start_steps is None else start_steps
    if settings.is_hidiff and set(asked) != {limit}:
        raise ValueError(
            f"HiDiff always starts after all {limit} noising steps: leave out the start steps {list(asked)}."
        )
    steps = sorted({step for step in asked if 1 <= step <= limit})
    if len(cases) < 2 or not steps:
        raise ValueError(
            f"The diagnostic got {len(cases)} cases and start steps {list(asked)}. It needs at least two cases, and a "
            f"start step from 1 to the model's max_train_step, {limit}."
        )
    own_step = settings.start_step
    found: dict[Any, list[float]] = {}
    changes: dict[str, list[tuple[float, float]]] = {}
    for name, following in zip(cases, [*cases[1:], cases[0]], strict=True):
        on_case(name)
        measured = _OneCase(predictor, load(name), load(following))
        found.setdefault(NNUNET, []).append(measured.dice_of(measured.nnunet))
        for kind, start in measured.starts().items():
            for step in steps:
                found.setdefault((kind, step), []).append(measured.dice_of(measured.step(start, step)))
        intact = measured.step(measured.nnunet, own_step)
        found.setdefault("intact", []).append(measured.dice_of(intact))
        for part, without in measured.ablated(own_step):
            changes.setdefault(part, []).append(measured.change(intact, without))
            found.setdefault(part, []).append(measured.dice_of(without))
    schedule = predictor.network.process.schedule
    return Diagnostic(
        {**predictor.identity, "folds": predictor.folds},
        list(cases),
        mean_known(found[NNUNET]),
        own_step,
        mean_known(found["intact"]),
        {step: float(schedule.snr[step - 1]) for step in steps},
        {
            name: {step: mean_known(found[name, step]) for step in steps}
            for name in (TRUTH, NNUNET, EMPTY, OTHER)
        },
        {
            name: Ablation(
                mean_known([mean for mean, _ in values]), max(largest for _, largest in values), mean_known(found[name])
            )
            for name, values in changes.items()
        },
    )  # fmt: skip


class _OneCase:
    """One case: its starts, one step from each, and the step without parts of the denoiser."""

    def __init__(self, predictor: DiffusionPredictor, case: PreprocessedCase, other: PreprocessedCase) -> None:
        self.predictor, self.case = predictor, case
        self.manager, self.regions = predictor.label_manager, predictor.network.settings.regions
        shape = case.truth.shape
        self.other_truth = fitted(other.truth[None], shape)[0]
        self.other_image = fitted(other.image, shape)
        with predictor.network.overridden(presegmentation_weight=1.0):
            logits = predictor.predict_volume(torch.from_numpy(case.image)).logits
        self.nnunet = labels.activate(logits[None], self.regions)[0]

    def starts(self) -> dict[str, Tensor]:
        """Return the probabilities (K, *volume) of each start."""
        return {
            TRUTH: self._probabilities(self.case.truth),
            NNUNET: self.nnunet,
            EMPTY: self._probabilities(np.zeros_like(self.case.truth)),
            OTHER: self._probabilities(self.other_truth),
        }

    def _probabilities(self, label_map: NDArray) -> Tensor:
        known = label_map.clip(min=0)
        if self.manager.has_ignore_label:
            known = np.where(known == self.manager.ignore_label, 0, known)
        return torch.from_numpy(one_hot(known, self.manager))

    def step(self, start: Tensor, start_step: int, image: NDArray | None = None) -> Tensor:
        """Return the probabilities (K, *volume) of one step from a start at T'."""
        given = Presegmentation(start.numpy(), True, "diagnostic")
        data = torch.from_numpy(self.case.image if image is None else image)
        one_step = {"start_step": start_step, "steps": 1, "samples": 1, "from_noise": False}
        with self.predictor.network.overridden(**one_step, presegmentation_weight=0.0):
            logits = self.predictor.predict_volume(data, given).logits
        return labels.activate(logits[None], self.regions)[0]

    def ablated(self, start_step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each part and the probabilities of the step without it."""
        for name, off in ablations(self.predictor.network.denoiser).items():
            with off():
                yield name, self.step(self.nnunet, start_step)
        yield OTHER_IMAGE, self.step(self.nnunet, start_step, self.other_image)

    def dice_of(self, probabilities: Tensor) -> float:
        """Return the mean Dice of the segmentation that probabilities (K, *volume) give."""
        segmentation = self.manager.convert_probabilities_to_segmentation(probabilities)
        return mean_dice(np.asarray(segmentation), self.case.truth, self.manager)

    def change(self, intact: Tensor, without: Tensor) -> tuple[float, float]:
        """Return mean and largest absolute change of probabilities in voxels of foreground; NaN and the largest without."""
        found = [np.asarray(self.manager.convert_probabilities_to_segmentation(each)) for each in (intact, without)]
        lesion = (self.case.truth > 0) & (self.case.truth != self.manager.ignore_label)
        where = torch.from_numpy((found[0] > 0) | (found[1] > 0) | lesion)
        difference = (intact - without).abs()
        mean = difference[:, where].mean().item() if bool(where.any()) else float("nan")
        return mean, difference.max().item()


def fitted(array: NDArray, shape: Sequence[int]) -> NDArray:
    """Crop or pad with zeros an array (C, *any) around its centre to (C, *shape)."""
    for axis, size in enumerate(shape, start=1):
        have = array.shape[axis]
        begin = max((have - size) // 2, 0)
        array = np.take(array, range(begin, begin + min(size, have)), axis)
        before = (size - array.shape[axis]) // 2
        widths = [(0, 0)] * array.ndim
        widths[axis] = (before, size - array.shape[axis] - before)
        array = np.pad(array, widths)
    return array


def ablations(denoiser: nn.Module) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """Return the parts of a denoiser that can be switched off: name -> context manager that does so."""
    found: dict[str, Callable[[], contextlib.AbstractContextManager]] = {}
    prior, attention, bottleneck = (getattr(denoiser, name, None) for name in ("prior", "attention", "bottleneck"))
    if isinstance(prior, nn.Module):
        found["prior branch"] = lambda: _output_replaced([prior], _without_guidance)
    if isinstance(attention, nn.ModuleDict) and len(attention):
        found["parameter-shared attention"] = lambda: _output_replaced(
            list(attention.values()), lambda given, output: given[0]
        )
    if isinstance(denoiser, HiDiffRefiner):
        found["attention to the segmentor"] = lambda: _output_replaced([denoiser.exchange], lambda given, _: given[0])
    if isinstance(bottleneck, nn.Module):
        found["bottleneck"] = lambda: _output_replaced([bottleneck], lambda given, output: torch.zeros_like(output))
    return found


def _without_guidance(given: tuple, output: Any) -> Any:
    # zero features, and a location map that says nowhere
    return dataclasses.replace(
        output,
        features=torch.zeros_like(output.features),
        location_logits=torch.full_like(output.location_logits, -20.0),
    )


@contextlib.contextmanager
def _output_replaced(modules: Sequence[nn.Module], change: Callable[[tuple, Any], Any]) -> Iterator[None]:
    """Replace the modules' outputs inside a `with` block."""
    handles = [module.register_forward_hook(lambda _, given, output: change(given, output)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
