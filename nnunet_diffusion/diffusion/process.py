"""What a diffusion process owes the rest of the program: its state space, noising, and one reverse step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.schedules import NoiseSchedule

Random = torch.Generator | Sequence[torch.Generator] | None
"""Source of random numbers: one for the whole batch, one for each of its entries, or torch's global one."""


class Posterior(Protocol):
    """The distribution q(x_previous | x_timestep, x_0)."""

    def draw(self, generator: Random = None) -> Tensor:
        """Return a state (B, K, *spatial) drawn from it."""


class Process(Protocol):
    """A diffusion process on segmentations; it has no parameters.

    Everywhere: states and probabilities are (B, K, *spatial); a timestep is an int or a long tensor (B,), 0..T-1; -1 is the
    clean state. Results are float32, or float64 where the input is.
    """

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of T steps."""

    def towards(self, prior: Tensor | None) -> Process:
        """Return the process whose noise tends to a prior (B, K, *spatial); itself, if its noise does not depend on one."""

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return noise as `add_noise` takes it: float32, drawn on the generator's device."""

    def to_state(self, masks: Tensor) -> Tensor:
        """Return the clean state of masks or probabilities in [0, 1]; a fresh tensor."""

    def to_probabilities(self, state: Tensor, *, in_place: bool = False) -> Tensor:
        """Return what a clean state or its estimate says of each channel, the inverse of `to_state`.

        Estimates beyond the state space give values outside [0, 1]; `labels.normalised` bounds them.
        """

    def start(self, presegmentation: Tensor, start_step: int, noise: Tensor, *, in_place: bool = False) -> Tensor:
        """Return the start of a reverse process: a pre-segmentation with T' noising steps.

        Args:
            presegmentation: probabilities.
            start_step: T', 1..T.
            noise: standard normal or uniform, as the process wants it.
            in_place: overwrite the noise by the result.
        """

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """Return the draw of q(x_t | x_0) that this noise makes."""

    def posterior(self, clean: Tensor, noisy: Tensor, timestep: int | Tensor, previous: int | Tensor) -> Posterior:
        """Return q(x_previous | x_timestep, x_0) for any earlier timestep."""

    def step(
        self, clean: Tensor, noisy: Tensor, timestep: int, previous: int, *, eta: float = 0.0, generator: Random = None
    ) -> Tensor:
        """Return the state at `previous` that a clean estimate leads to; `eta` 0 deterministic, 1 as a posterior's draw."""


def check_start_step(start_step: int, process: Process) -> None:
    """Raise ValueError unless T' is 1..T."""
    if not 1 <= start_step <= process.schedule.timesteps:
        raise ValueError(f"start_step is {start_step}; it must be 1 to timesteps = {process.schedule.timesteps}")


def normal_like(state: Tensor, generator: Random) -> Tensor:
    """Return standard normal noise of a state's shape, dtype and device, drawn in float32 on the generator's device."""
    if isinstance(generator, Sequence):
        pairs = zip(state, generator, strict=True)
        return torch.stack([normal_like(entry, source) for entry, source in pairs])
    device = state.device if generator is None else generator.device
    return torch.randn(state.shape, generator=generator, device=device, dtype=torch.float32).to(state)
