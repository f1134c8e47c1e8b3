"""Which map finds the wrong voxels of nnU-Net: its own entropy, or the variance of a denoiser's samples.

AUROC of wrong against right voxels within 5 voxels of a border, mean over the validation cases, on the preprocessed grid.

    python tests/benchmarks/error_ranking.py -m MODEL_FOLDER -f 0 -device cpu --cases 20 --samples 5 --start_steps 100 500
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from model_options import model_parser

from nnunet_diffusion.cli.models import with_validation_cases
from nnunet_diffusion.evaluation.comparison import compare_paired, markdown_table
from nnunet_diffusion.evaluation.uncertainty import auroc, band
from nnunet_diffusion.inference.uncertainty import entropy
from nnunet_diffusion.model import labels


def main() -> None:
    """Measure one model and print the table."""
    parser = model_parser(__doc__)
    add = parser.add_argument
    add("--samples", type=int, default=5)
    add("--steps", type=int, default=1)
    add("--start_steps", type=int, nargs="+", default=[100, 500])
    options = parser.parse_args()
    predictor, found, load = with_validation_cases(
        options.m, [options.f], options, os.environ, samples=options.samples, keep_samples=True
    )
    scores: dict[str, list[float]] = {}
    for name in found[options.f]:
        for kind, score in measure(predictor, load(name), options.start_steps, options.steps).items():
            scores.setdefault(kind, []).append(score)
    nnunet = np.array(scores["nnU-Net's entropy"])
    rows = []
    for kind, values in scores.items():
        compared = compare_paired(np.array(values), nnunet)
        rows.append([kind, f"{np.nanmean(values):.4f}", f"{compared.mean_difference:+.4f}", f"{compared.p_value:.2g}"])
    print(markdown_table(["map", "AUROC", "difference", "Wilcoxon p"], rows))


def measure(predictor: Any, case: Any, start_steps: list[int], steps: int) -> dict[str, float]:
    """Return the AUROC of each map for one case."""
    network, manager, image = predictor.network, predictor.label_manager, torch.from_numpy(case.image)
    regions = network.settings.regions
    if regions:
        raise NotImplementedError("the ranking is of classes, but the labels of this dataset are regions")

    def run(**changes: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean probabilities, and those of each sample (N, K, *volume)."""
        with network.overridden(**changes):
            found = predictor.predict_volume(image)
        each = [labels.activate(logits.float()[None], regions)[0].numpy() for logits in found.samples.values()]
        return labels.activate(found.logits[None], regions)[0].numpy(), np.array(each)

    predictor.keep_samples = False
    nnunet, _ = run(presegmentation_weight=1.0)
    predictor.keep_samples = True
    segmentation = np.asarray(manager.convert_probabilities_to_segmentation(nnunet))
    truth = np.maximum(case.truth, 0)
    near = band(segmentation, truth)
    if manager.has_ignore_label:
        near &= case.truth != manager.ignore_label
    wrong = (segmentation != truth)[near]
    maps = {"nnU-Net's entropy": entropy(torch.from_numpy(nnunet)).numpy()}
    for start_step in start_steps:
        mean, samples = run(presegmentation_weight=0.0, start_step=start_step, steps=min(steps, start_step))
        maps[f"variance of samples, T' = {start_step}"] = samples.var(0).sum(0)
        maps[f"entropy of their mean, T' = {start_step}"] = entropy(torch.from_numpy(mean)).numpy()
    return {kind: auroc(values[near], wrong) for kind, values in maps.items()}


if __name__ == "__main__":
    main()
