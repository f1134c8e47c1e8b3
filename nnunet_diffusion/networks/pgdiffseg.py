"""PGDiffSeg: denoiser with a condition flow for the image and a denoising flow for the noisy segmentation.

Source: Feng et al. 2024, "PGDiffSeg: Prior-Guided Denoising Diffusion Model with Parameter-Shared Attention for Breast
Cancer Segmentation", built here on any topology of nnU-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_diffusion.networks.attention import ATTENTIONS, FLOWS, ParameterSharedAttention, SelfAttention
from nnunet_diffusion.networks.blocks import (
    ResidualBlock,
    SlimDenseBlock,
    check_topology,
    group_norm,
    make_conv,
    output_head,
    per_axis,
    pointwise,
    resolve_conv_op,
)
from nnunet_diffusion.networks.denoiser import repeat_images
from nnunet_diffusion.networks.prior_supervision import PriorSupervision
from nnunet_diffusion.networks.time_embedding import TimeEmbedding, TimeShift

GUIDANCES = ("paper", "normalised")


@dataclass(frozen=True)
class Condition:
    """Encoded image, as input of the denoising side; independent of the noisy state.

    Attributes:
        skips: features of the condition flow before each downsampling, (B, features_per_stage[i + 1], *size of stage i).
        bottleneck: last features of the condition flow, (B, features_per_stage[-1], *size of the last stage).
        prior: features of the prior-supervision branch, same shape as the bottleneck.
        presence_logits: (B, presence_classes), one logit per foreground class.
        location_logits: (B, location_classes, *size of the last stage but one).
        attended: with attention "cross", features of the condition flow after each unit with attention, in their order.
    """

    skips: tuple[Tensor, ...]
    bottleneck: Tensor
    prior: Tensor
    presence_logits: Tensor
    location_logits: Tensor
    attended: tuple[Tensor, ...] = ()

    def repeat_interleave(self, samples: int) -> Condition:
        """Repeat each image's condition for `samples` noisy states; the states of one image are adjacent.

        For a batch of one image this needs no additional memory.
        """
        repeat = partial(repeat_images, samples=samples)
        return Condition(
            tuple(repeat(skip) for skip in self.skips),
            repeat(self.bottleneck),
            repeat(self.prior),
            repeat(self.presence_logits),
            repeat(self.location_logits),
            tuple(repeat(features) for features in self.attended),
        )


class EncoderUnit(nn.Module):
    """Denoising unit or condition unit: time embedding, residual block, downsampling; PGDiffSeg, Fig. 12a."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        down_kernel_size: Sequence[int],
        stride: Sequence[int],
        conv_op: type[nn.Module],
        time_width: int | None,
    ) -> None:
        """Build the unit; without a time embedding if `time_width` is None."""
        super().__init__()
        self.time = None if time_width is None else TimeShift(time_width, in_channels)
        self.residual = ResidualBlock(in_channels, out_channels, kernel_size, conv_op)
        self.down = make_conv(conv_op, out_channels, out_channels, down_kernel_size, stride)

    def forward(self, features: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the features before and after downsampling."""
        if self.time is not None:
            features = self.time(features, time)
        skip = self.residual(features)
        return skip, self.down(skip)


class UpUnit(nn.Module):
    """Time embedding, upsampling, concatenation with the skip, residual block; PGDiffSeg, Fig. 12c."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        conv_op: type[nn.Module],
        time_width: int,
        map_channels: int = 0,
    ) -> None:
        """Build the unit for a skip of `in_channels` and, with normalised guidance, `map_channels` of a location map."""
        super().__init__()
        self.time = TimeShift(time_width, in_channels)
        self.up = make_conv(conv_op, in_channels, in_channels, kernel_size)
        self.residual = ResidualBlock(2 * in_channels + map_channels, out_channels, kernel_size, conv_op)

    def forward(self, features: Tensor, skip: Tensor, time: Tensor, location: Tensor | None = None) -> Tensor:
        """Map features (B, in_channels, *smaller) and the skip (B, in_channels, *spatial) to the skip's size.

        A location map (B, map_channels, *any) is brought to that size too.
        """
        # upsample to the skip's size, not by a factor, to restore odd sizes
        larger = functional.interpolate(self.time(features, time), size=skip.shape[2:], mode="nearest")
        parts = [self.up(larger), skip]
        if location is not None:
            parts.append(functional.interpolate(location, size=skip.shape[2:], mode="nearest"))
        return self.residual(torch.cat(parts, dim=1))


