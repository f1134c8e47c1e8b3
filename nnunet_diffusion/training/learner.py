"""Learners: modules in training, each with its optimizer, moving average and evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nnunet_diffusion.model.objective import Objective, SegmentationLoss, on_this_rank
from nnunet_diffusion.training.steps import take_step


class Learner:
    """A network in training, with its optimizer and moving average. Distributed training wraps it.

    Args:
        module: module of the segmenter to train.
        evaluate: function of the module and its inputs that returns what the objective needs.
        optimizer: optimizer of the module's parameters.
        ema_decay: decay of the moving average after the warm-up (1 + n) / (10 + n).

    Attributes:
        module: module with the raw weights.
        average: module with the moving average of the weights.
    """

    def __init__(
        self, module: nn.Module, evaluate: Callable[..., Any], optimizer: torch.optim.Optimizer, ema_decay: float
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.average = moving_average(module, ema_decay)
        self._evaluate = evaluate
        self._wrapped: nn.Module | None = None

    def compile(self) -> None:
        """Compile the evaluation in training (`torch.compile`). The weights and their names do not change."""
        self._evaluate = torch.compile(self._evaluate)

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Average the gradients over ranks from now on.

        Args:
            wrap: wraps a module in torch's DistributedDataParallel, which gives all ranks the weights of the first.
        """
        self._wrapped = wrap(_Evaluation(self))

    def evaluate(self, *inputs: Any) -> Any:
        """Evaluate the module as in training, that is compiled and distributed if `compile` and `distribute` were called."""
        return self.undistributed(*inputs) if self._wrapped is None else self._wrapped(*inputs)

    def undistributed(self, *inputs: Any) -> Any:
        """Evaluate the module on this rank alone."""
        return self._evaluate(self.module, *inputs)

    def step(self, loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Take an optimizer step and update the average. Return False if the step was skipped (see `take_step`)."""
        taken = take_step(loss, self.module.parameters(), self.optimizer, scaler)
        if taken:
            self.average.update_parameters(self.module)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming, except for the averaged weights: raw weights and number of averaged steps."""
        return {"weights": self.module.state_dict(), "averaged_steps": self.average.n_averaged}

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        """Restore the raw weights, the number of averaged steps and the optimizer.

        Args:
            state: result of `state_dict`.
            optimizer: state dict of the optimizer.
        """
        self.module.load_state_dict(state["weights"])
        self.average.n_averaged.copy_(state["averaged_steps"])
        for group in optimizer["param_groups"]:
            group["fused"] = self.optimizer.defaults[
                "fused"
            ]  # as on this device, not as on the device of the saved training
        self.optimizer.load_state_dict(dict(optimizer))


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """Return the moving average of a module's weights and buffers (EMA); `update_parameters` moves it.

    Args:
        module: module whose weights are averaged.
        decay: decay d of the average, reached by the warm-up (1 + n) / (10 + n) over n steps.
    """

    def move(averaged: Any, current: Any, count: Any) -> None:
        # decay = min(d, (1 + n) / (10 + n)), so that the first weights are soon forgotten
        steps = int(average.n_averaged)  # `count` is its copy on the GPU, this one is on the CPU
        rate = 1 - min(decay, (1 + steps) / (10 + steps))
        if torch.is_floating_point(averaged[0]):
            torch._foreach_lerp_(averaged, current, rate)
        else:
            torch._foreach_copy_(averaged, current)

    average = AveragedModel(module, multi_avg_fn=move, use_buffers=True)
    return average.eval()


def train_step(
    objective: Objective,
    learners: Mapping[str, Learner],
    image: Tensor,
    target: Tensor,
    segmentation_loss: SegmentationLoss,
    generator: torch.Generator,
    precision: Callable[[], contextlib.AbstractContextManager],
    scaler: torch.amp.GradScaler | None = None,
    cases: Sequence[str] = (),
) -> tuple[dict[str, Tensor], bool]:
    """Take one step with each learner, in the order of the objective.

    Args:
        objective: objective that yields the loss terms of each learner's step.
        learners: name of the module -> its learner.
        image: (B, C, *spatial) preprocessed patch.
        target: target as returned by nnU-Net's loader.
        segmentation_loss: nnU-Net's own loss.
        generator: generator of all random numbers, on the image's device.
        precision: returns the autocast context for evaluations of the networks.
        scaler: gradient scaler for float16.
        cases: name of each patch's case.

    Returns:
        `loss`, the sum of all terms, and each term by name; and whether all steps were taken.
    """
    evaluate = {name: learner.evaluate for name, learner in learners.items()}
    evaluate |= {on_this_rank(name): learner.undistributed for name, learner in learners.items()}
    for learner in learners.values():
        learner.optimizer.zero_grad(set_to_none=True)
    found: dict[str, Any] = {"loss": 0}
    taken = True
    for name, terms in objective.turns(image, target, segmentation_loss, generator, evaluate, precision, cases):
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
    """Compile the learners' evaluations, and wrap them for distributed training.

    Args:
        learners: name of the module -> its learner.
        wanted: whether nnU-Net would compile its network here.
        wrap: wraps a module in torch's DistributedDataParallel; None without distributed training.
        log: writes one line.
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
    """Use the learners' averaged modules in a segmenter for a `with` block."""
    for name, learner in learners.items():
        setattr(segmenter, name, learner.average.module)
    try:
        yield
    finally:
        for name, learner in learners.items():
            setattr(segmenter, name, learner.module)


class _Evaluation(nn.Module):
    """A learner's evaluation as a module, as torch's DistributedDataParallel requires."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.module = learner.module
        self._evaluate = learner.undistributed

    def forward(self, *inputs: Any) -> Any:
        """Evaluate the module."""
        return self._evaluate(*inputs)
