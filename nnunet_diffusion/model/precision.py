"""How the networks are called: as functions that torch.compile takes, in which precision, outside inference mode (layer 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffusion.networks.pgdiffseg import Condition, PGDiffSeg


def evaluate_denoiser(
    denoiser: PGDiffSeg, noisy: Tensor, image: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One evaluation that touches every parameter: prediction, presence logits, location logits."""
    condition = denoiser.encode(image, timestep)
    return denoiser(noisy, timestep, condition), condition.presence_logits, condition.location_logits


def encode(denoiser: PGDiffSeg, image: Tensor, timestep: Tensor) -> Condition:
    """`PGDiffSeg.encode` as a function, for torch.compile: the trainer exchanges the denoiser for its average."""
    return denoiser.encode(image, timestep)


def denoise(denoiser: PGDiffSeg, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """`PGDiffSeg.forward` as a function."""
    return denoiser(noisy, timestep, condition)


def run(network: nn.Module, image: Tensor) -> Any:
    """Call a network."""
    return network(image)


def outside_inference_mode(function: Callable[..., Any], *arguments: Any) -> Any:
    """Evaluate a network without gradients, but not in inference mode, where autocast keeps no converted weights.

    Tensors made in inference mode are copied: torch.compile would make graphs of their own for them, and nnU-Net's loop has
    both kinds.
    """
    if not torch.is_inference_mode_enabled():
        return function(*arguments)
    with torch.inference_mode(False), torch.no_grad():
        return function(*[x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in arguments])


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a GPU that computes in bfloat16 natively (compute capability 8.0 or newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def training_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Return nnU-Net's autocast, in bfloat16 where the device has it; none on a CPU."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16 if has_bfloat16(device) else torch.float16)


def inference_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Evaluate a denoiser trained in bfloat16 in bfloat16, whatever precision the caller's autocast has."""
    if has_bfloat16(device) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def refuse_nan(probabilities: Tensor) -> None:
    """Raise ValueError if what the networks made of a finite image is not finite: every voxel would be background."""
    if not all_finite(probabilities):
        raise ValueError(
            "A network gave NaN for an image without: its weights are damaged (take another checkpoint, or train again), or "
            "half precision overflowed (predict on the CPU: -device cpu)."
        )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; by the extremes, which takes a CPU a sixth of the time of looking at each."""
    low, high = torch.aminmax(values)  # NaN wins
    return bool(torch.isfinite(low) & torch.isfinite(high))
