"""What the last bits of a prediction depend on: threads of the CPU, algorithms of the GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it cuBLAS may take another sum on each call


def threads_of(device: torch.device) -> int:
    """Threads that a prediction takes unless it is told otherwise: those that nnUNetv2_predict sets."""
    return multiprocessing.cpu_count() if device.type == "cpu" else 1


def ask_cublas() -> None:
    """Have cuBLAS compute the same sums on each call; before this process uses it first."""
    for name, value in WORKSPACE.items():
        os.environ.setdefault(name, value)


@contextmanager
def computing(threads: int, deterministic: bool) -> Iterator[None]:
    """Set torch's threads, and on demand deterministic algorithms only, for a `with` block.

    Args:
        threads: of the CPU.
        deterministic: refuse operations without a deterministic algorithm, and measure no cuDNN algorithms.
    """
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
