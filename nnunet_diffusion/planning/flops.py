"""FLOPs of what runs, 2 for each multiply-accumulate: torch's counter and what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


for _formula in (_forward, _backward):
    setattr(_formula, "_get_raw", True)  # noqa: B010  # torch's counter then hands over tensors, not their shapes

CPU_ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Operator -> formula, of the CPU's attention kernel: torch's counter takes it for nothing."""


def flops_text(flops: float) -> str:
    """Return FLOPs with three digits and a unit of their size, such as 3.29 GFLOP."""
    power, unit = next((pair for pair in ((1e12, "TFLOP"), (1e9, "GFLOP")) if flops >= pair[0]), (1e6, "MFLOP"))
    number = flops / power
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def count_flops(run: Callable[[], object]) -> int:
    """Run once and return the FLOPs of all that was computed, backward passes included."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS)
    with counter:
        run()
    return int(counter.get_total_flops())
