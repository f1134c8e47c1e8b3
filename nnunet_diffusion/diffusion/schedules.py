"""Noise schedules: the betas of T noising steps by name, kept in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CLEAN = -1
"""The timestep that stands for "no noise at all": one before timestep 0, with alpha_bar = 1."""


def cast_like(coefficient: Tensor, like: Tensor) -> Tensor:
    """Move a coefficient to `like`'s device as float32, or as float64 if `like` is float64; never to half precision.

    Args:
        coefficient: any shape, float64. A scalar of shape () stays on the CPU: it multiplies tensors of any device, and a
            copy would wait for the GPU.
        like: the tensor that the coefficient will be multiplied with.

    Returns:
        The coefficient, same shape.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    # Two moves, since MPS takes no float64.
    coefficient = coefficient.to(dtype)
    return coefficient.to(like.device) if coefficient.ndim else coefficient


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Variances of the noise added by each of T noising steps.

    Attributes:
        name: what the schedule is called in the settings.
        betas: (T,), each strictly between 0 and 1; held as float64. betas[0] is the step that timestep 0 has behind it.
        full_noise: whether the last beta may be 1, after which nothing of the clean state is left.

    Raises:
        ValueError: betas is not a non-empty vector, or an entry is not strictly between 0 and 1.
    """

    name: str
    betas: Tensor
    full_noise: bool = False

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) == 0:
            raise ValueError(f"betas has shape {tuple(self.betas.shape)}; give a vector of at least one entry")
        betas = self.betas.to(torch.float64)
        below = betas[:-1] if self.full_noise and betas[-1] == 1 else betas
        if not bool((betas > 0).all() and (below < 1).all()):
            raise ValueError(
                f"betas of schedule {self.name!r} range from {betas.min().item():.4g} to {betas.max().item():.4g}; "
                "every beta must be strictly between 0 and 1: change the schedule or its number of timesteps"
            )
        object.__setattr__(self, "betas", betas)

    @property
    def timesteps(self) -> int:
        """T, the number of noising steps."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Share of the signal's variance left at each timestep, (T,) float64: the product of (1 - beta) up to it."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) at each timestep, (T,) float64, falling."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def start_step_at(self, snr: float) -> int:
        """Return T', the number of noising steps whose signal-to-noise ratio is nearest to `snr` (in its logarithm).

        Raises:
            ValueError: `snr` is not a positive number.
        """
        if not 0 < snr < math.inf:
            raise ValueError(f"start_snr is {snr}; it must be a positive number")
        return int((self.snr.log() - math.log(snr)).abs().argmin()) + 1

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        """alpha_bar one timestep earlier, (T,) float64; its first entry is 1, the clean state."""
        return self._from_clean[:-1]

    @cached_property
    def _from_clean(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar])

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def exact(self, timestep: int | Tensor, ndim: int) -> Tensor:
        """alpha_bar at a timestep in float64, shaped to broadcast over a batch of `ndim` dimensions.

        Args:
            timestep: -1 (clean) to T-1; an int, or a long tensor (B,), whose entries are not checked.
            ndim: number of dimensions of the tensors it will meet.

        Returns:
            A scalar () on the CPU for an int; else (B, 1, ..., 1) on the timesteps' device.

        Raises:
            ValueError: an int timestep outside -1..T-1.
        """
        # The only place with index arithmetic: entry 0 of the table is the clean state.
        if not isinstance(timestep, Tensor):
            if not CLEAN <= timestep < self.timesteps:
                raise ValueError(f"timestep is {timestep}; it must be -1 (clean) to {self.timesteps - 1}")
            return self._from_clean[timestep + 1]
        index = timestep.reshape(-1)
        if index.device.type == "mps":
            index = index.cpu()  # MPS has no float64
        if index.device not in self._tables:
            self._tables[index.device] = self._from_clean.to(index.device)
        return self._tables[index.device][index + 1].reshape(-1, *[1] * (ndim - 1))

    def at(self, timestep: int | Tensor, like: Tensor) -> Tensor:
        """alpha_bar at a timestep, ready to be multiplied with `like`.

        Args:
            timestep: -1 (clean, gives 1) to T-1; an int, or a long tensor (B,).
            like: (B, ...), any dtype.

        Returns:
            A scalar () on the CPU for an int, else (B, 1, ..., 1) on like's device; float64 if `like` is, else float32.

        Raises:
            ValueError: an int timestep outside -1..T-1.
        """
        return cast_like(self.exact(timestep, like.ndim), like)


