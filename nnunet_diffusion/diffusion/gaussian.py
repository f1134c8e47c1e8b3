"""Gaussian diffusion of a segmentation (DDPM): state, noising, start of PD-DDPM, posterior and the step of DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.process import Random, check_start_step, normal_like
from nnunet_diffusion.diffusion.schedules import NoiseSchedule, cast_like


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is float32 or float64, else a float32 copy.

    Args:
        tensor: any shape and dtype.

    Returns:
        The tensor, same shape.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class GaussianPosterior:
    """The normal distribution q(x_previous | x_timestep, x_0).

    Attributes:
        mean: (B, K, *spatial).
        variance: (B, 1, ..., 1), or a scalar () where both timesteps are ints; the same for every voxel.
    """

    mean: Tensor
    variance: Tensor

    def draw(self, generator: Random = None) -> Tensor:
        """Return a state (B, K, *spatial)."""
        return self.mean + self.variance.sqrt() * normal_like(self.mean, generator)


@dataclass(frozen=True)
class GaussianProcess:
    """Normal noise on a state in [-1, 1]; see `Process`.

    Attributes:
        schedule: the noise schedule.
    """

    schedule: NoiseSchedule

    def towards(self, prior: Tensor | None) -> GaussianProcess:
        """Return the process itself: its noise tends to a standard normal one, whatever the prior."""
        return self

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return standard normal noise, float32, drawn on the generator's device."""
        return torch.randn(tuple(shape), generator=generator, device=generator.device)

    def to_state(self, masks: Tensor) -> Tensor:
        """Return 2 p - 1, in [-1, 1], of masks or probabilities; a fresh tensor of the same shape."""
        # in place on the one copy: a volume fills the memory
        return (at_least_float32(masks) * 2).sub_(1)

    def to_probabilities(self, state: Tensor, *, in_place: bool = False) -> Tensor:
        """Return (x + 1) / 2, the inverse of `to_state`, also beyond [0, 1]; `in_place` overwrites the state."""
        return (state if in_place else state.clone()).add_(1).div_(2)

    def start(self, presegmentation: Tensor, start_step: int, noise: Tensor, *, in_place: bool = False) -> Tensor:
        """Return the start of PD-DDPM: the pre-segmentation after T' noising steps (Guo et al. 2022).

        Args:
            presegmentation: probabilities in [0, 1], (B, K, *spatial).
            start_step: T', 1..T.
            noise: standard normal, same shape.
            in_place: overwrite the noise by the result.

        Returns:
            The noisy state at timestep T' - 1.

        Raises:
            ValueError: start_step is outside 1..T.
        """
        check_start_step(start_step, self)
        return self.add_noise(self.to_state(presegmentation), noise, start_step - 1, in_place=in_place)

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, *, in_place: bool = False) -> Tensor:
        """Draw of q(x_t | x_0) made with the given standard normal noise (PGDiffSeg Eq. 14).

        Args:
            clean: (B, K, *spatial).
            noise: (B, K, *spatial).
            timestep: -1 (no noise) to T-1.
            in_place: overwrite both, the noise by the result; they are float32 or float64 then.

        Returns:
            The noisy state.
        """
        clean, noise = at_least_float32(clean), at_least_float32(noise)
        signal, spread = self.signal_and_spread(timestep, clean)
        # Eq. 14: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) epsilon
        if in_place:
            return noise.mul_(spread).add_(clean.mul_(signal))
        return signal * clean + spread * noise

    def to_noise(self, clean: Tensor, noisy: Tensor, timestep: int | Tensor) -> Tensor:
        """The noise that lies between a clean and a noisy state: the inverse of `add_noise`.

        Args:
            clean: (B, K, *spatial).
            noisy: (B, K, *spatial).
            timestep: 0..T-1.

        Returns:
            epsilon.
        """
        clean, noisy = at_least_float32(clean), at_least_float32(noisy)
        signal, spread = self.signal_and_spread(timestep, noisy)
        return (noisy - signal * clean) / spread

    def posterior(
        self, clean: Tensor, noisy: Tensor, timestep: int | Tensor, previous: int | Tensor
    ) -> GaussianPosterior:
        """q(x_previous | x_timestep, x_0) for any earlier timestep (Ho et al. 2020, Eq. 6-7, on a grid with gaps).

        Args:
            clean: (B, K, *spatial).
            noisy: (B, K, *spatial), the state at `timestep`.
            timestep: 0..T-1.
            previous: -1..timestep-1; -1 is the clean state, whose mean is `clean` and whose variance is 0.

        Returns:
            Mean and variance.

        Raises:
            ValueError: `previous` is not before `timestep` (checked for ints).
        """
        if isinstance(timestep, int) and isinstance(previous, int) and previous >= timestep:
            raise ValueError(f"previous is {previous}; it must be before timestep {timestep}")
        clean, noisy = at_least_float32(clean), at_least_float32(noisy)
        now = self.schedule.exact(timestep, noisy.ndim)
        before = self.schedule.exact(previous, noisy.ndim)
        # Noising from `previous` to `timestep` keeps this share of the variance; 1 - kept is the paper's beta.
        kept = now / before
        # Ho et al. 2020, Eq. 7: the mean's weights
        of_clean = before.sqrt() * (1 - kept) / (1 - now)
        of_noisy = kept.sqrt() * (1 - before) / (1 - now)
        # Ho et al. 2020, Eq. 7: beta-tilde, the smaller of the two fixed variances.
        variance = (1 - kept) * (1 - before) / (1 - now)
        mean = cast_like(of_clean, noisy) * clean + cast_like(of_noisy, noisy) * noisy
        return GaussianPosterior(mean, cast_like(variance, noisy))

    def step(
        self, clean: Tensor, noisy: Tensor, timestep: int, previous: int, *, eta: float = 0.0, generator: Random = None
    ) -> Tensor:
        """Return the next state of DDIM (Song et al. 2021, Eq. 12 and 16).

        Args:
            clean: estimate of the clean state, (B, K, *spatial).
            noisy: the state at `timestep`, same shape.
            timestep: 0..T-1.
            previous: -1..timestep-1.
            eta: 0 (deterministic) to 1 (a draw of the posterior).
            generator: source of the random numbers; unused at eta = 0.

        Returns:
            The state at `previous`.
        """
        now, before = (self.schedule.exact(t, noisy.ndim) for t in (timestep, previous))
        # Eq. 16, squared; at eta = 1 it is the posterior's variance.
        variance = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
        # Eq. 12: predicted clean state, direction pointing to the noisy state, random noise.
        direction = cast_like((1 - before - variance).clamp(min=0).sqrt(), noisy)
        state = cast_like(before.sqrt(), noisy) * clean + direction * self.to_noise(clean, noisy, timestep)
        return state + cast_like(variance.sqrt(), noisy) * normal_like(noisy, generator) if eta > 0 else state

    def signal_and_spread(self, timestep: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at a timestep, to be multiplied with `like` (B, ...)."""
        # Both roots are taken in float64: 1 - alpha_bar of timestep 0 has three digits left in float32.
        alpha_bar = self.schedule.exact(timestep, like.ndim)
        return cast_like(alpha_bar.sqrt(), like), cast_like((1 - alpha_bar).sqrt(), like)
