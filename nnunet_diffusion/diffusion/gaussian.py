"""Gaussian diffusion of a segmentation state (DDPM): noising, posterior, and what a network may predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_diffusion.diffusion.schedules import NoiseSchedule, cast_like

PREDICTION_TYPES = ("epsilon", "x0", "v", "logits")


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is float32 or float64, else a float32 copy.

    Args:
        tensor: any shape and dtype.

    Returns:
        The tensor, same shape.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Posterior:
    """The normal distribution q(x_previous | x_timestep, x_0).

    Attributes:
        mean: (B, K, *spatial).
        variance: (B, 1, ..., 1), or a scalar () where both timesteps are ints; the same for every voxel.
    """

    mean: Tensor
    variance: Tensor


class GaussianDiffusion:
    """Noising process of a state in [-1, 1] and the conversions between prediction types; it has no parameters.

    Everywhere: states are (B, K, *spatial); a timestep is an int or a long tensor (B,), 0..T-1; results are float32,
    or float64 where the input is.

    Args:
        schedule: the noise schedule.
        prediction_type: what the network predicts: epsilon (the noise), x0 (the clean state), v (Salimans and Ho 2022)
            or logits (class logits of the clean state).
        activation: turns logits into probabilities (softmax over K, or sigmoid); used by "logits" only.
        clamp: whether `to_clean` clamps to [-1, 1] unless told otherwise.

    Raises:
        ValueError: an unknown prediction type, or "logits" without an activation.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        activation: Callable[[Tensor], Tensor] | None = None,
        clamp: bool = False,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; known types: {', '.join(PREDICTION_TYPES)}")
        if prediction_type == "logits" and activation is None:
            raise ValueError("activation is None; prediction_type 'logits' needs softmax or sigmoid")
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.activation = activation
        self.clamp = clamp

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
        signal, spread = self._signal_and_spread(timestep, clean)
        if in_place:
            return noise.mul_(spread).add_(clean.mul_(signal))
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """What a network of this prediction type should return for `add_noise(clean, noise, timestep)`.

        Args:
            clean: (B, K, *spatial).
            noise: (B, K, *spatial).
            timestep: 0..T-1.

        Returns:
            The regression target.

        Raises:
            ValueError: the prediction type is "logits", which is trained on labels.
        """
        if self.prediction_type == "epsilon":
            return at_least_float32(noise)
        if self.prediction_type == "x0":
            return at_least_float32(clean)
        if self.prediction_type == "v":
            # Salimans and Ho 2022, appendix D: v = alpha * epsilon - sigma * x_0.
            clean, noise = at_least_float32(clean), at_least_float32(noise)
            signal, spread = self._signal_and_spread(timestep, clean)
            return signal * noise - spread * clean
        raise ValueError("prediction_type 'logits' has no regression target; train it on the labels")

    def to_clean(
        self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, *, clamp: bool | None = None
    ) -> Tensor:
        """Estimate of the clean state that a prediction amounts to.

        Args:
            prediction: (B, K, *spatial), the network's answer, also in half precision.
            noisy: (B, K, *spatial), what the network saw.
            timestep: 0..T-1.
            clamp: whether to clamp to [-1, 1]; the process's own setting if None.

        Returns:
            The clean estimate; for logits it is 2 * probabilities - 1 and so always within [-1, 1].
        """
        prediction, noisy = at_least_float32(prediction), at_least_float32(noisy)
        signal, spread = self._signal_and_spread(timestep, noisy)
        if self.prediction_type == "epsilon":
            clean = (noisy - spread * prediction) / signal
        elif self.prediction_type == "v":
            clean = signal * noisy - spread * prediction
        elif self.activation is not None and self.prediction_type == "logits":
            clean = 2 * self.activation(prediction) - 1
        else:
            clean = prediction
        return clean.clamp(-1, 1) if (self.clamp if clamp is None else clamp) else clean

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
        signal, spread = self._signal_and_spread(timestep, noisy)
        return (noisy - signal * clean) / spread

    def posterior(self, clean: Tensor, noisy: Tensor, timestep: int | Tensor, previous: int | Tensor) -> Posterior:
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
        of_clean = before.sqrt() * (1 - kept) / (1 - now)
        of_noisy = kept.sqrt() * (1 - before) / (1 - now)
        # Ho et al. 2020, Eq. 7: beta-tilde, the smaller of the two fixed variances.
        variance = (1 - kept) * (1 - before) / (1 - now)
        mean = cast_like(of_clean, noisy) * clean + cast_like(of_noisy, noisy) * noisy
        return Posterior(mean, cast_like(variance, noisy))

    def _signal_and_spread(self, timestep: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # Both roots are taken in float64: 1 - alpha_bar of timestep 0 has three digits left in float32.
        alpha_bar = self.schedule.exact(timestep, like.ndim)
        return cast_like(alpha_bar.sqrt(), like), cast_like((1 - alpha_bar).sqrt(), like)
