"""Branch that predicts which classes an image shows and roughly where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nnunet_diffusion.networks.blocks import make_conv, make_norm, pointwise


@dataclass(frozen=True)
class Prior:
    """Output of the prior-supervision branch for an image.

    Attributes:
        features: (B, features_per_stage[-1], *size of the last stage), added to the bottleneck.
        presence_logits: (B, presence_classes), one logit per foreground class.
        location_logits: (B, location_classes, *size of the last stage but one).
    """

    features: Tensor
    presence_logits: Tensor
    location_logits: Tensor


class PriorSupervision(nn.Module):
    """One block and one supervised unit per downsampling, with two supervised heads; PGDiffSeg, Eq. 7-10 and Fig. 5."""

    def __init__(
        self,
        image_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        conv_op: type[nn.Module],
        *,
        presence_classes: int,
        location_classes: int,
        norm: str,
    ) -> None:
        """Build the branch on the stages of nnU-Net's topology."""
        super().__init__()

        def block(in_channels: int, out_channels: int, stage: int, stride: Sequence[int] | int = 1) -> nn.Sequential:
            conv = make_conv(conv_op, in_channels, out_channels, kernel_sizes[stage], stride, bias=False)
            return nn.Sequential(conv, make_norm(norm, out_channels, conv_op), nn.ReLU(inplace=True))

        # Fig. 5: convolution - norm - ReLU
        self.block = block(image_channels, features_per_stage[0], 0)
        # Fig. 5: supervised units; the first block of each has the stride
        self.units = nn.ModuleList(
            nn.Sequential(
                block(features_per_stage[stage - 1], features_per_stage[stage], stage, tuple(strides[stage])),
                block(features_per_stage[stage], features_per_stage[stage], stage),
            )
            for stage in range(1, len(features_per_stage))
        )
        self.presence = nn.Linear(features_per_stage[-1], presence_classes)
        self.location = pointwise(conv_op, features_per_stage[-2], location_classes)

    def forward(self, image: Tensor) -> Prior:
        """Map an image (B, image_channels, *spatial) to its prior."""
        penultimate = last = self.block(image)
        for unit in self.units:
            penultimate, last = last, unit(last)
        # Eq. 7: presence by linear mapping of the pooled last features; Eq. 8-9: location from the penultimate unit
        return Prior(last, self.presence(last.flatten(2).mean(dim=2)), self.location(penultimate))
