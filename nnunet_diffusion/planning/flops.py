"""FLOPs of executed operators, 2 per multiply-accumulate: torch's counter, extended by operators that it does not know."""

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
    setattr(_formula, "_get_raw", True)  # noqa: B010  # makes torch's counter pass tensors instead of shapes

CPU_ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Operator -> FLOP formula of the CPU's attention kernel, which torch's counter counts as 0."""


def flops_text(flops: float) -> str:
    """Return FLOPs as text with three digits and a unit, such as 3.29 GFLOP."""
    power, unit = next((pair for pair in ((1e12, "TFLOP"), (1e9, "GFLOP")) if flops >= pair[0]), (1e6, "MFLOP"))
    number = flops / power
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def count_flops(run: Callable[[], object]) -> int:
    """Call `run` once and return the FLOPs of all its computations, including backward passes."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS)
    with counter:
        run()
    return int(counter.get_total_flops())
