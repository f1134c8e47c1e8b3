"""Reverse processes from a start state to a clean state: plain functions of one signature, on an explicit grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.gaussian import GaussianDiffusion, at_least_float32
from nnunet_diffusion.diffusion.schedules import CLEAN, cast_like
from nnunet_diffusion.diffusion.solvers import SOLVERS, solver_step

Predict = Callable[[Tensor, int], Tensor]
"""(noisy, timestep) -> prediction of the process's prediction type."""
OnStep = Callable[[int, Tensor, Tensor], None]
"""(timestep, noisy, clean estimate) -> None, called after every evaluation of the network."""
Step = Callable[[Tensor, Tensor, int, int], Tensor]
"""(clean estimate, noisy, timestep, previous) -> state at `previous`."""
Random = torch.Generator | Sequence[torch.Generator] | None
"""Source of random numbers: one for the whole batch, one for each of its entries, or torch's global one."""


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


def start_state(presegmentation: Tensor, noise: Tensor, start_step: int, process: GaussianDiffusion) -> Tensor:
    """Start of a PD-DDPM reverse process: the pre-segmentation with start_step steps of noise (Guo et al. 2023).

    Args:
        presegmentation: probabilities in [0, 1], (B, K, *spatial).
        noise: standard normal, same shape.
        start_step: T', 1..T.
        process: the diffusion process.

    Returns:
        The noisy state at timestep start_step - 1, float32 or better.

    Raises:
        ValueError: start_step is outside 1..T.
    """
    _check_start_step(start_step, process)
    return process.add_noise(2 * at_least_float32(presegmentation) - 1, noise, start_step - 1)


def ancestral(
    predict: Predict,
    start: Tensor,
    grid: Sequence[int],
    process: GaussianDiffusion,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling: each state is drawn from the posterior with the fixed small variance (Ho et al. 2020).

    Args:
        predict: the network, called once for each timestep of the grid.
        start: (B, K, *spatial), the noisy state at grid[0].
        grid: strictly decreasing timesteps within 0..T-1; after the last one comes the clean state.
        process: the diffusion process of the predictions.
        generator: source of the random numbers, also one for each entry of the batch; torch's global one if None.
        eta: no effect; the samplers share one signature.
        on_step: called after every evaluation.

    Returns:
        The clean state, (B, K, *spatial), float32 or better.

    Raises:
        ValueError: the grid is empty, not strictly decreasing or not within 0..T-1.
    """

    def step(clean: Tensor, noisy: Tensor, timestep: int, previous: int) -> Tensor:
        posterior = process.posterior(clean, noisy, timestep, previous)
        return posterior.mean + posterior.variance.sqrt() * _normal_like(noisy, generator)

    return _reverse(predict, start, grid, process, step, on_step)


def ddim(
    predict: Predict,
    start: Tensor,
    grid: Sequence[int],
    process: GaussianDiffusion,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoising diffusion implicit sampling (Song et al. 2021, Eq. 12 and 16).

    Args:
        predict: the network, called once for each timestep of the grid.
        start: (B, K, *spatial), the noisy state at grid[0].
        grid: strictly decreasing timesteps within 0..T-1; after the last one comes the clean state.
        process: the diffusion process of the predictions.
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

    def step(clean: Tensor, noisy: Tensor, timestep: int, previous: int) -> Tensor:
        now, before = (process.schedule.exact(t, noisy.ndim) for t in (timestep, previous))
        # Eq. 16, squared; at eta = 1 it is the posterior's variance.
        variance = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
        # Eq. 12: predicted clean state, direction pointing to the noisy state, random noise.
        direction = cast_like((1 - before - variance).clamp(min=0).sqrt(), noisy)
        state = cast_like(before.sqrt(), noisy) * clean + direction * process.to_noise(clean, noisy, timestep)
        return state + cast_like(variance.sqrt(), noisy) * _normal_like(noisy, generator) if eta > 0 else state

    return _reverse(predict, start, grid, process, step, on_step)


def diffusers_solver(
    name: str,
    predict: Predict,
    start: Tensor,
    grid: Sequence[int],
    process: GaussianDiffusion,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Second-order multistep solvers of diffusers: DPM-Solver (Lu et al. 2022), DPM-Solver++, UniPC (Zhao et al. 2023).

    Args:
        name: "dpm_solver", "dpm_solver++" or "unipc".
        predict: the network, called once for each timestep of the grid.
        start: (B, K, *spatial), the noisy state at grid[0].
        grid: strictly decreasing timesteps within 0..T-1; after the last one comes the clean state.
        process: the diffusion process of the predictions.
        generator: no effect; the solvers are deterministic.
        eta: no effect.
        on_step: called after every evaluation.

    Returns:
        The clean state, (B, K, *spatial), float32 or better; the solvers' coefficients are float32.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: an unknown name; the grid is empty, not strictly decreasing or not within 0..T-1.
    """
    _check_grid(grid, process)
    return _reverse(predict, start, grid, process, solver_step(name, grid, process), on_step)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    **{name: partial(diffusers_solver, name) for name in SOLVERS},
}


def sample(
    name: str,
    predict: Predict,
    start: Tensor,
    start_step: int,
    steps: int,
    process: GaussianDiffusion,
    *,
    generator: Random = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run the sampler of that name from a start state on an evenly spaced grid.

    Args:
        name: a key of SAMPLERS.
        predict: the network, called `steps` times.
        start: (B, K, *spatial), the noisy state at timestep start_step - 1.
        start_step: T', 1..T.
        steps: number of network evaluations, 1..start_step.
        process: the diffusion process of the predictions.
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
    _check_start_step(start_step, process)
    grid = timestep_grid(start_step, steps)
    return SAMPLERS[name](predict, start, grid, process, generator=generator, eta=eta, on_step=on_step)


def _reverse(
    predict: Predict, start: Tensor, grid: Sequence[int], process: GaussianDiffusion, step: Step, on_step: OnStep | None
) -> Tensor:
    _check_grid(grid, process)
    state = at_least_float32(start)
    for timestep, previous in zip(grid, [*grid[1:], CLEAN], strict=True):
        clean = process.to_clean(predict(state, timestep), state, timestep)
        if on_step is not None:
            on_step(timestep, state, clean)
        # At the clean state every sampler's step is its clean estimate: the variance and the direction's weight are 0.
        state = clean if previous == CLEAN else step(clean, state, timestep, previous)
    return state


def _normal_like(state: Tensor, generator: Random) -> Tensor:
    if isinstance(generator, Sequence):
        pairs = zip(state, generator, strict=True)
        return torch.stack([_normal_like(entry, source) for entry, source in pairs])
    device = state.device if generator is None else generator.device
    return torch.randn(state.shape, generator=generator, device=device, dtype=torch.float32).to(state)


def _check_grid(grid: Sequence[int], process: GaussianDiffusion) -> None:
    limit = process.schedule.timesteps
    falling = all(later < earlier for earlier, later in zip(grid, grid[1:], strict=False))
    if len(grid) == 0 or not falling or grid[0] >= limit or grid[-1] < 0:
        raise ValueError(f"grid is {list(grid)}; give strictly decreasing timesteps within 0..{limit - 1}")


def _check_start_step(start_step: int, process: GaussianDiffusion) -> None:
    if not 1 <= start_step <= process.schedule.timesteps:
        raise ValueError(f"start_step is {start_step}; it must be 1 to timesteps = {process.schedule.timesteps}")
