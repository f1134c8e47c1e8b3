"""A learner: a module with its optimizer, learning rate schedule and moving average, and how it is evaluated in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nnunet_diffusion.model.objective import Objective, SegmentationLoss
from nnunet_diffusion.training.steps import take_step


class Learner:
    """One of the networks that a method trains; distributed training wraps it.

    Args:
        module: of the segmenter.
        evaluate: the module and its inputs -> what its objective needs, as a function.
        optimizer: of the module's parameters.
        ema_decay: of the moving average, reached by the warm-up (1 + n) / (10 + n).

    Attributes:
        module: its raw weights.
        average: the moving average of its weights.
    """

    def __init__(
        self, module: nn.Module, evaluate: Callable[..., Any], optimizer: torch.optim.Optimizer, ema_decay: float
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.average = AveragedModel(module, multi_avg_fn=self._move, use_buffers=True)
        self.average.eval()
        self._evaluate, self._ema_decay = evaluate, ema_decay
        self._wrapped: nn.Module | None = None

    def compile(self) -> None:
        """Compile its evaluation in training (`torch.compile`); weights and their names are untouched."""
        self._evaluate = torch.compile(self._evaluate)

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Have its gradients averaged over ranks.

        Args:
            wrap: module -> the same as torch's DistributedDataParallel; it gives all ranks the weights of the first.
        """
        self._wrapped = wrap(_Evaluation(self))

    def evaluate(self, *inputs: Any) -> Any:
        """Evaluate the module as training does: compiled and distributed where it is."""
        return self.undistributed(*inputs) if self._wrapped is None else self._wrapped(*inputs)

    def undistributed(self, *inputs: Any) -> Any:
        """Evaluate the module on this rank alone."""
        return self._evaluate(self.module, *inputs)

    def step(self, loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Take an optimizer step and move the average; return whether the gradients allowed it (see `take_step`)."""
        taken = take_step(loss, self.module.parameters(), self.optimizer, scaler)
        if taken:
            self.average.update_parameters(self.module)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the averaged weights: raw weights and the number of averaged steps."""
        return {"weights": self.module.state_dict(), "averaged_steps": self.average.n_averaged}

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state: of `state_dict`.
            optimizer: of its optimizer.
        """
        self.module.load_state_dict(state["weights"])
        self.average.n_averaged.copy_(state["averaged_steps"])
        for group in optimizer["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]  # of this device, not of the one it was saved on
        self.optimizer.load_state_dict(dict(optimizer))

    def _move(self, averaged: Any, current: Any, count: Any) -> None:
        """Move the average: decay = min(d, (1 + n) / (10 + n)), so that the first weights are soon forgotten."""
        steps = int(self.average.n_averaged)  # `count` is its copy on the GPU, this one is on the CPU
        decay = min(self._ema_decay, (1 + steps) / (10 + steps))
        if torch.is_floating_point(averaged[0]):
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)


def train_step(
    objective: Objective,
    learners: Mapping[str, Learner],
    image: Tensor,
    target: Tensor,
    segmentation_loss: SegmentationLoss,
    generator: torch.Generator,
    precision: Callable[[], contextlib.AbstractContextManager],
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[dict[str, Tensor], bool]:
    """Let each learner take its turn.

    Args:
        objective: names the turns.
        learners: by the name of their module.
        image: (B, C, *spatial) preprocessed patch.
        target: as nnU-Net's loader gives it.
        segmentation_loss: nnU-Net's own.
        generator: of all randomness, on the image's device.
        precision: autocast of the networks' evaluations.
        scaler: of float16.

    Returns:
        `loss`, the sum of all terms, and the terms by name; and whether all steps were taken.
    """
    evaluate = {name: learner.evaluate for name, learner in learners.items()}
    for learner in learners.values():
        learner.optimizer.zero_grad(set_to_none=True)
    found: dict[str, Any] = {"loss": 0}
    taken = True
    for name, terms in objective.turns(image, target, segmentation_loss, generator, evaluate, precision):
        loss: Any = sum(terms.values())
        taken &= learners[name].step(loss, scaler)
        found = {**found, "loss": found["loss"] + loss, **terms}
    return found, taken


def compile_and_distribute(
    learners: Mapping[str, Learner],
    wanted: bool,
    wrap: Callable[[nn.Module], nn.Module] | None,
    log: Callable[[str], None],
) -> None:
    """Compile the learners' training steps, and wrap them for distributed training.

    Args:
        learners: by the name of their module.
        wanted: whether nnU-Net would compile its network here.
        wrap: module -> the same as torch's DistributedDataParallel; None on a single GPU.
        log: takes one line.
    """
    for name, learner in learners.items():
        if wanted and any(isinstance(module, nn.SyncBatchNorm) for module in learner.module.modules()):
            log(f"The {name} is not compiled: torch.compile breaks at each synchronised batch norm.")
        elif wanted:
            log(f"Using torch.compile for the {name}'s training step...")
            learner.compile()
        if wrap is not None:
            learner.distribute(wrap)


@contextlib.contextmanager
def averaged_weights(segmenter: nn.Module, learners: Mapping[str, Learner]) -> Iterator[None]:
    """Put the learners' averaged modules into a segmenter for a `with` block."""
    for name, learner in learners.items():
        setattr(segmenter, name, learner.average.module)
    try:
        yield
    finally:
        for name, learner in learners.items():
            setattr(segmenter, name, learner.module)


class _Evaluation(nn.Module):
    """A learner's evaluation as a module, which torch's DistributedDataParallel wants."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.module = learner.module
        self._evaluate = learner.undistributed

    def forward(self, *inputs: Any) -> Any:
        """Evaluate."""
        return self._evaluate(*inputs)
