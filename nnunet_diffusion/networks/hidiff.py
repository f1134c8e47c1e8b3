"""HiDiff's refiner (Chen et al. 2024): a U-Net on nnU-Net's topology, guided by the segmentor's mask and encoder features.

It sees the image, the noisy state y_t and the segmentor's probabilities p, and predicts of each voxel whether y_t differs
from the clean state, beyond what y_t and p alone say. Written from the paper's description: the published code has no licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_diffusion.networks.attention import attend, pool_tokens
from nnunet_diffusion.networks.binary import BinaryConv
from nnunet_diffusion.networks.blocks import (
    check_topology,
    group_norm,
    make_conv,
    output_head,
    per_axis,
    pointwise,
    resolve_conv_op,
)
from nnunet_diffusion.networks.denoiser import repeat_images
from nnunet_diffusion.networks.time_embedding import TimeEmbedding, TimeShift


@dataclass(frozen=True)
class Guidance:
    """What the segmentor gives the refiner for its images; independent of the noisy state.

    Attributes:
        image: the image, where the refiner sees it, then p: (B, C + K, *spatial).
        prior: p itself, (B, K, *spatial).
        features: the segmentor's encoder features, one tensor for each stage that uses them, (B, C, *size of the stage).
    """

    image: Tensor
    prior: Tensor
    features: tuple[Tensor, ...]

    def repeat_interleave(self, samples: int) -> Guidance:
        """Repeat each image's guidance for `samples` noisy states; the states of one image are adjacent."""
        features = tuple(repeat_images(each, samples) for each in self.features)
        return Guidance(repeat_images(self.image, samples), repeat_images(self.prior, samples), features)


class RefinerBlock(nn.Module):
    """Two (GroupNorm - SiLU - convolution) with the time embedding between them and a residual connection (Ho et al. 2020).

    Binarised, both convolutions are `BinaryConv`s, whose sign takes the place of the SiLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        conv_op: type[nn.Module],
        time_width: int,
        binary: bool,
    ) -> None:
        """Build the block."""
        super().__init__()

        def part(channels: int) -> nn.ModuleList:
            if binary:
                return nn.ModuleList(
                    [group_norm(channels), BinaryConv(channels, out_channels, kernel_size, conv_op, time_width)]
                )
            conv = make_conv(conv_op, channels, out_channels, kernel_size)
            return nn.ModuleList([nn.Sequential(group_norm(channels), nn.SiLU()), conv])

        self.binary = binary
        self.first, self.second = part(in_channels), part(out_channels)
        self.time = TimeShift(time_width, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else pointwise(conv_op, in_channels, out_channels)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Map (B, in_channels, *spatial) to (B, out_channels, *spatial)."""
        found = self.time(self._part(self.first, features, time), time)
        return self.shortcut(features) + self._part(self.second, found, time)

    def _part(self, part: nn.ModuleList, features: Tensor, time: Tensor) -> Tensor:
        norm, conv = part
        return conv(norm(features), time) if self.binary else conv(norm(features))


class TwoWayAttention(nn.Module):
    """Cross-attention between refiner and segmentor at the lowest stage, in both directions, merged by a convolution."""

    def __init__(self, channels: int, guide_channels: int, conv_op: type[nn.Module], tokens: int) -> None:
        """Build the projections; keys and values are pooled to at most `tokens` voxels."""
        super().__init__()
        self.tokens = tokens
        self.adapt = pointwise(conv_op, guide_channels, channels, bias=False)
        names = ("ours", "theirs")
        self.norm = nn.ModuleDict({name: group_norm(channels) for name in names})
        self.query = nn.ModuleDict({name: pointwise(conv_op, channels, channels) for name in names})
        self.key = nn.ModuleDict({name: pointwise(conv_op, channels, channels, bias=False) for name in names})
        self.value = nn.ModuleDict({name: pointwise(conv_op, channels, channels) for name in names})
        self.merge = pointwise(conv_op, 2 * channels, channels)

    def forward(self, features: Tensor, guide: Tensor) -> Tensor:
        """Map features (B, channels, *spatial) and the segmentor's (B, guide_channels, *spatial) to (B, channels, *spatial)."""
        guide = self.adapt(guide)
        ours, theirs = self.norm["ours"](features), self.norm["theirs"](guide)
        found = (features + self._attended("ours", ours, theirs), guide + self._attended("theirs", theirs, ours))
        return features + self.merge(torch.cat(found, 1))

    def _attended(self, name: str, seeking: Tensor, seen: Tensor) -> Tensor:
        pooled = pool_tokens(seen, self.tokens)
        return attend(self.query[name](seeking), self.key[name](pooled), self.value[name](pooled))


