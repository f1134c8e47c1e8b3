"""In which precision networks are evaluated, and what is refused when a value is not finite (layer 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("auto", "float32", "bfloat16")


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


def training_precision(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager:
    """Return the autocast of a training step.

    Args:
        device: device of the networks.
        precision: "auto" for half precision on a CUDA GPU (bfloat16 where it has it) and float32 elsewhere, as in nnU-Net;
            "float32" or "bfloat16" on any device.
    """
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    if precision == "float32" or device.type != "cuda":
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
            "The network returned NaN for a finite image. Its weights may be damaged (use another checkpoint), or "
            "half precision overflowed (predict with -device cpu)."
        )


def all_finite(values: Tensor) -> bool:
    """Return True if every value is finite."""
    # min and max propagate NaN; one pass takes a sixth of the time of isfinite on a CPU
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))