class PGDiffSeg(nn.Module):
    """Denoiser with two calls: `encode` takes the image, `forward` the noisy state and the encoded image.

    The condition flow depends only on the image and the timestep (without time in that flow, only on the image). So one
    call of `encode` serves all samples of an ensemble. Any spatial size works: upsampling restores the skip's size.
    """

    def __init__(
        self,
        image_channels: int,
        state_channels: int,
        output_channels: int,
        features_per_stage: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernel_sizes: Sequence[int | Sequence[int]],
        conv_op: type[nn.Module] | str,
        *,
        presence_classes: int,
        location_classes: int,
        sdb_depth: int = 4,
        attention_tokens: int = 4096,
        attention_stages: Sequence[int] | None = None,
        norm: str = "batch",
        time_in_condition_flow: bool = True,
        guidance: str = "paper",
        attention: str = "paper",
        feature_channels: Sequence[int] | None = None,
    ) -> None:
        """Build the network on nnU-Net's topology.

        Args:
            image_channels: channels of the input of the condition flow.
            state_channels: channels of the noisy state.
            output_channels: channels of the prediction.
            features_per_stage: channels per stage, at least two stages; the first is the slim dense blocks' width.
            strides: downsampling before each stage, the first all ones.
            kernel_sizes: odd kernel size per stage.
            conv_op: the convolution class, or its dotted name; it decides between 2D and 3D.
            presence_classes: number of foreground classes whose presence the prior branch predicts.
            location_classes: number of channels of the location map.
            sdb_depth: layers of each slim dense block (paper: 4).
            attention_tokens: largest number of keys and values; more are pooled (4096: exact in the paper's configuration).
            attention_stages: stages with parameter-shared attention, from 1 to n_stages - 1; None: all (paper).
            norm: "batch" (paper), "instance" or "group", in the slim dense blocks and the prior branch.
            time_in_condition_flow: whether the condition flow sees the timestep (paper: yes).
            guidance: "paper" adds the terms of Eq. 6 as they are; "normalised" normalises each of them first, and gives the
                location map to every up unit. Without it the sum hides the prior branch, whose features are 40 times smaller.
            attention: "paper", or "cross": the denoising flow attends to the condition flow.
            feature_channels: channels of the pre-segmentor's features at each stage, which then replace the image's dense block
                and the condition flow; None: the network encodes the image itself (the paper).

        Raises:
            NotImplementedError: `feature_channels` with attention "cross", which has no condition flow to attend to.
            ValueError: if the topology or an option is not valid.
        """
        super().__init__()
        conv_op = resolve_conv_op(conv_op)
        features = [int(width) for width in features_per_stage]
        strides = per_axis("strides", strides, conv_op)
        kernels = per_axis("kernel_sizes", kernel_sizes, conv_op)
        check_topology(features, strides, kernels)
        stages = range(1, len(features))
        attended = set(stages if attention_stages is None else attention_stages)
        if not attended <= set(stages):
            raise ValueError(f"attention_stages must lie in 1..{len(features) - 1}, got {sorted(attended)}")
        if attention_tokens < 1:
            raise ValueError(f"attention_tokens must be at least 1, got {attention_tokens}")
        if guidance not in GUIDANCES:
            raise ValueError(f"guidance must be one of {', '.join(GUIDANCES)}, got {guidance!r}")
        self.guidance, self.crosses = guidance, attention == ATTENTIONS[1]
        self.adapts = feature_channels is not None
        if self.adapts and self.crosses:
            raise NotImplementedError(
                "attention 'cross' needs a condition flow: choose 'paper', or no feature_channels"
            )
        self.image_channels, self.state_channels = image_channels, state_channels
        self.time_in_condition_flow = time_in_condition_flow
        time_width = 8 * features[0]
        self.time_embedding = TimeEmbedding(4 * features[0], time_width)

        def dense(channels: int) -> SlimDenseBlock:
            return SlimDenseBlock(channels, features[0], kernels[0], conv_op, depth=sdb_depth, norm=norm)

        def flow(width: int | None) -> nn.ModuleList:
            return nn.ModuleList(
                EncoderUnit(features[s - 1], features[s], kernels[s - 1], kernels[s], strides[s], conv_op, width)
                for s in stages
            )

        # Fig. 2a: feature pre-extraction; Fig. 2b: the two parallel flows, and parameter-shared attention after each unit
        # the order of the parameters is that of the optimizer's state in checkpoints
        if feature_channels is None:
            self.image_dense, self.noisy_dense = dense(image_channels), dense(state_channels)
            self.condition_flow = flow(time_width if time_in_condition_flow else None)
        else:
            self.noisy_dense = dense(state_channels)
            widths = [*features[1:], features[-1]]
            self.feature_adapters = nn.ModuleList(
                nn.Sequential(pointwise(conv_op, seen, width, bias=False), group_norm(width))
                for seen, width in zip(feature_channels, widths, strict=True)
            )
        self.denoising_flow = flow(time_width)
        flows = FLOWS if feature_channels is None else FLOWS[1:]
        self.attention = nn.ModuleDict(
            {
                str(s): ParameterSharedAttention(features[s], conv_op, attention_tokens, attention, flows)
                for s in sorted(attended)
            }
        )
        # Fig. 2c: prior knowledge guidance
        self.prior = PriorSupervision(
            image_channels,
            features,
            strides,
            kernels,
            conv_op,
            presence_classes=presence_classes,
            location_classes=location_classes,
            norm=norm,
        )
        normalised = guidance == "normalised"
        self.guidance_norms = nn.ModuleList(group_norm(features[-1]) for _ in range(3 * normalised))
        # Fig. 2d, 12b: residual - self-attention - residual
        self.bottleneck = nn.Sequential(
            ResidualBlock(features[-1], features[-1], kernels[-1], conv_op),
            SelfAttention(features[-1], conv_op, attention_tokens),
            ResidualBlock(features[-1], features[-1], kernels[-1], conv_op),
        )
        # Fig. 2e: up units, from the deepest to the full resolution
        self.up_units = nn.ModuleList(
            UpUnit(features[s], features[s - 1], kernels[s - 1], conv_op, time_width, location_classes * normalised)
            for s in reversed(stages)
        )
        self.output = output_head(features[0], output_channels, kernels[0], conv_op)

    def encode(
        self, image: Tensor, timestep: Tensor | None = None, features: Sequence[Tensor] | None = None
    ) -> Condition:
        """Encode the image for the denoising side.

        Args:
            image: (B, image_channels, *spatial).
            timestep: (B,) integers; ignored, and may be None, without time in the condition flow.
            features: of the pre-segmentor, one tensor for each stage (`networks/unet.py`), where they replace that flow.

        Raises:
            ValueError: if the number of channels is wrong, or the timestep or the features are missing.
        """
        if image.shape[1] != self.image_channels:
            raise ValueError(f"image must have {self.image_channels} channels, got shape {tuple(image.shape)}")
        prior = self.prior(image)
        if self.adapts:
            if features is None:
                raise ValueError("features are missing: the condition of this network comes from the pre-segmentor")
            adapted = [adapt(seen) for adapt, seen in zip(self.feature_adapters, features, strict=True)]
            return Condition(
                tuple(adapted[:-1]), adapted[-1], prior.features, prior.presence_logits, prior.location_logits
            )
        time = None
        if self.time_in_condition_flow:
            if timestep is None:
                raise ValueError("timestep is missing: the condition flow of this network depends on it")
            time = self.time_embedding(timestep)
        skips, bottleneck, attended = self._encode_flow(self.image_dense(image), time, "condition")
        return Condition(skips, bottleneck, prior.features, prior.presence_logits, prior.location_logits, attended)

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return the prediction for a noisy state.

        Args:
            noisy: (B, state_channels, *spatial).
            timestep: (B,) integers.
            condition: from `encode`, with the same B and spatial size; `repeat_interleave` it for several states per image.

        Returns:
            (B, output_channels, *spatial), unbounded.

        Raises:
            ValueError: if the shapes of noisy state and condition do not match.
        """
        expected = (condition.bottleneck.shape[0], self.state_channels, *condition.skips[0].shape[2:])
        if tuple(noisy.shape) != expected:
            raise ValueError(
                f"noisy must have the shape {expected} that fits network and condition, got {tuple(noisy.shape)}; "
                "for several states per image use condition.repeat_interleave"
            )
        time = self.time_embedding(timestep)
        skips, bottleneck, _ = self._encode_flow(self.noisy_dense(noisy), time, "denoising", condition.attended)
        terms = (bottleneck, condition.bottleneck, condition.prior)
        location = None
        if self.guidance == "normalised":
            terms = tuple(norm(term) for norm, term in zip(self.guidance_norms, terms, strict=True))
            # -1 where the branch sees no lesion, 1 where it sees one
            location = condition.location_logits.div(2).tanh()
        # Eq. 6: sum of both flows and the prior branch
        features = self.bottleneck(terms[0] + terms[1] + terms[2])
        # Fig. 2: the skips are the sums of both flows
        for unit, ours, theirs in zip(self.up_units, reversed(skips), reversed(condition.skips), strict=True):
            features = unit(features, ours + theirs, time, location)
        return self.output(features)

    def _encode_flow(
        self, features: Tensor, time: Tensor | None, flow: str, seen: Sequence[Tensor] = ()
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        """Return skips, last features and, in the condition flow with attention "cross", what the other flow attends to."""
        skips, attended, others = [], [], iter(seen)
        for stage, unit in enumerate(self.condition_flow if flow == "condition" else self.denoising_flow, start=1):
            skip, features = unit(features, time)
            skips.append(skip)
            if str(stage) in self.attention:
                if self.crosses and flow == "condition":
                    attended.append(features)
                features = self.attention[str(stage)](features, flow, next(others, None))
        return tuple(skips), features, tuple(attended)
