r"""Memory of training steps, counted by the planner and measured: the table of documentation/planning.md.

    python tests/benchmarks/memory.py W/nnUNet_preprocessed/Dataset004_Hippocampus/DiffusionPlanner*GB.json --most 12
    python tests/benchmarks/memory.py W/nnUNet_preprocessed/Dataset777_LargeCT/DiffusionPlanner*GB.json --device cuda

On a CPU a real training step is run, and what autograd saves for its backward pass is compared with the count of it. On a
GPU torch.cuda.max_memory_allocated is compared with the whole count. Plans that need more than --most GB are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nnunet_diffusion.model.build import build_denoiser
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.planning.costs import Cost, SavedBytes, denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.record import GB, memory_target_gb
from nnunet_diffusion.planning.steps import build_nnunet, diffusion_step, nnunet_builder, nnunet_step

Built = tuple[torch.nn.Module, Callable[[], None]]


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plans", type=Path, nargs="+", help="with nnU-Net's dataset.json beside them")
    parser.add_argument("--most", type=float, default=12, metavar="GB")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="both networks by torch.compile")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = read_options()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True  # as nnU-Net has it, in training and prediction
    what = "kept for the backward pass" if device.type == "cpu" else "at the peak"
    print(
        f"| plans | configuration | network | precision | GB counted {what} | GB measured | counted / measured | target |"
    )
    print(f"|{'---|' * 8}")
    for path in options.plans:
        plans, description = json.loads(path.read_text()), json.loads((path.parent / "dataset.json").read_text())
        size = len(description["channel_names"]), len(description["labels"])
        for name, configuration in plans["configurations"].items():
            if "architecture" not in configuration:
                continue
            target = memory_target_gb(plans, configuration)
            for network, precision, cost, build in cases(configuration, *size, device, options):
                if cost.total > options.most * GB:
                    continue
                counted = cost.activations + cost.attention if device.type == "cpu" else cost.total
                measured = saved(build) if device.type == "cpu" else peak(build)
                cells = (f"{counted / GB:.3f}", f"{measured / GB:.3f}", f"{counted / measured:.3f}")
                row = (f"{plans['dataset_name'][11:]} {path.stem}", name, network, precision, *cells, f"{target:g}")
                print(f"| {' | '.join(row)} |", flush=True)
                gc.collect()


def cases(
    configuration: Mapping[str, Any], channels: int, heads: int, device: torch.device, options: argparse.Namespace
) -> Iterator[tuple[str, str, Cost, Callable[[], Built]]]:
    """Yield name of the network, precision, count, and what builds the network and its step."""
    batch, gpu = int(configuration["batch_size"]), device.type == "cuda"
    settings = DiffusionSettings.from_plans(configuration)
    for precision in options.precisions:
        amp = precision == "bfloat16"

        def autocast(amp: bool = amp) -> contextlib.AbstractContextManager:
            return torch.autocast(device.type, dtype=torch.bfloat16) if amp else contextlib.nullcontext()

        def data() -> tuple[torch.Tensor, torch.Tensor]:
            shape = (batch, channels, *configuration["patch_size"])
            return torch.randn(shape, device=device), torch.randint(0, heads, (batch, 1, *shape[2:]), device=device)

        def nnunet(autocast: Callable = autocast) -> Built:
            network = build_nnunet(configuration, channels, heads).train().to(device)
            return network, nnunet_step(network, *data(), autocast(), options.compile)

        def denoiser(autocast: Callable = autocast) -> Built:
            frozen, trained = (
                build_nnunet(configuration, channels, heads),
                build_denoiser(settings, configuration, channels, heads, nnunet_builder(configuration, heads)),
            )
            segmenter = DiffusionSegmenter(frozen, trained, settings).to(device)
            return segmenter.denoiser, diffusion_step(segmenter, *data(), autocast(), options.compile)

        size = (channels, heads, batch)
        yield "nnU-Net", precision, nnunet_cost(configuration, *size, amp=amp, gpu=gpu), nnunet
        yield "denoiser", precision, denoiser_cost(configuration, settings, *size, amp=amp, gpu=gpu), denoiser


def saved(build: Callable[[], Built]) -> int:
    """Bytes that autograd keeps in one real step on the CPU."""
    network, step = build()
    with SavedBytes(network) as kept:
        step()
    return kept.activations + kept.attention


def peak(build: Callable[[], Built]) -> int:
    """Bytes allocated on the GPU at most in two steps, after one in which cuDNN tries its algorithms.

    In that first one nnU-Net on BUSI, batch 30, took 4.7 GB of an H100, in later ones 3.0 (documentation/planning.md).
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    _, step = build()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
