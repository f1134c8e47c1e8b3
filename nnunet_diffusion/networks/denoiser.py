"""Interface of a denoiser: one call for the image and one for the noisy state, so that an image is encoded only once."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor


def repeat_images(features: Tensor, samples: int) -> Tensor:
    """Repeat each image's features (B, C, *spatial) `samples` times, those of one image adjacent; one image needs no memory."""
    return features.unsqueeze(1).expand(-1, samples, *features.shape[1:]).flatten(0, 1)


class Condition(Protocol):
    """Encoded images, as input of the denoising side; independent of the noisy states."""

    def repeat_interleave(self, samples: int) -> Condition:
        """Repeat each image's condition for `samples` noisy states; the states of one image are adjacent."""


SomeCondition = TypeVar("SomeCondition", bound=Condition)


class Denoiser(Protocol[SomeCondition]):
    """A network that maps noisy states (B, K, *spatial) to the quantity given by its prediction type."""

    @property
    def state_channels(self) -> int:
        """K."""

    def encode(
        self, image: Tensor, timestep: Tensor | None = None, features: tuple[Tensor, ...] | None = None
    ) -> SomeCondition:
        """Return the condition of images (B, C, *spatial) at timesteps (B,), and of the pre-segmentor's features if needed."""

    def __call__(self, noisy: Tensor, timestep: Tensor, condition: SomeCondition) -> Tensor:
        """Return the prediction, (B, output channels, *spatial)."""