def linear_betas(timesteps: int) -> Tensor:
    """Betas rising linearly from 1e-4 to 2e-2 at T = 1000, multiplied by 1000 / T for any other T (Ho et al. 2020).

    Args:
        timesteps: T, at least 21; fewer would need a beta of 1 or more.

    Returns:
        (T,) float64.

    Raises:
        ValueError: T is so small that a beta reaches 1.
    """
    scale = 1000 / timesteps
    if 2e-2 * scale >= 1:
        raise ValueError(
            f"timesteps is {timesteps}; the linear schedule's last beta would be {2e-2 * scale:.4g}, and a beta must "
            "be below 1: use at least 21 timesteps, or the cosine schedule"
        )
    return torch.linspace(1e-4 * scale, 2e-2 * scale, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """Betas whose alpha_bar follows a squared cosine, clipped at 0.999 (Nichol and Dhariwal 2021, Eq. 17).

    Args:
        timesteps: T, at least 1.

    Returns:
        (T,) float64.
    """
    offset = 0.008
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    curve = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)


def scaled_betas(betas: Tensor, signal_scale: float) -> Tensor:
    """Betas of a process that noises b times the state and divides it by its standard deviation (Chen 2023).

    A mask is redundant: a mean over a few voxels reads it under noise that hides an image. A smaller b hides it. As the
    state's entries are -1 or 1, the scaled process is exactly one with another schedule, so that every sampler is valid.

    Args:
        betas: (T,) float64 of the process with the state itself.
        signal_scale: b, above 0 and at most 1.

    Returns:
        (T,) float64.

    Raises:
        ValueError: `signal_scale` is out of range.
    """
    if not 0 < signal_scale <= 1:
        raise ValueError(f"signal_scale is {signal_scale}; it must be above 0 and at most 1")
    if signal_scale == 1:
        return betas
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    # alpha_bar_b = b^2 alpha_bar / (b^2 alpha_bar + 1 - alpha_bar): the signal-to-noise ratio is multiplied by b^2
    scaled = signal_scale**2 * alpha_bar / (signal_scale**2 * alpha_bar + 1 - alpha_bar)
    return 1 - scaled / torch.cat([torch.ones(1, dtype=scaled.dtype), scaled[:-1]])


def replacement_betas(timesteps: int) -> Tensor:
    """Betas 1 / (T - t), whose alpha_bar falls linearly from 1 - 1 / T to 0: each step replaces as many voxels.

    Args:
        timesteps: T, at least 1.

    Returns:
        (T,) float64; the last one is 1.
    """
    return 1 / torch.arange(timesteps, 0, -1, dtype=torch.float64)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


def noise_schedule(name: str, timesteps: int, signal_scale: float = 1.0) -> NoiseSchedule:
    """The noise schedule of that name with that many noising steps.

    Args:
        name: a key of SCHEDULES.
        timesteps: T, at least 1.
        signal_scale: b of `scaled_betas`; 1 for the schedule itself.

    Returns:
        The schedule.

    Raises:
        ValueError: an unknown name, no timesteps or too few for this schedule, or a scale out of range.
    """
    return NoiseSchedule(name, scaled_betas(_betas(SCHEDULES, name, timesteps), signal_scale))


BERNOULLI_SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": replacement_betas, "cosine": cosine_betas}


def bernoulli_schedule(name: str, timesteps: int) -> NoiseSchedule:
    """Return the schedule of that name for a Bernoulli process, in which beta is the share of voxels that a step replaces.

    Args:
        name: a key of BERNOULLI_SCHEDULES.
        timesteps: T, at least 1.

    Raises:
        ValueError: an unknown name, or no timesteps.
    """
    return NoiseSchedule(name, _betas(BERNOULLI_SCHEDULES, name, timesteps), full_noise=True)


def _betas(schedules: dict[str, Callable[[int], Tensor]], name: str, timesteps: int) -> Tensor:
    if name not in schedules:
        raise ValueError(f"schedule is {name!r}; known schedules: {', '.join(schedules)}")
    if timesteps < 1:
        raise ValueError(f"timesteps is {timesteps}; at least one noising step is needed")
    return schedules[name](timesteps)
