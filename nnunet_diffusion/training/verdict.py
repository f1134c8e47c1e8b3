"""Comparison of nnU-Net and PD-DDPM on the validation cases at the end of a training, in the log and in a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnunet_diffusion.evaluation.comparison import PairedComparison, compare_paired
from nnunet_diffusion.evaluation.metrics import mean_known
from nnunet_diffusion.files import PRESEGMENTOR_FOLDER, read_dictionary, write_json
from nnunet_diffusion.training.checkpoints import read_checkpoint
from nnunet_diffusion.training.presegmentor import presegmentor_folder
from nnunet_diffusion.training.presegmentor.lock import SUMMARY

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer

COMPARISON = "validation/comparison.json"
SIGNIFICANT = 0.05
FEWEST_CASES = 6  # the exact two-sided Wilcoxon p of 5 pairs is at least 2 / 2^5 = 0.0625
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEMBERS = {
    "PD-DDPM": ("denoiser alone", "nnU-Net alone"),
    "HiDiff": ("refiner alone", "its nnU-Net alone, trained further in turns"),
}
"""What the weights 0 and 1 stand for, by method."""
MEASURE = "Dice, mean over the foreground classes of each case; classes absent from label and segmentation are left out"
HOW_WEIGHTS = "predicted as by `nnunet_diffusion predict`, measured on the preprocessed grid, not on that of the images"


def give_verdict(trainer: DiffusionTrainer) -> None:
    """Log which of the two networks is better on the validation cases and write `validation/comparison.json`.

    Errors are logged as warnings, because training and validation are finished.

    Args:
        trainer: trainer after its validation, with the averaged weights in its network; on rank 0 only.
    """
    log, path = trainer.print_to_log_file, Path(trainer.output_folder) / COMPARISON
    with _warned_about(trainer, "The comparison with nnU-Net"):
        path.unlink(missing_ok=True)  # may be left from an earlier validation
        content = _compare_networks(trainer)
        write_json(content, path)
        log(content["sentence"])
        with _warned_about(trainer, "The comparison of presegmentation_weight"):
            content["presegmentation_weights"] = weights = _compare_weights(trainer, sorted(content["cases"]))
            write_json(content, path)
            log(weights["sentence"])


@contextlib.contextmanager
def _warned_about(trainer: DiffusionTrainer, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        trainer.print_to_log_file(
            f"WARNING: {what} stopped with {type(error).__name__}: {error}. The training is finished and "
            f"{SUMMARY} is not affected."
        )


# the two networks ----------------------------------------------------------------------------------------------------


def _compare_networks(trainer: DiffusionTrainer) -> dict[str, Any]:
    """Return the content of `validation/comparison.json`, without the comparison of weights."""
    ending, ours = trainer.dataset_json["file_ending"], Path(trainer.output_folder) / SUMMARY
    pddpm = dice_of_cases(ours, ending, "validate again with --val")
    try:
        nnunet, reason = _dice_of_presegmentor(trainer, ending), ""
    except (OSError, ValueError) as error:
        nnunet, reason = {}, f"{trainer.settings.method} cannot be compared with nnU-Net: {error}"
    content = comparison_content(nnunet, pddpm, trainer.fold == "all", trainer.settings.method)
    return {**content, "sentence": reason or content["sentence"]}


def _dice_of_presegmentor(trainer: DiffusionTrainer, file_ending: str) -> dict[str, float]:
    """Return the Dice of each case from the validation of the nnU-Net that the model started from.

    Raises:
        OSError: there is no such validation.
        ValueError: its file is damaged, or belongs to a network with other weights.
    """
    folder = presegmentor_folder(trainer)
    cure = (
        f"validate that nnU-Net (or set {PRESEGMENTOR_FOLDER} to its model folder if this training used it), then run this "
        "command with --val"
    )
    found = dice_of_cases(folder / SUMMARY, file_ending, cure)
    if trainer.settings.is_hidiff:  # its segmentor has learned further
        return found
    weights = read_checkpoint(folder / "checkpoint_final.pth")["network_weights"]
    theirs = {key.removeprefix("module."): value for key, value in weights.items()}
    embedded = trainer.segmenter.presegmentor.state_dict()
    same = theirs.keys() == embedded.keys() and all(torch.equal(theirs[key], embedded[key].cpu()) for key in theirs)
    if not same:
        raise ValueError(f"the weights in {folder} are not those in this model (was it trained again?); {cure}")
    return found


def dice_of_cases(summary: Path, file_ending: str, cure: str) -> dict[str, float]:
    """Read the mean Dice of each case from nnU-Net's summary of a validation.

    Args:
        summary: path of the summary.
        file_ending: file ending of the segmentations, such as ".nii.gz".
        cure: what to do if the file cannot be read, as the end of a sentence.

    Returns:
        Case -> mean over the classes that have a Dice; NaN if no class has one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    cases = read_dictionary(summary, cure, {"metric_per_case": list})["metric_per_case"]
    return {
        Path(case["prediction_file"]).name.removesuffix(file_ending): mean_known(
            [metrics["Dice"] for metrics in case["metrics"].values()]
        )
        for case in cases
    }


