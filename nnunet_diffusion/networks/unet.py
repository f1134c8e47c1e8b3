"""What nnU-Net's own network computes on its way: the features of its encoder and decoder.

The forward passes of `PlainConvUNet` and `ResidualEncoderUNet` (dynamic_network_architectures) return logits only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def refuse_other_architectures(network: nn.Module, purpose: str) -> None:
    """Raise NotImplementedError if a network does not have the encoder and decoder of nnU-Net's U-Nets.

    Args:
        network: network to check.
        purpose: the setting that needs it, for the message.
    """
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    needed = ((encoder, ("stages", "output_channels")), (decoder, ("stages", "transpconvs", "seg_layers")))
    if not all(hasattr(part, name) for part, names in needed for name in names):
        raise NotImplementedError(
            f"{purpose} supports nnU-Net's PlainConvUNet and ResidualEncoderUNet, not {type(network).__name__}, the "
            "pre-segmentor's network: choose another setting or another pre-segmentor."
        )


def freeze_unused_outputs(network: Any, deep_supervision: bool) -> None:
    """Let the outputs that no loss uses have no gradients, which distributed training would wait for.

    Args:
        network: nnU-Net's network.
        deep_supervision: whether the outputs of `deep_logits` are used, beside the finest.
    """
    layers = network.decoder.seg_layers
    layers[: 1 if deep_supervision and len(layers) > 1 else -1].requires_grad_(False)


def encode(network: Any, image: Tensor, after: Callable[[int, Tensor], Tensor] = lambda _, x: x) -> list[Tensor]:
    """Return the features of each encoder stage, from the full resolution to the bottleneck.

    Args:
        network: nnU-Net's network.
        image: (B, C, *spatial).
        after: called with the number of a stage and its features; what it returns takes their place.
    """
    stem = getattr(network.encoder, "stem", None)
    features, found = image if stem is None else stem(image), []
    for number, stage in enumerate(network.encoder.stages):
        features = after(number, stage(features))
        found.append(features)
    return found


def decode(network: Any, skips: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits (B, K, *spatial), and the features of each decoder stage from the full resolution down.

    Args:
        network: nnU-Net's network.
        skips: features of the encoder, as `encode` returns them.
    """
    decoder, features, found = network.decoder, skips[-1], []
    for up, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(skips[:-1]), strict=True):
        features = stage(torch.cat((up(features), skip), 1))
        found.append(features)
    return decoder.seg_layers[-1](features), found[::-1]


def deep_logits(network: Any, decoded: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits (B, K, *size of the stage) of the decoder stages between the finest and the coarsest, fine to coarse.

    Args:
        network: nnU-Net's network.
        decoded: features of the decoder, as `decode` returns them.
    """
    layers = list(network.decoder.seg_layers)[-2:0:-1]
    return [layer(features) for layer, features in zip(layers, decoded[1:-1], strict=True)]


def logits_and_encoder(network: Any, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return logits (B, K, *spatial) and the features of each encoder stage, as `encode` returns them."""
    skips = encode(network, image)
    return decode(network, skips)[0], tuple(skips)


def logits_and_features(network: Any, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return logits and, for each stage, the features of encoder and decoder side by side; the last stage has no decoder.

    Args:
        network: nnU-Net's network.
        image: (B, C, *spatial).

    Returns:
        Logits (B, K, *spatial), and features (B, `feature_channels(network)[stage]`, *size of the stage).
    """
    skips = encode(network, image)
    logits, decoded = decode(network, skips)
    return logits, (*(torch.cat(pair, 1) for pair in zip(skips[:-1], decoded, strict=True)), skips[-1])


def feature_channels(features_per_stage: Sequence[int]) -> tuple[int, ...]:
    """Return the channels of `logits_and_features` for nnU-Net's widths."""
    return (*(2 * width for width in features_per_stage[:-1]), features_per_stage[-1])
