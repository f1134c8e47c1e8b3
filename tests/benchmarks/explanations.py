"""Where do the flows of a trained denoiser look, what does attention change, and do the maps depend on the weights?

On the validation cases of one fold, with the truth as reference, for one class: share of the heat inside the truth by flow,
stage and step; before and after parameter-shared attention; Dice without each part; and the sanity check of Adebayo et al.
2018, the correlation of the maps with those of the same network with shuffled weights.

    python tests/benchmarks/explanations.py -m MODEL_FOLDER -f 0 -device cpu --cases 20 --start_step 1000 --steps 5
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from model_options import model_parser
from numpy.typing import NDArray

from nnunet_diffusion.cli.models import with_validation_cases
from nnunet_diffusion.evaluation.comparison import compare_paired, markdown_table, number
from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.explain.explanation import (
    Explanation,
    NothingToExplain,
    Question,
    Reverse,
    ablations,
    explain,
    reverse,
    share_inside,
)
from nnunet_diffusion.explain.units import units_of
from nnunet_diffusion.inference.cases import PreparedCase


def main() -> None:
    """Measure one model and print the tables."""
    parser = model_parser(__doc__)
    add = parser.add_argument
    add("--head", type=int, default=1, help="index of the class among the network's outputs")
    add("--start_step", type=int)
    add("--steps", type=int, default=5)
    options = parser.parse_args()
    predictor, names, load = with_validation_cases(
        options.m, [options.f], options, os.environ, start_step=options.start_step, steps=options.steps, samples=1,
        presegmentation_weight=0.0,
    )  # fmt: skip
    question = Question(options.head, f"class {options.head}")
    cases = [load(name) for name in names[options.f]]
    shown = [case for case in cases if (case.truth == options.head).any()]
    found, correlations = [], []
    for number_of_case, case in enumerate(shown):
        other = torch.from_numpy(shown[number_of_case - 1].image)
        try:
            run = reverse(predictor, PreparedCase(case.image, {}, None))
            found.append((explain(run, question, ablations(run, other)), case.truth == options.head))
        except NothingToExplain:
            continue
        correlations.append(shuffled(run, question, found[-1][0], predictor))
    print(
        f"{len(found)} cases of {len(shown)} with the class have a result; weights of attention: {weights(predictor)}"
    )
    print(f"\n{shares(found)}\n{attention(found)}\n{without_parts(found)}\n{sanity(correlations)}")


def weights(predictor: Any) -> str:
    """Return eta of each flow and stage."""
    units = [unit for unit in units_of(predictor.network.denoiser) if unit.attended]
    return ", ".join(f"{unit.flow} {unit.stage}: {unit.eta.item():+.3f}" for unit in units) or "none"


def shuffled(run: Reverse, question: Question, found: Explanation, predictor: Any) -> dict[str, float]:
    """Return the correlation of each flow's maps with those of a denoiser whose weights are shuffled, for the same masks."""
    denoiser, generator = predictor.network.denoiser, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in denoiser.parameters():
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].reshape(weight.shape))
    maps = explain(run, question).heat
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    flows: dict[str, list[float]] = {}
    for key, heat in found.heat.items():
        pair = np.stack([heat.ravel(), maps[key].ravel()])
        if (pair.std(1) > 0).all():
            flows.setdefault(key[0], []).append(float(np.corrcoef(pair)[0, 1]))
    return {flow: float(np.mean(values)) for flow, values in flows.items()}


def shares(found: list[tuple[Explanation, NDArray]]) -> str:
    """Return the mean share of the heat inside the truth, one row per unit, one column per step."""
    steps = [f"T = {timestep + 1}" for timestep in found[0][0].timesteps]
    rows = []
    for key in found[0][0].heat:
        values = [[share_inside(heat, truth) for heat in each.heat[key]] for each, truth in found]
        name = f"{key[0]}, stage {key[1]}" + (", after attention" if key[2] else "")
        rows.append([name, *[number(value, 3) for value in np.nanmean(values, 0)]])
    chance = number(float(np.mean([truth.mean() for _, truth in found])), 3)
    return markdown_table([f"unit (chance: {chance})", *steps], rows)


def attention(found: list[tuple[Explanation, NDArray]]) -> str:
    """Return the mean change of the share by attention at T', with its paired test."""
    rows = []
    for flow, stage, _ in [key for key in found[0][0].heat if key[2]]:
        pair = [
            np.array([share_inside(each.heat[flow, stage, after][0], truth) for each, truth in found])
            for after in (True, False)
        ]
        compared = compare_paired(*pair)
        low, high = compared.interval
        rows.append(
            [
                f"{flow}, stage {stage}",
                f"{compared.mean_difference:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{compared.p_value:.2g}",
            ]
        )
    return (
        markdown_table(["share after attention minus before, at T'", "mean", "95 % interval", "Wilcoxon p"], rows)
        if rows
        else ""
    )


def without_parts(found: list[tuple[Explanation, NDArray]]) -> str:
    """Return Dice of the result, of nnU-Net, and without each part; and Dice of these with the result."""
    masks = [{"nnU-Net": each.presegmentation, "result": each.result, **each.ablations} for each, _ in found]
    rows = []
    for name in masks[0]:
        of_truth = np.mean(
            [np.nan_to_num(dice(mask[name], truth)) for mask, (_, truth) in zip(masks, found, strict=True)]
        )
        of_result = np.mean([np.nan_to_num(dice(mask[name], mask["result"])) for mask in masks])
        rows.append([name, number(float(of_truth)), number(float(of_result))])
    return markdown_table(["result", "Dice with the truth", "Dice with the result"], rows)


def sanity(correlations: list[dict[str, float]]) -> str:
    """Return the mean correlation of each flow's maps with those of shuffled weights."""
    flows = list(dict.fromkeys(flow for each in correlations for flow in each))
    rows = [[flow, number(float(np.mean([each[flow] for each in correlations if flow in each])), 2)] for flow in flows]
    return markdown_table(["flow", "correlation with the maps of shuffled weights"], rows)


if __name__ == "__main__":
    main()