def comparison_content(
    nnunet: Mapping[str, float],
    pddpm: Mapping[str, float],
    on_training_cases: bool = False,
    method: str = "PD-DDPM",
) -> dict[str, Any]:
    """Compare two networks on the cases that both have and return the content of `validation/comparison.json`.

    Args:
        nnunet: case -> Dice of the pre-segmentor alone.
        pddpm: case -> Dice of this model.
        on_training_cases: whether the cases were used in training, as with fold "all".
        method: name of this model's method; the keys are the same for all.
    """
    cases = sorted(nnunet.keys() & pddpm.keys())
    comparison = compare_paired([pddpm[case] for case in cases], [nnunet[case] for case in cases])
    return {
        "sentence": verdict_sentence(comparison, on_training_cases, method),
        "measure": MEASURE,
        "on_training_cases": on_training_cases,
        "n": comparison.cases,
        "left_out": len(nnunet.keys() | pddpm.keys()) - comparison.cases,
        "nnunet_mean": comparison.baseline_mean,
        "pddpm_mean": comparison.candidate_mean,
        "mean_difference": comparison.mean_difference,
        "interval_95": list(comparison.interval),
        "wilcoxon_p": comparison.p_value,
        "cases": {
            case: {"nnunet": nnunet.get(case), "pddpm": pddpm.get(case)}
            for case in sorted(nnunet.keys() | pddpm.keys())
        },
    }


def verdict_sentence(comparison: PairedComparison, on_training_cases: bool = False, method: str = "PD-DDPM") -> str:
    """Return a sentence that says which network is better; it begins with "WARNING" if it is nnU-Net.

    Args:
        comparison: comparison of this model with nnU-Net as the baseline.
        on_training_cases: whether the cases were used in training, as with fold "all".
        method: name of this model's method.
    """
    if comparison.cases == 0:
        return f"{method} and nnU-Net cannot be compared: no validation case has a Dice for both."
    better, worse = is_better(comparison), _significant(comparison) and comparison.mean_difference < 0
    if better:
        said = f"Verdict: {method} is better than nnU-Net."
    elif worse:
        said = f"WARNING: Verdict: {method} is worse than nnU-Net; predict with nnU-Net's own model."
    else:
        said = f"Verdict: neither {method} nor nnU-Net is shown to be better."
    kind = "training cases (fold all)" if on_training_cases else "validation cases"
    lower, upper = comparison.interval
    figures = (
        f"On {comparison.cases} {kind} the mean Dice is {comparison.baseline_mean:.4f} with nnU-Net alone and "
        f"{comparison.candidate_mean:.4f} with {method} (this model): difference {comparison.mean_difference:+.4f}, 95 % "
        f"interval {lower:+.4f} to {upper:+.4f}, p = {comparison.p_value:.2g} (paired Wilcoxon test)."
    )
    notes = []
    if method == "HiDiff":
        notes.append(
            "HiDiff also trained this nnU-Net further; for a fair comparison train nnU-Net alone for as many additional epochs."
        )
    if comparison.undefined:
        notes.append(f"Number of cases left out because one of the two has no Dice: {comparison.undefined}.")
    if comparison.cases < FEWEST_CASES:
        notes.append(f"With fewer than {FEWEST_CASES} cases, p and the interval are not meaningful.")
    if on_training_cases:
        notes.append("Both networks were trained on these cases, so this result says nothing about new cases.")
    return " ".join([said, figures, *notes])