class HiDiffRefiner(nn.Module):
    """Refiner with two calls: `encode` takes image, p and the segmentor's features, `forward` the noisy state."""

    def __init__(
        self,
        image_channels: int,
        state_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernel_sizes: Sequence[int | Sequence[int]],
        conv_op: type[nn.Module] | str,
        *,
        guide_channels: Sequence[int],
        image_input: bool = True,
        binary: bool = False,
        attention_tokens: int = 1024,
    ) -> None:
        """Build the network on nnU-Net's topology.

        Args:
            image_channels: channels of the image.
            state_channels: channels of the noisy state, K.
            features_per_stage: channels per stage, at least two stages.
            strides: downsampling before each stage, the first all ones.
            kernel_sizes: odd kernel size per stage.
            conv_op: the convolution class, or its dotted name; it decides between 2D and 3D.
            guide_channels: channels of the segmentor's encoder at each stage.
            image_input: whether the refiner sees the image itself, beside p and the segmentor's features.
            binary: whether the blocks' convolutions are binarised.
            attention_tokens: largest number of keys and values; more are pooled.

        Raises:
            ValueError: if the topology or an option is not valid.
        """
        super().__init__()
        conv_op = resolve_conv_op(conv_op)
        widths = [int(width) for width in features_per_stage]
        stride, kernel = per_axis("strides", strides, conv_op), per_axis("kernel_sizes", kernel_sizes, conv_op)
        check_topology(widths, stride, kernel)
        if len(guide_channels) != len(widths):
            raise ValueError(f"guide_channels must have one entry per stage ({len(widths)}), got {len(guide_channels)}")
        if attention_tokens < 1:
            raise ValueError(f"attention_tokens must be at least 1, got {attention_tokens}")
        self.image_channels, self.state_channels, self.image_input = image_channels, state_channels, image_input
        last, time_width = len(widths) - 1, 8 * widths[0]
        # features from a quarter of the resolution on; of three stages, those of the middle one
        self.guided = tuple(range(max(1, min(2, last - 1)), last))
        self.time_embedding = TimeEmbedding(4 * widths[0], time_width)

        def block(channels: int, width: int, stage: int) -> RefinerBlock:
            return RefinerBlock(channels, width, kernel[stage], conv_op, time_width, binary)

        seen = image_channels * image_input + 2 * state_channels
        # zero padding would mean certain background for a state of 0 and 1
        self.stem = make_conv(conv_op, seen, widths[0], kernel[0], padding_mode="replicate")
        self.down = nn.ModuleList(
            nn.Identity() if stage == 0 else make_conv(conv_op, widths[stage - 1], width, kernel[stage], stride[stage])
            for stage, width in enumerate(widths)
        )
        self.blocks = nn.ModuleList(
            block(width + guide_channels[stage] * (stage in self.guided), width, stage)
            for stage, width in enumerate(widths)
        )
        self.exchange = TwoWayAttention(widths[-1], guide_channels[-1], conv_op, attention_tokens)
        self.bottleneck = block(widths[-1], widths[-1], last)
        self.up = nn.ModuleList(
            make_conv(conv_op, widths[stage + 1], widths[stage], kernel[stage]) for stage in reversed(range(last))
        )
        self.merge = nn.ModuleList(block(2 * widths[stage], widths[stage], stage) for stage in reversed(range(last)))
        self.output = output_head(widths[0], state_channels, kernel[0], conv_op)
        # so that before training the result is the segmentor's
        for parameter in self.output[-1].parameters():
            nn.init.zeros_(parameter)

    @property
    def is_trained(self) -> bool:
        """Whether it adds anything to what the segmentor says."""
        return any(bool(parameter.any()) for parameter in self.output[-1].parameters())

    def encode(
        self, image: Tensor, timestep: Tensor | None = None, features: Sequence[Tensor] | None = None
    ) -> Guidance:
        """Return what guides the refinement of images.

        Args:
            image: the image and p, (B, image_channels + K, *spatial).
            timestep: ignored; the guidance is the same at every timestep.
            features: the segmentor's encoder features, one tensor for each stage.

        Raises:
            ValueError: the number of channels is wrong, or the features are missing.
        """
        channels = self.image_channels + self.state_channels
        if image.shape[1] != channels:
            raise ValueError(f"image must have {channels} channels, those of p last, got shape {tuple(image.shape)}")
        if features is None:
            raise ValueError("features are missing: the refiner is guided by those of the segmentor's encoder")
        used = tuple(features[stage] for stage in (*self.guided, len(self.blocks) - 1))
        prior = image[:, self.image_channels :]
        return Guidance(image if self.image_input else prior, prior, used)

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Guidance) -> Tensor:
        """Return what image and features add to the logit of a flip, |y_t - y_0|, (B, K, *spatial); 0 before training.

        Args:
            noisy: y_t, (B, K, *spatial), 0 and 1.
            timestep: (B,) integers.
            condition: from `encode`, with the same B and spatial size.
        """
        time = self.time_embedding(timestep)
        guides = iter(condition.features)
        features = self.stem(torch.cat((condition.image, noisy.to(condition.image)), 1))
        skips: list[Tensor] = []
        for stage, (down, block) in enumerate(zip(self.down, self.blocks, strict=True)):
            features = down(features)
            if stage in self.guided:
                features = torch.cat((features, next(guides)), 1)
            features = block(features, time)
            skips.append(features)
        features = self.bottleneck(self.exchange(skips.pop(), next(guides)), time)
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = skips.pop()
            # to the skip's size, not by a factor, to restore odd sizes
            larger = functional.interpolate(features, size=skip.shape[2:], mode="nearest")
            features = merge(torch.cat((up(larger), skip), 1), time)
        return self.output(features)
