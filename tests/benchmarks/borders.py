r"""Measure the jumps across tile borders of a trained model and of the nnU-Net it starts from, at stock inference.

    python tests/benchmarks/borders.py --model RESULTS/Dataset004_Hippocampus/DiffusionTrainer_10epochs__P__3d_fullres \
        --dataset DATA/Dataset004_Hippocampus --cases 10 --device cpu

Prints, for nnU-Net and PD-DDPM, the mean jump (sum over classes of |difference| between neighbouring voxels) of
probabilities and of the segmentation (2 for each pair of unlike labels) across tile borders, the same beside the borders,
and PD-DDPM's relative to nnU-Net's.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from comparison_evaluation import Model, start_from
from nnunetv2.paths import nnUNet_preprocessed
from torch.nn.functional import one_hot

from nnunet_diffusion.evaluation.metrics import evenly_spaced
from nnunet_diffusion.evaluation.seams import Jumps, border_jumps
from nnunet_diffusion.model.segmenter import DiffusionSegmenter

METHODS = ("nnU-Net", "PD-DDPM")


def main() -> None:
    """Read the options, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder of a diffusion trainer")
    parser.add_argument(
        "--nnunet", type=Path, help="model folder of the nnU-Net to start from (default: the one inside)"
    )
    parser.add_argument("--dataset", type=Path, required=True, help="raw dataset folder")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10, help="validation cases, evenly spaced")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    # one tile at a time, so that each draws the noise that stock prediction gives it
    model = Model("ours", options.model, options.fold, options.device, mirror=True, tile_batch=1)
    assert isinstance(model.segmenter, DiffusionSegmenter), "--model is not a diffusion model"
    if options.nnunet:
        start_from(model, options.nnunet / f"fold_{options.fold}")
    split = Path(nnUNet_preprocessed or ".") / options.dataset.name / "splits_final.json"
    cases = evenly_spaced(sorted(json.loads(split.read_text())[options.fold]["val"]), options.cases)
    total = {(method, what): Jumps() for method in METHODS for what in ("probabilities", "segmentation")}
    for name in cases:
        data = model.load(name, options.dataset).data
        tiles = model.predictor._internal_get_sliding_window_slicers(data.shape[1:])
        for method, network in zip(METHODS, (model.segmenter.presegmentor, model.segmenter), strict=True):
            model.predictor.network = network
            probabilities = model.predictor.predict_sliding_window_return_logits(data).float().softmax(0)
            labels = one_hot(probabilities.argmax(0), len(probabilities)).movedim(-1, 0)
            total[method, "probabilities"] += border_jumps(probabilities, tiles)
            total[method, "segmentation"] += border_jumps(labels.float(), tiles)
    planes = total["nnU-Net", "probabilities"].planes
    print(f"{len(cases)} cases, {planes} planes between tiles, settings {model.segmenter.settings}")
    print("\n| | | at borders | beside them | ratio |\n|---|---|---:|---:|---:|")
    for (method, what), found in total.items():
        cells = found.at_borders / planes, found.around / planes, quotient(found.at_borders, found.around)
        print(f"| {method} | {what} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    for what in ("probabilities", "segmentation"):
        ours, theirs = total["PD-DDPM", what], total["nnU-Net", what]
        at_borders = quotient(ours.at_borders, theirs.at_borders)
        beside = quotient(ours.around, theirs.around)
        print(f"\n{what}: PD-DDPM / nnU-Net {at_borders:.3f} at borders, {beside:.3f} beside them")


def quotient(upper: float, lower: float) -> float:
    """NaN where there is nothing to compare with."""
    return upper / lower if lower else math.nan


if __name__ == "__main__":
    main()