def is_better(comparison: PairedComparison) -> bool:
    """Return whether the candidate's mean is higher than the baseline's, significantly and on enough cases."""
    return _significant(comparison) and comparison.mean_difference > 0


def _significant(comparison: PairedComparison) -> bool:
    return comparison.cases >= FEWEST_CASES and comparison.p_value < SIGNIFICANT


# the weight of nnU-Net's probabilities -------------------------------------------------------------------------------


def _compare_weights(trainer: DiffusionTrainer, cases: Sequence[str]) -> dict[str, Any]:
    """Predict the cases once more and return the comparison of weights for the file."""
    if trainer.is_ddp:  # the other ranks would wait in a collective call until it times out
        return {"sentence": "Other values of presegmentation_weight are compared on one GPU only: --val -num_gpus 1."}
    # imported here because `inference` imports this package
    from nnunet_diffusion.training.weights import dice_by_weight

    settings = trainer.segmenter.settings
    own, members = settings.presegmentation_weight, MEMBERS[settings.method]
    trainer.print_to_log_file("Predicting the validation cases once more, to compare values of presegmentation_weight.")
    dice = dice_by_weight(trainer, cases, sorted({*WEIGHTS, own}))
    return weights_content(dice, own, str(Path(trainer.output_folder_base) / "plans.json"), members)


def weights_content(
    dice: Mapping[float, Mapping[str, float]], own: float, plans: str, members: Sequence[str] = MEMBERS["PD-DDPM"]
) -> dict[str, Any]:
    """Compare each weight with the model's own and return the section of `validation/comparison.json` about them.

    Args:
        dice: weight -> case -> Dice, with the same cases in the same order.
        own: weight in the model's settings.
        plans: path of the file in which the weight is set.
        members: what the weights 0 and 1 stand for.
    """
    baseline = list(dice[own].values())
    comparisons = {weight: compare_paired(list(cases.values()), baseline) for weight, cases in dice.items()}
    better = [weight for weight, comparison in comparisons.items() if is_better(comparison)]
    best = max(better, key=lambda weight: comparisons[weight].mean_difference, default=None)
    return {
        "sentence": weights_sentence(comparisons, own, best, plans, members),
        "how": HOW_WEIGHTS,
        "own": own,
        "better": best,
        "table": [
            {
                "weight": weight,
                "n": comparison.cases,
                "mean": comparison.candidate_mean,
                "mean_difference": comparison.mean_difference,
                "wilcoxon_p": comparison.p_value,
            }
            for weight, comparison in comparisons.items()
        ],
    }


def weights_sentence(
    comparisons: Mapping[float, PairedComparison],
    own: float,
    best: float | None,
    plans: str,
    members: Sequence[str] = MEMBERS["PD-DDPM"],
) -> str:
    """Return sentences with the mean Dice of each weight and whether another weight is better.

    Args:
        comparisons: weight -> comparison with the model's own weight.
        own: weight in the model's settings.
        best: recommended weight; None if no other is better.
        plans: path of the file in which the weight is set.
        members: what the weights 0 and 1 stand for.
    """
    notes = {0.0: f" ({members[0]})", 1.0: f" ({members[1]})"}
    notes[own] = notes.get(own, "") + " (this model)"
    means = ", ".join(
        f"{comparison.candidate_mean:.4f} at {weight:g}{notes.get(weight, '')}"
        for weight, comparison in comparisons.items()
    )
    figures = f"Mean Dice by presegmentation_weight ({HOW_WEIGHTS}): {means}."
    if best is None:
        return f"{figures} No other weight is significantly better than {own:g}."
    difference, p_value = comparisons[best].mean_difference, comparisons[best].p_value
    return (
        f"{figures} A weight of {best:g}{notes.get(best, '')} is better than this model's {own:g} by {difference:+.4f} "
        f"(p = {p_value:.2g}); to use it, set presegmentation_weight to {best:g} in {plans}. It was chosen on "
        "these cases, so its Dice on them is optimistic."
    )
