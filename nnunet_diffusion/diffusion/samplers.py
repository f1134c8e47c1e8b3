"""Reverse processes from a start state to a clean state: plain functions of one signature, on an explicit grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from nnunet_diffusion.diffusion.gaussian import GaussianProcess, at_least_float32
from nnunet_diffusion.diffusion.process import Process, Random, check_start_step
from nnunet_diffusion.diffusion.schedules import CLEAN
from nnunet_diffusion.diffusion.solvers import SOLVERS, solver_step

Estimate = Callable[[Tensor, int], Tensor]
"""(noisy, timestep) -> estimate of the clean state: all that a sampler sees of a network."""
OnStep = Callable[[int, Tensor, Tensor], None]
"""(timestep, noisy, clean estimate) -> None, called after every evaluation of the network."""
Step = Callable[[Tensor, Tensor, int, int], Tensor]
"""(clean estimate, noisy, timestep, previous) -> state at `previous`."""


def timestep_grid(start_step: int, steps: int) -> list[int]:
    """Timesteps at which the network is evaluated: from start_step - 1 down, in equal parts.

    The last part leads to the clean state, timestep -1, and is as long as the others. A grid that ends at timestep 0
    would spend an evaluation on a state that is clean already, and the multistep solvers lose their accuracy on it.

    Args:
        start_step: T', number of noising steps behind the start state.
        steps: number of network evaluations, 1..start_step.

    Returns:
        `steps` strictly decreasing timesteps; [start_step - 1] for one step, all timesteps for start_step steps.

    Raises:
        ValueError: steps is outside 1..start_step.
    """
    if not 1 <= steps <= start_step:
        raise ValueError(f"steps is {steps}; it must be 1 to start_step = {start_step}")
    # i * start_step / steps rounded to nearest in integers: parts are at least 1, so no timestep can appear twice.
    return [start_step - 1 - (2 * i * start_step + steps) // (2 * steps) for i in range(steps)]


def ancestral(
    estimate: Estimate,
    start: Tensor,
    grid: Sequence[int],
    process: Process,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling: each state is drawn from the posterior with the fixed small variance (Ho et al. 2020).

    Args:
        estimate: called once for each timestep of the grid.
        start: (B, K, *spatial), the noisy state at grid[0].
        grid: strictly decreasing timesteps within 0..T-1; after the last one comes the clean state.
        process: the diffusion process.
        generator: source of the random numbers, also one for each entry of the batch; torch's global one if None.
        eta: no effect; the samplers share one signature.
        on_step: called after every evaluation.

    Returns:
        The clean state, (B, K, *spatial), float32 or better.

    Raises:
        ValueError: the grid is empty, not strictly decreasing or not within 0..T-1.
    """

    def step(clean: Tensor, noisy: Tensor, timestep: int, previous: int) -> Tensor:
        return process.posterior(clean, noisy, timestep, previous).draw(generator)

    return _reverse(estimate, start, grid, process, step, on_step)


def ddim(
    estimate: Estimate,
    start: Tensor,
    grid: Sequence[int],
    process: Process,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoising diffusion implicit sampling (Song et al. 2021, Eq. 12 and 16).

    Args:
        estimate: called once for each timestep of the grid.
        start: (B, K, *spatial), the noisy state at grid[0].
        grid: strictly decreasing timesteps within 0..T-1; after the last one comes the clean state.
        process: the diffusion process.
        generator: source of the random numbers, also one for each entry of the batch; torch's global one if None. Unused
            at eta = 0.
        eta: 0 (deterministic) to 1 (the ancestral sampler).
        on_step: called after every evaluation.

    Returns:
        The clean state, (B, K, *spatial), float32 or better.

    Raises:
        ValueError: eta is outside 0..1; the grid is empty, not strictly decreasing or not within 0..T-1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be 0 (deterministic) to 1 (as ancestral DDPM)")

    return _reverse(estimate, start, grid, process, partial(process.step, eta=eta, generator=generator), on_step)


def diffusers_solver(
    name: str,
    estimate: Estimate,
    start: Tensor,
    grid: Sequence[int],
    process: Process,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Second-order multistep solvers of diffusers: DPM-Solver (Lu et al. 2022), DPM-Solver++, UniPC (Zhao et al. 2023).

    Args:
        name: "dpm_solver", "dpm_solver++" or "unipc".
        estimate: called once for each timestep of the grid.
        start: (B, K, *spatial), the noisy state at grid[0].
        grid: strictly decreasing timesteps within 0..T-1; after the last one comes the clean state.
        process: the diffusion process.
        generator: no effect; the solvers are deterministic.
        eta: no effect.
        on_step: called after every evaluation.

    Returns:
        The clean state, (B, K, *spatial), float32 or better; the solvers' coefficients are float32.

    Raises:
        ImportError: diffusers is not installed.
        NotImplementedError: the process is not Gaussian.
        ValueError: an unknown name; the grid is empty, not strictly decreasing or not within 0..T-1.
    """
    _check_grid(grid, process)
    if not isinstance(process, GaussianProcess):
        raise NotImplementedError(f"sampler {name!r} solves the Gaussian process only: use 'ddim' or 'ddpm'")
    return _reverse(estimate, start, grid, process, solver_step(name, grid, process), on_step)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    **{name: partial(diffusers_solver, name) for name in SOLVERS},
}


def sample(
    name: str,
    estimate: Estimate,
    start: Tensor,
    start_step: int,
    steps: int,
    process: Process,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run the sampler of that name from a start state on an evenly spaced grid.

    Args:
        name: a key of SAMPLERS.
        estimate: called `steps` times.
        start: (B, K, *spatial), the noisy state at timestep start_step - 1.
        start_step: T', 1..T.
        steps: number of network evaluations, 1..start_step.
        process: the diffusion process.
        generator: source of the random numbers, also one for each entry of the batch; torch's global one if None.
        eta: 0..1, noise of the "ddim" sampler; no effect on the others.
        on_step: called as on_step(timestep, noisy, clean) after every evaluation.

    Returns:
        The clean state, (B, K, *spatial), float32 or better.

    Raises:
        ImportError: the sampler needs diffusers, which is not installed.
        ValueError: an unknown name, or an argument outside its range.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; known samplers: {', '.join(SAMPLERS)}")
    check_start_step(start_step, process)
    grid = timestep_grid(start_step, steps)
    return SAMPLERS[name](estimate, start, grid, process, generator=generator, eta=eta, on_step=on_step)


def _reverse(
    estimate: Estimate, start: Tensor, grid: Sequence[int], process: Process, step: Step, on_step: OnStep | None
) -> Tensor:
    _check_grid(grid, process)
    state = at_least_float32(start)
    for timestep, previous in zip(grid, [*grid[1:], CLEAN], strict=True):
        clean = estimate(state, timestep)
        if on_step is not None:
            on_step(timestep, state, clean)
        # At the clean state every sampler's step is its clean estimate: the variance and the direction's weight are 0.
        state = clean if previous == CLEAN else step(clean, state, timestep, previous)
    return state


def _check_grid(grid: Sequence[int], process: Process) -> None:
    limit = process.schedule.timesteps
    falling = all(later < earlier for earlier, later in zip(grid, grid[1:], strict=False))
    if len(grid) == 0 or not falling or grid[0] >= limit or grid[-1] < 0:
        raise ValueError(f"grid is {list(grid)}; give strictly decreasing timesteps within 0..{limit - 1}")
