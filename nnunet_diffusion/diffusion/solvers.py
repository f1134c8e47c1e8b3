"""The solvers that diffusers provides (DPM-Solver, DPM-Solver++, UniPC), fitted to this package's grids and states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.gaussian import GaussianProcess

SOLVERS = ("dpm_solver", "dpm_solver++", "unipc")


def build_scheduler(name: str, grid: Sequence[int], process: GaussianProcess) -> Any:
    """A diffusers scheduler whose steps are exactly those of a grid.

    Args:
        name: one of SOLVERS.
        grid: timesteps, strictly decreasing, within 0..T-1.
        process: its schedule is used up to the grid's first timestep.

    Returns:
        A fresh scheduler: "dpm_solver" wants epsilon as the network's output, the others the clean estimate.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: an unknown name.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; known solvers: {', '.join(SOLVERS)}")
    try:
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
    except ImportError as error:
        raise ImportError(
            f"sampler {name!r} needs diffusers: pip install diffusers, or use 'ddim' or 'ddpm'"
        ) from error
    # PD-DDPM starts inside the schedule, so the solver is shown only the part up to the start: to it, T' is the end.
    prefix = {
        "num_train_timesteps": grid[0] + 1,
        "trained_betas": process.schedule.betas[: grid[0] + 1].tolist(),
        "timestep_spacing": "linspace",
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*dpmsolver.*deprecated.*")
        scheduler: Any
        if name == "unipc":
            scheduler = UniPCMultistepScheduler(**prefix, prediction_type="sample")
        elif name == "dpm_solver++":
            scheduler = DPMSolverMultistepScheduler(**prefix, algorithm_type="dpmsolver++", prediction_type="sample")
        else:
            # The first-generation algorithm refuses a final sigma of zero; its last step is never taken, see below.
            scheduler = DPMSolverMultistepScheduler(
                **prefix, algorithm_type="dpmsolver", prediction_type="epsilon", final_sigmas_type="sigma_min"
            )
    _use_grid(scheduler, grid, process)
    return scheduler


def _use_grid(scheduler: Any, grid: Sequence[int], process: GaussianProcess) -> None:
    # set_timesteps resets the solver and fixes the number of evaluations; with linspace on the prefix it also begins at
    # T' - 1. But near steps = T' it rounds two timesteps to one (then the solver divides by zero), and UniPC takes no
    # list of timesteps. So the two tables that a step reads are then replaced by the grid's own: the timesteps, and
    # sigma = sqrt((1 - alpha_bar) / alpha_bar), followed by the entry for the clean state.
    scheduler.set_timesteps(len(grid))
    timesteps = torch.tensor(grid, dtype=torch.long)
    alpha_bar = process.schedule.exact(timesteps, ndim=1)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().to(torch.float32)
    scheduler.timesteps = timesteps
    scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])
    scheduler.set_begin_index(0)


def solver_step(
    name: str, grid: Sequence[int], process: GaussianProcess
) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """The solver's step from one timestep of the grid to the next, to be called once for each in the grid's order.

    The step from the last timestep to the clean state is the caller's and returns the clean estimate: all three solvers
    fall back to first order there, which at sigma = 0 gives just that, where they allow it at all.

    Args:
        name: one of SOLVERS.
        grid: timesteps, strictly decreasing, within 0..T-1.
        process: the diffusion process.

    Returns:
        step(clean, noisy, timestep, previous) -> state at `previous`; it remembers earlier steps (multistep).

    Raises:
        ImportError: diffusers is not installed.
        ValueError: an unknown name.
    """
    scheduler = build_scheduler(name, grid, process)

    def step(clean: Tensor, noisy: Tensor, timestep: int, previous: int) -> Tensor:
        output = process.to_noise(clean, noisy, timestep) if name == "dpm_solver" else clean
        return scheduler.step(output, timestep, noisy).prev_sample

    return step
