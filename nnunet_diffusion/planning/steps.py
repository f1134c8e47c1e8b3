"""The training steps of nnU-Net and DiffusionTrainer as plain functions, to measure their cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_diffusion.model.build import objective_without_data
from nnunet_diffusion.model.precision import training_precision
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.networks.architectures import refuse_unknown_classes

Step = Callable[[], None]


def build_nnunet(configuration: Mapping[str, Any], channels: int, heads: int) -> nn.Module:
    """Build nnU-Net's own network of a resolved configuration with random weights, deep supervision on.

    Args:
        configuration: resolved configuration of the plans.
        channels: number of image channels, in the cascade including those of the previous stage.
        heads: K.
    """
    architecture = configuration["architecture"]
    refuse_unknown_classes(architecture, "The plans")
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        heads,
        allow_init=False,
        deep_supervision=True,
    )


def nnunet_builder(configuration: Mapping[str, Any], heads: int) -> Callable[[int], nn.Module]:
    """Return a function of the number of input channels that builds nnU-Net's network, as `build_denoiser` needs it."""
    return lambda channels: build_nnunet(configuration, channels, heads)


def nnunet_step(
    network: nn.Module,
    image: Tensor,
    target: Tensor,
    precision: contextlib.AbstractContextManager | None = None,
    compiled: bool = False,
    update: bool = True,
) -> Step:
    """Return nnU-Net's training step: forward, Dice + cross-entropy with deep supervision, backward, SGD.

    Args:
        network: network with deep supervision, in training mode.
        image: (B, C, *spatial).
        target: (B, 1, *spatial) label map.
        precision: autocast of the forward pass, entered in each step; default `training_precision` of the image's device.
        compiled: compile the network with torch.compile.
        update: update the weights; False to stop after the backward pass.
    """
    evaluate = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, foreach=True)
    plain = nnunet_loss()
    with torch.no_grad():
        sizes = [output.shape[2:] for output in network(image[:1])]
    weights = [0.5**i for i in range(len(sizes) - 1)] + [0.0] if len(sizes) > 1 else [1.0]
    loss = DeepSupervisionWrapper(plain, weights)
    targets = [nn.functional.interpolate(target.float(), size=size, mode="nearest") for size in sizes]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision or training_precision(image.device):
            loss(evaluate(image), targets).backward()
        if update:
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()

    return step


def diffusion_step(
    network: DiffusionSegmenter,
    image: Tensor,
    target: Tensor,
    precision: contextlib.AbstractContextManager | None = None,
    compiled: bool = False,
) -> Step:
    """Return DiffusionTrainer's training step.

    Args:
        network: segmenter; it is set to training mode.
        image: (B, C, *spatial).
        target: (B, 1, *spatial) label map.
        precision: as in `nnunet_step`.
        compiled: compile the networks with torch.compile.
    """
    from nnunet_diffusion.training.learner import Learner, train_step  # the trainer imports planning

    objective, fused = objective_without_data(network), image.device.type != "mps"
    learners = {}
    for name, evaluate in objective.evaluations.items():
        module = getattr(network, name)
        optimizer = torch.optim.AdamW(module.parameters(), network.settings.learning_rate, fused=fused)
        learners[name] = Learner(module, evaluate, optimizer, network.settings.ema_decay)
        if compiled:
            learners[name].compile()
    loss, generator = nnunet_loss(network.settings.regions), torch.Generator(image.device)

    def step() -> None:
        network.train()
        train_step(
            objective, learners, image, target, loss, generator, lambda: precision or training_precision(image.device)
        )

    return step


def nnunet_loss(regions: bool = False) -> nn.Module:
    """nnU-Net's Dice + cross-entropy, as its trainer makes it for 2D: of label maps, or of masks of regions."""
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss({}, dice, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
