r"""Cost of DiffusionTrainer beside nnU-Net at one plan: FLOPs, seconds and memory of a training step and of inference.

    python tests/benchmarks/speed.py --plans nnUNetPlans.json --configuration 2d --classes 2 --device cpu --batch 2

FLOPs are counted by `torch.utils.flop_counter` (2 per multiply-accumulate; attention on a CPU too), operators are torch's
that compute something: what a GPU is told to do one after the other, where nothing is compiled. Seconds are medians, both
networks in one run. `--section '{"features_per_stage": [32, 64, ...]}'` changes the diffusion settings,
`--attention` adds the memory of parameter-shared attention at 1k to 65k tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_diffusion.networks.attention import ParameterSharedAttention
from nnunet_diffusion.planning.flops import count_flops
from nnunet_diffusion.planning.steps import build_nnunet, diffusion_step, nnunet_step, precision_of
from nnunet_diffusion.training import DiffusionTrainer


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--configuration", default="2d")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--classes", type=int, default=2, help="with background")
    parser.add_argument("--batch", type=int, help="default: the plans'")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--section", type=json.loads, default={}, help="diffusion settings as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    parser.add_argument("--attention", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = read_options()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True  # as nnU-Net has it, in training and prediction
    plans = json.loads(options.plans.read_text())
    plans["configurations"][options.configuration]["diffusion"] = options.section
    manager = PlansManager(plans)
    configuration = manager.get_configuration(options.configuration)
    batch = options.batch or configuration.batch_size
    shape = (batch, options.channels, *configuration.patch_size)
    image = torch.randn(shape, device=device)
    target = torch.randint(0, options.classes, (batch, 1, *shape[2:]), device=device)
    print(f"{options.plans.stem} {options.configuration}, batch and patch {shape}, {options.section}, {device}")
    print("| | GFLOP a sample | ratio | operators | milliseconds a batch | ratio | peak GiB |\n" + "|---" * 7 + "|")

    nnunet = build_nnunet(configuration.configuration, options.channels, options.classes).to(device)
    network = DiffusionTrainer.build_network_architecture(
        manager, configuration, options.channels, options.classes, False
    ).to(device)
    rows: dict[str, tuple[float, int, float, float]] = {}
    rows["nnU-Net training step"] = measure(
        nnunet_step(nnunet, image, target, compiled=options.compile), options, device
    )
    if options.compile:
        network.compile_training()
        network.compile_inference()
    rows["DiffusionTrainer training step"] = measure(diffusion_step(network, image, target), options, device)
    nnunet.decoder.deep_supervision = False
    nnunet.eval()
    network.eval()
    alone = torch.compile(nnunet) if options.compile else nnunet
    with precision_of(
        device
    ):  # one for all tiles and mirrors, as in nnU-Net's predictor: it keeps the converted weights
        rows["nnU-Net inference"] = measure(lambda: inference(alone, image), options, device)
        rows["PD-DDPM inference (default)"] = measure(lambda: inference(network, image), options, device)
    for name, (flops, operators, seconds, peak) in rows.items():
        base = rows["nnU-Net training step" if "training" in name else "nnU-Net inference"]
        print(
            f"| {name} | {flops / batch / 1e9:.2f} | {flops / base[0]:.2f} | {operators} | {seconds * 1e3:.1f} | "
            f"{seconds / base[2]:.2f} | {peak:.2f} |"
        )
    for name, module in (("nnU-Net", nnunet), ("denoiser", network.denoiser)):
        print(f"parameters of {name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M")
    if options.attention:
        attention_memory(device)


def inference(network: torch.nn.Module, image: torch.Tensor) -> None:
    """Segment a batch."""
    with torch.inference_mode():
        network(image)


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: no views, no empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or "empty" in function.name())
        return function(*args, **(kwargs or {}))


def measure(
    step: Callable[[], None], options: argparse.Namespace, device: torch.device
) -> tuple[float, int, float, float]:
    """Return FLOPs and operators (0 where compiled), median seconds and peak memory in GiB (0 on a CPU) of one call."""
    step()
    flops, operators = 0, Operators()
    if not options.compile:
        flops = count_flops(step)
        with operators:
            step()
    times = []
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.repeats):
        synchronize()
        begin = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return max(flops, 1), operators.count, sorted(times)[len(times) // 2], peak


def attention_memory(device: torch.device) -> None:
    """Print the bytes autograd keeps for parameter-shared attention, and the GPU's peak, by number of tokens."""
    print("\n| tokens | MiB kept for backward | peak MiB on the GPU |\n|---|---|---|")
    for side in (32, 64, 128, 256):
        attention = ParameterSharedAttention(64, torch.nn.Conv2d, 4096).to(device)
        features = torch.randn(1, 64, side, side, device=device, requires_grad=True)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with precision_of(device), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = attention(features, "denoising")
        output.sum().backward()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else float("nan")
        print(f"| {side * side} | {kept / 2**20:.1f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
