"""Settings on which the last bits of a prediction depend: CPU threads and GPU algorithms."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it cuBLAS may sum in a different order on each call


def threads_of(device: torch.device) -> int:
    """Return the default number of threads of a prediction, the same as in nnUNetv2_predict."""
    return multiprocessing.cpu_count() if device.type == "cpu" else 1


def ask_cublas() -> None:
    """Make cuBLAS deterministic. Call this before the process first uses cuBLAS."""
    for name, value in WORKSPACE.items():
        os.environ.setdefault(name, value)


@contextmanager
def computing(threads: int, deterministic: bool) -> Iterator[None]:
    """Set torch's number of threads and, if asked for, deterministic algorithms for a `with` block.

    Args:
        threads: number of CPU threads.
        deterministic: raise an error for operations without a deterministic algorithm, and disable cuDNN's benchmark.
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
