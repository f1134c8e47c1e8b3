r"""Cost of DiffusionTrainer beside nnU-Net at one plan: FLOPs, seconds and memory of a training step and of inference.

    python tests/benchmarks/speed.py --plans nnUNetPlans.json --configuration 2d --classes 2 --device cpu --batch 2

FLOPs are counted by `torch.utils.flop_counter` (2 per multiply-accumulate; attention on a CPU too). Operators are torch's
that compute or copy something, by its profiler, in half precision on a CPU too: what a GPU is told to do one after the
other where nothing is compiled. MB are what these operators read and write, each tensor once: a GPU that has enough to do
waits for its memory in most of them. Seconds are medians, both networks in one run.
`--section '{"features_per_stage": [32, 64, ...]}'` changes the diffusion settings, `--attention` adds the memory of
parameter-shared attention at 1k to 65k tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.model.precision import training_precision
from nnunet_diffusion.networks.attention import ParameterSharedAttention
from nnunet_diffusion.planning.flops import count_flops
from nnunet_diffusion.planning.steps import build_nnunet, diffusion_step, nnunet_step
from nnunet_diffusion.training import DiffusionTrainer

NO_WORK = {
    "alias", "as_strided", "as_strided_", "broadcast_tensors", "chunk", "contiguous", "detach", "detach_", "empty",
    "empty_like", "empty_strided", "expand", "flatten", "is_same_size", "lift_fresh", "movedim", "narrow",
    "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "_reshape_alias", "resize_",
    "resolve_conj", "resolve_neg", "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze",
    "t", "to", "transpose", "unbind", "unflatten", "unfold", "_unsafe_view", "unsqueeze", "view",
}  # fmt: skip
"""Operators that only allocate or look at memory in another way, where they call no other."""

HEADER = [
    "",
    "GFLOP a sample",
    "ratio",
    "operators",
    "MB a sample",
    "ratio",
    "milliseconds a batch",
    "ratio",
    "peak GiB",
]


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--configuration", default="2d")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--classes", type=int, default=2, help="with background")
    parser.add_argument("--batch", type=int, help="default: the plans'")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--section", type=json.loads, help="diffusion settings as JSON, instead of the plans' own")
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
    if options.section is not None:
        plans["configurations"][options.configuration]["diffusion"] = options.section
    manager = PlansManager(plans)
    configuration = manager.get_configuration(options.configuration)
    batch = options.batch or configuration.batch_size
    shape = (batch, options.channels, *configuration.patch_size)
    image = torch.randn(shape, device=device)
    target = torch.randint(0, options.classes, (batch, 1, *shape[2:]), device=device)
    section = plans["configurations"][options.configuration].get("diffusion", {})
    print(f"{options.plans.stem} {options.configuration}, batch and patch {shape}, {section}, {device}")

    nnunet = build_nnunet(configuration.configuration, options.channels, options.classes).to(device)
    network = DiffusionTrainer.build_network_architecture(
        manager, configuration, options.channels, options.classes, False
    ).to(device)
    rows: dict[str, Measured] = {}
    rows["nnU-Net training step"] = measure(
        nnunet_step(nnunet, image, target, compiled=options.compile), options, device
    )
    if options.compile:
        network.compile_inference()
    rows["DiffusionTrainer training step"] = measure(
        diffusion_step(network, image, target, compiled=options.compile), options, device
    )
    nnunet.decoder.deep_supervision = False
    nnunet.eval()
    network.eval()
    alone = torch.compile(nnunet) if options.compile else nnunet
    # one for all tiles and mirrors, as in nnU-Net's predictor: it may keep converted weights
    with training_precision(device):
        rows["nnU-Net inference"] = measure(lambda: inference(alone, image), options, device, again=True)
        rows["PD-DDPM inference (default)"] = measure(lambda: inference(network, image), options, device, again=True)
    lines = []
    for name, row in rows.items():
        base = rows["nnU-Net training step" if "training" in name else "nnU-Net inference"]
        counted = ["-"] * 5
        if row.operations is not None and base.operations is not None:
            ours, theirs = row.operations, base.operations
            counted = [
                *(f"{ours.flops / batch / 1e9:.2f}", f"{ours.flops / theirs.flops:.2f}", f"{ours.number}"),
                *(f"{ours.moved / batch / 1e6:.0f}", f"{ours.moved / theirs.moved:.2f}"),
            ]
        times = [f"{row.seconds * 1e3:.1f}", f"{row.seconds / base.seconds:.2f}", f"{row.peak:.2f}"]
        lines.append([name, *counted, *times])
    print(markdown_table(HEADER, lines))
    for name, module in (("nnU-Net", nnunet), ("denoiser", network.denoiser)):
        print(f"parameters of {name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M")
    if options.attention:
        attention_memory(device)


def inference(network: torch.nn.Module, image: torch.Tensor) -> None:
    """Segment a batch."""
    with torch.inference_mode():
        network(image)


def count_operators(step: Callable[[], None]) -> int:
    """Run once and return the number of torch's operators that computed or copied something."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return sum(_working(event) for event in profiler.events() if event.cpu_parent is None)


def _working(event: Any) -> int:
    inner = sum(_working(child) for child in event.cpu_children)
    return inner or (event.name.startswith("aten::") and event.name.removeprefix("aten::") not in NO_WORK)


class BytesMoved(TorchDispatchMode):
    """Bytes of the tensors that the operators within read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run the operator and add its tensors."""
        result = function(*arguments, **(named or {}))
        if function.overloadpacket.__name__ not in NO_WORK:
            tensors = (each for each in tree_leaves((arguments, named, result)) if isinstance(each, torch.Tensor))
            self.total += sum(tensor.nbytes for tensor in tensors)
        return result


@dataclass(frozen=True)
class Operations:
    """What one call is made of: FLOPs, operators, and bytes that these read and write."""

    flops: float
    number: int
    moved: int


@dataclass(frozen=True)
class Measured:
    """One call: its operations (None where compiled, they are others then), seconds, GiB at the peak (0 on a CPU)."""

    operations: Operations | None
    seconds: float
    peak: float


def count_operations(step: Callable[[], None], device: torch.device, again: bool) -> Operations:
    """Count one call; operators and bytes are those of half precision, of a second call in one autocast where `again`."""
    flops = count_flops(step)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        if again:
            step()
        operators = count_operators(step)
        with BytesMoved() as counted:
            step()
    return Operations(flops, operators, counted.total)


def measure(
    step: Callable[[], None], options: argparse.Namespace, device: torch.device, again: bool = False
) -> Measured:
    """Measure one call; `again` as for `count_operations`."""
    step()
    operations = None if options.compile else count_operations(step, device, again)
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
    return Measured(operations, sorted(times)[len(times) // 2], peak)


def attention_memory(device: torch.device) -> None:
    """Print the bytes autograd keeps for parameter-shared attention, and the GPU's peak, by number of tokens."""
    lines = []
    for side in (32, 64, 128, 256):
        attention = ParameterSharedAttention(64, torch.nn.Conv2d, 4096).to(device)
        features = torch.randn(1, 64, side, side, device=device, requires_grad=True)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with training_precision(device), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = attention(features, "denoising")
        output.sum().backward()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else float("nan")
        lines.append([f"{side * side}", f"{kept / 2**20:.1f}", f"{peak:.1f}"])
    print("\n" + markdown_table(["tokens", "MiB kept for backward", "peak MiB on the GPU"], lines))


if __name__ == "__main__":
    main()
