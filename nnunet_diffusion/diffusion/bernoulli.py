"""Binary Bernoulli diffusion towards a prior (HiDiff, Chen et al. 2024): noising, posterior and the non-Markov step.

A state is 0 or 1 in each of K independent channels. Noise replaces a share of the voxels by draws of a prior p, the
segmentor's probability: the chain ends at the segmentor's own distribution, not at a coin toss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.gaussian import at_least_float32
from nnunet_diffusion.diffusion.process import Random, check_start_step
from nnunet_diffusion.diffusion.schedules import NoiseSchedule, cast_like

LEAST = 1e-6
"""Smallest prior probability of either value: at p = y_0 = 0 the posterior of y_t = 1 would be 0 / 0."""


Uniform = Callable[[Sequence[int], torch.Generator | None], Tensor]
"""Shape (B, K, *spatial) and generator -> noise, uniform in [0, 1) in each voxel, float32, on the generator's device."""


def independent(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return noise that each voxel draws by itself; see `Uniform`."""
    device = None if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True)
class BernoulliPosterior:
    """The distribution q(y_previous | y_timestep, y_0).

    Attributes:
        probability: of the value 1, (B, K, *spatial).
    """

    probability: Tensor

    def draw(self, generator: Random = None) -> Tensor:
        """Return a state (B, K, *spatial) of 0 and 1."""
        return bernoulli(self.probability, uniform_like(self.probability, generator))


@dataclass(frozen=True)
class BernoulliProcess:
    """Noise that replaces voxels of a state of 0 and 1 by draws of a prior; see `Process`. Its noise is uniform in [0, 1).

    Attributes:
        schedule: alpha_bar is the share of voxels that noise has not replaced.
        prior: the segmentor's probabilities p, (B, K, *spatial), of the states that the process is given; None until `towards`
            names them.
        uniform: source of its noise. Voxels of one image may share their noise: the probability of each alone is the same.
    """

    schedule: NoiseSchedule
    prior: Tensor | None = None
    uniform: Uniform = independent

    def towards(self, prior: Tensor | None) -> BernoulliProcess:
        """Return the process with this prior, (B, K, *spatial) or broadcast against it."""
        return dataclasses.replace(self, prior=prior)

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return uniform noise in [0, 1), (B, K, *spatial), float32, drawn on the generator's device."""
        return self.uniform(shape, generator)

    def to_state(self, masks: Tensor) -> Tensor:
        """Return masks or probabilities as they are: a fresh tensor of the same shape."""
        return at_least_float32(masks).clone()

    def to_probabilities(self, state: Tensor, *, in_place: bool = False) -> Tensor:
        """Return a state or its estimate as it is: a fresh tensor, or with `in_place` the state."""
        return state if in_place else state.clone()

    def start(self, presegmentation: Tensor, start_step: int, noise: Tensor, *, in_place: bool = False) -> Tensor:
        """Return a draw of the pre-segmentation after T' noising steps; of the prior itself, of it at every T'.

        Args:
            presegmentation: probabilities in [0, 1], (B, K, *spatial).
            start_step: T', 1..T.
            noise: uniform in [0, 1), same shape.
            in_place: overwrite the noise by the result.

        Returns:
            The noisy state at timestep T' - 1.

        Raises:
            ValueError: start_step is outside 1..T.
        """
        check_start_step(start_step, self)
        if not in_place:
            return self.add_noise(presegmentation, noise, start_step - 1)
        # channel by channel: a volume fills the memory
        for channel in range(noise.shape[1]):
            part = (slice(None), slice(channel, channel + 1))
            own = self.towards(None if self.prior is None else self.prior[part])
            noise[part] = own.add_noise(presegmentation[part], noise[part], start_step - 1)
        return noise

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """Return the draw of q(y_t | y_0, p) made with the given uniform noise.

        Args:
            clean: (B, K, *spatial), 0 and 1, or their probabilities.
            noise: (B, K, *spatial), uniform in [0, 1).
            timestep: -1 (no noise) to T-1.

        Returns:
            The noisy state of 0 and 1.
        """
        clean = at_least_float32(clean)
        kept = self.schedule.at(timestep, clean)
        # q(y_t | y_0, p) = Bernoulli(alpha_bar_t y_0 + (1 - alpha_bar_t) p)
        return bernoulli(kept * clean + (1 - kept) * self._prior(clean), noise)

    def posterior(
        self, clean: Tensor, noisy: Tensor, timestep: int | Tensor, previous: int | Tensor
    ) -> BernoulliPosterior:
        """Return q(y_previous | y_timestep, y_0, p) for any earlier timestep, by Bayes' rule.

        Args:
            clean: y_0, (B, K, *spatial), 0 and 1, or an estimate between them.
            noisy: y_t, (B, K, *spatial), 0 and 1.
            timestep: 0..T-1.
            previous: -1..timestep-1; -1 is the clean state.

        Returns:
            The probability of 1; at `previous` -1 it is `clean`, where the noisy state is possible at all.

        Raises:
            ValueError: `previous` is not before `timestep` (checked for ints).
        """
        if isinstance(timestep, int) and isinstance(previous, int) and previous >= timestep:
            raise ValueError(f"previous is {previous}; it must be before timestep {timestep}")
        clean, noisy = at_least_float32(clean), at_least_float32(noisy)
        now, before = (self.schedule.exact(each, noisy.ndim) for each in (timestep, previous))
        # noising from `previous` to `timestep` keeps this share; 1 - kept is beta between neighbours
        kept, left, prior = cast_like(now / before, noisy), cast_like(before, noisy), self._prior(noisy)
        # |1 - y_t - p|: the prior's probability of the value y_t
        replaced = (1 - kept) * (1 - noisy - prior).abs()
        # theta_1 = q(y_t | y_previous = 1) q(y_previous = 1 | y_0), theta_0 likewise
        one = (kept * noisy + replaced) * (left * clean + (1 - left) * prior)
        zero = (kept * (1 - noisy) + replaced) * (left * (1 - clean) + (1 - left) * (1 - prior))
        return BernoulliPosterior(one / (one + zero))

    def clean_logit(self, noisy: Tensor, timestep: int | Tensor) -> Tensor:
        """Return the logit of y_0 = 1 as y_t and p alone tell it, by Bayes' rule with P(y_0 = 1) = p.

        Args:
            noisy: y_t, (B, K, *spatial), 0 and 1.
            timestep: 0..T-1.
        """
        noisy = at_least_float32(noisy)
        kept, prior = self.schedule.at(timestep, noisy), self._prior(noisy)
        # (1 - alpha_bar_t) |1 - y_t - p|: probability that noise put the value y_t there
        replaced = (1 - kept) * (1 - noisy - prior).abs()
        # P(y_0 = v | y_t) ~ P(y_0 = v) q(y_t | y_0 = v)
        return (prior * (kept * noisy + replaced)).log() - ((1 - prior) * (kept * (1 - noisy) + replaced)).log()

    def step(
        self, clean: Tensor, noisy: Tensor, timestep: int, previous: int, *, eta: float = 0.0, generator: Random = None
    ) -> Tensor:
        """Return the next state: a draw that keeps as many voxels of the noisy state as the marginals allow.

        Args:
            clean: estimate of y_0, (B, K, *spatial), in [0, 1].
            noisy: y_t, same shape.
            timestep: 0..T-1.
            previous: -1..timestep-1.
            eta: share of voxels that are drawn from the posterior instead, 0 to 1.
            generator: source of the random numbers.

        Returns:
            The state at `previous`, 0 and 1; at -1 the estimate itself.
        """
        clean = at_least_float32(clean)
        if previous < 0:
            return clean
        probability = self.step_mean(clean, noisy, timestep, previous)
        if eta > 0:
            # both have the marginals of q, and so has their mixture
            probability = torch.lerp(probability, self.posterior(clean, noisy, timestep, previous).probability, eta)
        return bernoulli(probability, uniform_like(probability, generator, self.uniform))

    def step_mean(self, clean: Tensor, noisy: Tensor, timestep: int, previous: int) -> Tensor:
        """Return the probability of 1 of the non-Markov step (as DDIM's, Song et al. 2021, appendix A); see `step`."""
        noisy = at_least_float32(noisy)
        now, before = (self.schedule.exact(each, noisy.ndim) for each in (timestep, previous))
        # sigma = (1 - alpha_bar_s) / (1 - alpha_bar_t), the largest at which all three weights are positive
        sigma = (1 - before) / (1 - now)
        # mean = sigma y_t + (alpha_bar_s - sigma alpha_bar_t) y_0 + (1 - alpha_bar_s - sigma (1 - alpha_bar_t)) p, whose last
        # weight is 0 at this sigma
        return cast_like(sigma, noisy) * noisy + cast_like(before - sigma * now, noisy) * clean

    def _prior(self, like: Tensor) -> Tensor:
        if self.prior is None:
            raise ValueError("The process has no prior: name the segmentor's probabilities first, by `towards`")
        return self.prior.to(like).clamp(LEAST, 1 - LEAST)


def bernoulli(probability: Tensor, noise: Tensor) -> Tensor:
    """Return 1 where uniform noise is below a probability, else 0, in the probability's dtype."""
    return (noise < probability).to(probability.dtype)


def uniform_like(state: Tensor, generator: Random, uniform: Uniform = independent) -> Tensor:
    """Return uniform noise in [0, 1) of a state's shape (B, K, *spatial) and device, float32.

    Args:
        state: whose shape and device it has.
        generator: also one for each entry of the batch; drawn on its device.
        uniform: source of the noise.
    """
    if isinstance(generator, Sequence):
        pairs = zip(state.split(1), generator, strict=True)
        return torch.cat([uniform_like(entry, source, uniform) for entry, source in pairs])
    return uniform(state.shape, generator).to(state.device)
