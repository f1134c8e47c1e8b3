r"""Seconds a case from file to file, nnU-Net's and DiffusionTrainer's, by nnU-Net's own sequential prediction.

    python tests/benchmarks/case_seconds.py --dataset DATA/Dataset004_Hippocampus --plans nnUNetPlans.json --configuration 2d

Both networks have random weights, which take as long as trained ones. Each case is read, preprocessed, predicted with
mirroring and the plans' settings, resampled and written by `nnUNetPredictor.predict_from_files_sequential`, one network
after the other, so that both meet the same machine; a first run of the first case warms up and does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.evaluation.metrics import evenly_spaced
from nnunet_diffusion.planning.steps import build_nnunet
from nnunet_diffusion.training import DiffusionTrainer


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True, help="raw dataset of nnU-Net's")
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--configuration", default="2d")
    parser.add_argument(
        "--cases", type=int, default=20, help="evenly spaced; the first is predicted once more before, to warm up"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def predictors(options: argparse.Namespace, description: dict[str, Any]) -> dict[str, nnUNetPredictor]:
    """Build both networks of the plans, ready to predict files."""
    plans = PlansManager(json.loads(options.plans.read_text()))
    configuration, channels = plans.get_configuration(options.configuration), len(description["channel_names"])
    heads = plans.get_label_manager(description).num_segmentation_heads
    nnunet = build_nnunet(configuration.configuration, channels, heads)
    nnunet.decoder.deep_supervision = False
    ours = DiffusionTrainer.build_network_architecture(plans, configuration, channels, heads, False)
    found = {}
    for name, network in (("nnU-Net", nnunet), ("PD-DDPM (default)", ours)):
        device = torch.device(options.device)
        predictor = nnUNetPredictor(
            use_mirroring=True, device=device, perform_everything_on_device=options.device == "cuda", allow_tqdm=False
        )
        axes = tuple(range(len(configuration.patch_size)))
        weights = [network.state_dict()]
        predictor.manual_initialization(
            network.eval().to(device), plans, configuration, weights, description, "nnUNetTrainer", axes
        )
        found[name] = predictor
    return found


def main() -> None:
    """Predict all cases by both and print a table."""
    options = read_options()
    description = json.loads((options.dataset / "dataset.json").read_text())
    files = get_filenames_of_train_images_and_targets(str(options.dataset), description)
    names = sorted(files)
    chosen = evenly_spaced(names, options.cases)
    networks = predictors(options, description)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with tempfile.TemporaryDirectory() as folder:
        for case in [chosen[0], *chosen]:
            for name, predictor in networks.items():
                begin = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    predictor.predict_from_files_sequential([files[case]["images"]], [f"{folder}/{case}"])
                seconds[name].append(time.perf_counter() - begin)
    means = {name: float(np.mean(each[1:])) for name, each in seconds.items()}
    base = means["nnU-Net"]
    lines = [[name, f"{mean:.3f}", f"{mean / base:.2f}"] for name, mean in means.items()]
    print(
        f"{options.dataset.name}, {options.plans.stem} {options.configuration}, {len(chosen)} cases, {options.device}"
    )
    print(markdown_table(["", "seconds a case", "ratio"], lines))


if __name__ == "__main__":
    main()
