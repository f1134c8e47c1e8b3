"""nnU-Net's own network as denoiser: the noisy segmentation as further input, the timestep as scale and shift.

With nnU-Net's trained weights, and all new weights 0, it is nnU-Net before its training as a denoiser begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffusion.networks import unet
from nnunet_diffusion.networks.denoiser import repeat_images
from nnunet_diffusion.networks.time_embedding import TimeEmbedding

TIME_WIDTH = 128


@dataclass(frozen=True)
class ImageCondition:
    """The image itself (B, C, *spatial), which this denoiser sees beside the noisy state."""

    image: Tensor

    def repeat_interleave(self, samples: int) -> ImageCondition:
        """Repeat each image for `samples` noisy states; the states of one image are adjacent. It needs no memory for one."""
        return ImageCondition(repeat_images(self.image, samples))


class NoisyUNet(nn.Module):
    """Denoiser made of nnU-Net's network, with the timestep as scale and shift after each encoder stage (Perez et al. 2018).

    Args:
        network: nnU-Net's network for `image_channels + state_channels` input channels.
        image_channels: channels of the image.
        state_channels: channels of the noisy state, K.
        deep_supervision: whether training uses the outputs of coarser decoder stages too.

    Raises:
        NotImplementedError: the network is not one of nnU-Net's U-Nets.
    """

    def __init__(
        self, network: nn.Module, image_channels: int, state_channels: int, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        unet.refuse_other_architectures(network, "diffusion.network.denoiser 'nnunet'")
        self.image_channels, self.state_channels = image_channels, state_channels
        self.network, self.deep_supervision = network, deep_supervision
        unet.freeze_unused_outputs(network, deep_supervision)
        channels: Any = network.encoder.output_channels  # type: ignore[union-attr]
        self.time_embedding = TimeEmbedding(TIME_WIDTH // 2, TIME_WIDTH)
        self.scale_and_shift = nn.ModuleList(nn.Linear(TIME_WIDTH, 2 * int(width)) for width in channels)
        for project in self.scale_and_shift:
            nn.init.zeros_(project.weight)  # type: ignore[arg-type]
            nn.init.zeros_(project.bias)  # type: ignore[arg-type]

    def start_from(self, weights: Mapping[str, Tensor]) -> bool:
        """Take over nnU-Net's weights; those of the noisy state's input channels become 0.

        A network that has been trained before (`-pretrained_weights`, for which nnU-Net leaves out the last layers) takes over
        the last layers only.

        Args:
            weights: state dict of the same network for `image_channels` input channels.

        Returns:
            Whether all weights were taken over.

        Raises:
            ValueError: the weights are of another network.
        """
        fresh = not any(bool(parameter.any()) for parameter in self.scale_and_shift.parameters())
        own, widened = self.network.state_dict(), {}
        for key, value in own.items():
            if not fresh and ".seg_layers." not in key:
                continue
            given = weights.get(key)
            if given is not None and value.ndim > 1 and given.shape[1:2] != value.shape[1:2]:
                blank = value.new_zeros(len(given), self.state_channels, *given.shape[2:])
                given = torch.cat((given.to(value), blank), 1)
            if given is None or given.shape != value.shape:
                raise ValueError(
                    f"These weights are not of the denoiser's nnU-Net: {key} has shape {tuple(value.shape)} there, and "
                    f"{None if given is None else tuple(given.shape)} in the weights with the state's channels."
                )
            widened[key] = given
        self.network.load_state_dict({**own, **widened})
        return fresh

    def encode(
        self, image: Tensor, timestep: Tensor | None = None, features: tuple[Tensor, ...] | None = None
    ) -> ImageCondition:
        """Return the image (B, image_channels, *spatial) as the condition."""
        return ImageCondition(image)

    def forward(self, noisy: Tensor, timestep: Tensor, condition: ImageCondition) -> Tensor:
        """Return logits (B, K, *spatial) for a noisy state (B, K, *spatial) at timesteps (B,)."""
        return self._decoded(noisy, timestep, condition)[0]

    def outputs(self, noisy: Tensor, timestep: Tensor, condition: ImageCondition) -> tuple[Tensor, ...]:
        """Return the logits of `forward` and, with deep supervision, those of coarser decoder stages, fine to coarse."""
        logits, decoded = self._decoded(noisy, timestep, condition)
        return (logits, *unet.deep_logits(self.network, decoded)) if self.deep_supervision else (logits,)

    def _decoded(self, noisy: Tensor, timestep: Tensor, condition: ImageCondition) -> tuple[Tensor, list[Tensor]]:
        time = self.time_embedding(timestep)

        def modulate(stage: int, features: Tensor) -> Tensor:
            scale, shift = self.scale_and_shift[stage](time).reshape(len(time), -1, *[1] * (noisy.ndim - 2)).chunk(2, 1)
            return features * (1 + scale) + shift

        # the first convolution is linear: its part for the image is nnU-Net's, its part for the state begins at 0
        skips = unet.encode(self.network, torch.cat((condition.image, noisy.to(condition.image)), 1), modulate)
        return unet.decode(self.network, skips)
