"""What a denoiser owes the rest of the program: two calls, so that what depends on the image alone is computed once."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor


class Condition(Protocol):
    """What the denoising side needs to know about images, none of which depends on the noisy states."""

    def repeat_interleave(self, samples: int) -> Condition:
        """Return the condition for `samples` noisy states per image, those of one image next to each other."""


SomeCondition = TypeVar("SomeCondition", bound=Condition)


class Denoiser(Protocol[SomeCondition]):
    """A network that predicts from noisy states (B, K, *spatial) what its prediction type says."""

    @property
    def state_channels(self) -> int:
        """K."""

    def encode(self, image: Tensor, timestep: Tensor | None = None) -> SomeCondition:
        """Return the condition of images (B, C, *spatial) at timesteps (B,)."""

    def __call__(self, noisy: Tensor, timestep: Tensor, condition: SomeCondition) -> Tensor:
        """Return the prediction, (B, output channels, *spatial)."""
