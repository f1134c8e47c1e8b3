r"""Draw image, truth, nnU-Net, the reverse process, result and errors of some cases, one slice of each.

    python tests/benchmarks/process_figure.py -m nnUNet_results/DATASET/MODEL -f 0 --cases A B -o figure.png

The cases are training cases in nnU-Net's raw format ($nnUNet_raw/DATASET); of a volume the slice with most foreground is
shown. Everything is on the network's grid, without tiles and mirroring. With HiDiff the panel p has the segmentor's
probability, from which the first state is drawn.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from comparison_evaluation import Model

from nnunet_diffusion.cli.folders import RAW
from nnunet_diffusion.explain.figures import ReportRow, report_figure
from nnunet_diffusion.explain.reverse_process import reverse_process


def row_of(model: Model, case_name: str, raw: Path, label: int, steps: int) -> ReportRow:
    """Run one reverse process on a case's slice with most foreground."""
    case, network = model.load(case_name, raw), model.segmenter
    truth = model.start_channels(case, case.truth).argmax(0)
    number = int((truth > 0).sum((1, 2)).argmax())
    image = case.data[:, number].to(model.predictor.device)
    found = reverse_process(network, image, steps=steps)
    states = [(timestep, state[label]) for timestep, state in [*found.states, (-1, found.result)]]
    prior = found.start[label] if network.settings.is_hidiff else None
    result = found.result.argmax(0)
    return ReportRow(
        case_name, image[0].cpu().numpy(), truth[number].numpy(), found.start.argmax(0), states, result, prior
    )


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER", help="model folder")
    parser.add_argument("-f", default="0", metavar="FOLD")
    parser.add_argument("--cases", nargs="+", required=True, metavar="CASE")
    parser.add_argument("--label", type=int, default=1, help="class whose state is shown")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model("", options.m, options.f, options.device, mirror=False, tile_batch=1)
    if not hasattr(model.segmenter, "settings"):
        parser.error(f"{options.m} is not a model of a diffusion trainer")
    raw = Path(os.environ[RAW]) / options.m.parent.name
    report_figure([row_of(model, name, raw, options.label, options.steps) for name in options.cases], options.o)


if __name__ == "__main__":
    main()
