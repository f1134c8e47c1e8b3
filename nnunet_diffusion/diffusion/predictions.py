"""What a network may predict: one small class each, with its target and its way to the clean state.

Everywhere: tensors are (B, K, *spatial), a timestep is an int or a long tensor (B,), 0..T-1; results are float32, or float64
where the input is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from nnunet_diffusion.diffusion.bernoulli import BernoulliProcess
from nnunet_diffusion.diffusion.gaussian import GaussianProcess, at_least_float32


class Prediction(Protocol):
    """A prediction type."""

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, process: Any) -> Tensor:
        """Return what a network should give for `process.add_noise(clean, noise, timestep)`."""

    def to_clean(self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: Any) -> Tensor:
        """Return the estimate of the clean state that a prediction, also in half precision, amounts to."""


@dataclass(frozen=True)
class Epsilon:
    """The noise (Ho et al. 2020).

    Attributes:
        clamp: clamp clean estimates to [-1, 1]: near T the error is divided by sqrt(alpha_bar), with the cosine schedule by up
            to 2e4.
    """

    clamp: bool = False

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return the noise."""
        return at_least_float32(noise)

    def to_clean(self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return (x_t - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar): PGDiffSeg Eq. 14, solved for x_0."""
        prediction, noisy = at_least_float32(prediction), at_least_float32(noisy)
        signal, spread = process.signal_and_spread(timestep, noisy)
        clean = (noisy - spread * prediction) / signal
        return clean.clamp(-1, 1) if self.clamp else clean


@dataclass(frozen=True)
class CleanState:
    """The clean state x_0 itself."""

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return the clean state."""
        return at_least_float32(clean)

    def to_clean(self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return the prediction."""
        return at_least_float32(prediction)


@dataclass(frozen=True)
class Velocity:
    """v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, appendix D)."""

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return v."""
        clean, noise = at_least_float32(clean), at_least_float32(noise)
        signal, spread = process.signal_and_spread(timestep, clean)
        return signal * noise - spread * clean

    def to_clean(self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
        prediction, noisy = at_least_float32(prediction), at_least_float32(noisy)
        signal, spread = process.signal_and_spread(timestep, noisy)
        return signal * noisy - spread * prediction


@dataclass(frozen=True)
class Logits:
    """Class logits of the clean state; trained on labels.

    Attributes:
        activation: logits -> probabilities: softmax over K, or a sigmoid for each region.
    """

    activation: Callable[[Tensor], Tensor]

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Raise ValueError: there is no regression target."""
        raise ValueError("prediction_type 'logits' has no regression target; train it on the labels")

    def to_clean(self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: GaussianProcess) -> Tensor:
        """Return the state of the probabilities, within [-1, 1]."""
        return process.to_state(self.activation(at_least_float32(prediction)))


@dataclass(frozen=True)
class Flip:
    """Of a Bernoulli process: how much the logit of a flip, y_t differing from y_0, is above that of y_t and p alone (HiDiff).

    A network that says 0 says what the segmentor says: at T its estimate of the clean state is p.
    """

    def target(self, clean: Tensor, noise: Tensor, timestep: int | Tensor, process: BernoulliProcess) -> Tensor:
        """Raise ValueError: there is no regression target."""
        raise ValueError("prediction_type 'flip' has no regression target; it is trained by HiDiff's objective")

    def to_clean(self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: BernoulliProcess) -> Tensor:
        """Return |y_t - flip|, the probability that the clean state is 1."""
        return self.clean_logit(prediction, noisy, timestep, process).sigmoid()

    def clean_logit(
        self, prediction: Tensor, noisy: Tensor, timestep: int | Tensor, process: BernoulliProcess
    ) -> Tensor:
        """Return the logit of y_0 = 1: where y_t is 0 that of a flip, where it is 1 minus that."""
        sign = 1 - 2 * at_least_float32(noisy)
        return process.clean_logit(noisy, timestep) + sign * at_least_float32(prediction)


PREDICTION_TYPES = ("epsilon", "x0", "v", "logits")
"""Of a Gaussian process."""
FLIP = "flip"
"""Of a Bernoulli process."""


def prediction_of(name: str, activation: Callable[[Tensor], Tensor], *, clamp_epsilon: bool = True) -> Prediction:
    """Return the prediction type of a name in the settings.

    Args:
        name: one of PREDICTION_TYPES, or FLIP.
        activation: of "logits".
        clamp_epsilon: see `Epsilon`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in (*PREDICTION_TYPES, FLIP):
        raise ValueError(f"prediction_type is {name!r}; known types: {', '.join((*PREDICTION_TYPES, FLIP))}")
    known: dict[str, Prediction] = {
        "epsilon": Epsilon(clamp_epsilon),
        "x0": CleanState(),
        "v": Velocity(),
        "logits": Logits(activation),
        FLIP: Flip(),
    }
    return known[name]
