"""Memory and FLOPs of a training step, measured by running it on tensors with a shape but no data.

The step runs on the CPU under torch's FakeTensorMode, which computes nothing but records every allocation. So the figures
follow any change of the networks, and plans for an 80 GB GPU can be made on a laptop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nnunet_diffusion.model.build import build_denoiser, objective_without_data
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.attention import ParameterSharedAttention, SelfAttention
from nnunet_diffusion.planning.flops import CPU_ATTENTION_FLOPS
from nnunet_diffusion.planning.steps import build_nnunet, nnunet_builder, nnunet_loss, nnunet_step

FLOAT_BYTES = 4
ALLOCATION_BYTES = 512
"""Block size to which CUDA's caching allocator rounds up."""
WORKSPACE_SHARE = 0.1
"""Workspace of convolutions, as a share of the memory that grows with the batch (documentation/planning.md)."""


@dataclass(frozen=True)
class Cost:
    """Memory of one training step in bytes, and its FLOPs. The parts add up to the peak.

    Attributes:
        weights: weights of all networks in memory, float32.
        gradients: gradients of the trained network that exist at the peak.
        optimizer: optimiser state: two values per weight for AdamW, one for SGD.
        average: moving average of the weights (EMA); 0 for nnU-Net.
        data: image and target.
        activations: tensors saved by autograd for the backward pass, without those of attention.
        attention: tensors saved for the backward pass inside attention.
        transient: other tensors that exist at the peak.
        workspace: allowance for the workspace of the GPU's convolutions (`WORKSPACE_SHARE`); 0 on a CPU.
        flops: FLOPs of forward and backward pass, 2 per multiply-accumulate.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    data: int
    activations: int
    attention: int
    transient: int
    workspace: int
    flops: int

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        lasting = self.weights + self.optimizer + self.average
        return (
            lasting + self.gradients + self.data + self.activations + self.attention + self.transient + self.workspace
        )


def nnunet_cost(
    configuration: Mapping[str, Any], channels: int, heads: int, batch: int, *, amp: bool = True, gpu: bool = True
) -> Cost:
    """Return the cost of stock nnU-Net's training step (SGD with momentum, deep supervision).

    Args:
        configuration: resolved configuration of the plans.
        channels: number of image channels, in the cascade including those of the previous stage.
        heads: K.
        batch: number of patches.
        amp: True for autocast to half precision, as nnU-Net does on a GPU; False for float32.
        gpu: include the allowance for a GPU's workspace.
    """
    return _nnunet_cost(_frozen(configuration), channels, heads, batch, amp, gpu)


@lru_cache(maxsize=512)
def _nnunet_cost(plan: str, channels: int, heads: int, batch: int, amp: bool, gpu: bool) -> Cost:
    configuration = json.loads(plan)
    with FakeTensorMode():
        network = build_nnunet(configuration, channels, heads).train()
        trace = _Trace(network, network)
        with trace.recording():
            image = torch.zeros(batch, channels, *configuration["patch_size"])
            target = torch.zeros(batch, 1, *configuration["patch_size"], dtype=torch.int16)
            step = nnunet_step(network, image, target, _autocast(amp), update=False)
            trace.data_is_there()
            trace.run(step)
    return trace.cost(optimizer_values=1, average=False, gpu=gpu)


def denoiser_cost(
    configuration: Mapping[str, Any],
    settings: DiffusionSettings,
    channels: int,
    heads: int,
    batch: int,
    *,
    amp: bool = True,
    gpu: bool = True,
) -> Cost:
    """Return the cost of DiffusionTrainer's training step (nnU-Net in memory, AdamW, moving average of what learns).

    Args:
        configuration: resolved configuration of the plans.
        settings: settings of the denoiser.
        channels: number of image channels, in the cascade including those of the previous stage.
        heads: K.
        batch: number of patches.
        amp: True for autocast to half precision, as nnU-Net does on a GPU; False for float32.
        gpu: include the allowance for a GPU's workspace.
    """
    return _denoiser_cost(
        _frozen(configuration), json.dumps(dataclasses.asdict(settings)), channels, heads, batch, amp, gpu
    )


@lru_cache(maxsize=512)
def _denoiser_cost(plan: str, section: str, channels: int, heads: int, batch: int, amp: bool, gpu: bool) -> Cost:
    configuration, settings = json.loads(plan), DiffusionSettings(**json.loads(section))
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the table of the noise schedule is real
    with mode:
        frozen = build_nnunet(configuration, channels, heads)
        denoiser = build_denoiser(settings, configuration, channels, heads, nnunet_builder(configuration, heads))
    # outside: a noise schedule looks at its values when it is made
    segmenter = DiffusionSegmenter(frozen, denoiser, settings).train()
    objective, loss, generator = objective_without_data(segmenter), nnunet_loss(settings.regions), torch.Generator()

    def step() -> None:
        turns = objective.turns(image, target, loss, generator, precision=lambda: _autocast(amp))
        for _, terms in turns:
            torch.stack(list(terms.values())).sum().backward()

    with mode:
        trace = _Trace(segmenter, nn.ModuleList(getattr(segmenter, name) for name in settings.learning_networks))
        with trace.recording():
            image = torch.zeros(batch, channels, *configuration["patch_size"])
            maps = heads if settings.regions else 1
            target = torch.zeros(batch, maps, *configuration["patch_size"], dtype=torch.int16)
            trace.data_is_there()
            trace.run(step)
    return trace.cost(optimizer_values=2, average=True, gpu=gpu)


def _frozen(configuration: Mapping[str, Any]) -> str:
    """Return the entries that determine a configuration's cost, as a cache key."""
    return json.dumps({key: configuration[key] for key in ("architecture", "patch_size")}, default=int)


def _autocast(amp: bool) -> contextlib.AbstractContextManager:
    # autocast on the CPU uses half precision in the same operations as on a GPU: convolutions, linear layers, attention
    return torch.autocast("cpu", dtype=torch.bfloat16) if amp else contextlib.nullcontext()


class _Meter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all live storages, rounded as by CUDA's allocator.

    torch's FlopCounterMode cannot be used here, because it keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._formulas = {**flop_registry, **CPU_ATTENTION_FLOPS}
        self._known: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shortcut = _SHORTCUTS.get(getattr(function, "_overloadpacket", None), function)
        result = shortcut(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        formula = self._formulas.get(getattr(function, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _group_norm(
    features: Tensor, weight: Any, bias: Any, samples: int, channels: int, voxels: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), features.new_empty(samples, groups), features.new_empty(samples, groups)


def _group_norm_backward(
    gradient: Tensor, features: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(weight), torch.empty_like(weight)


_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_group_norm: _group_norm,
    torch.ops.aten.native_group_norm_backward: _group_norm_backward,
    torch.ops.aten.silu_backward: lambda gradient, features: torch.empty_like(features),
}
"""Direct output shapes of operators that FakeTensorMode would decompose; the decompositions take a third of a trace."""


class SavedBytes:
    """Context manager that counts the bytes saved for the backward pass at their peak, without parameters.

    Attributes:
        activations: bytes saved outside attention when most was saved.
        attention: bytes saved inside attention at that moment.
    """

    def __init__(self, network: nn.Module) -> None:
        """Watch the attention modules of `network`."""
        self._parameters = {p.untyped_storage()._cdata for p in network.parameters()}
        self._network, self._depth = network, 0
        self._saved: dict[int, tuple[int, bool]] = {}
        self._now = [0, 0]  # outside and inside attention
        self.activations = self.attention = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SavedBytes:
        """Start counting."""
        for module in self._network.modules():
            if isinstance(module, (ParameterSharedAttention, SelfAttention)):
                for handle in (
                    module.register_forward_pre_hook(lambda *_: self._move(1)),
                    module.register_forward_hook(lambda *_: self._move(-1)),
                ):
                    self._stack.callback(handle.remove)
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop counting."""
        self._stack.close()

    def _move(self, by: int) -> None:
        self._depth += by

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._parameters and key not in self._saved:
            size, inside = self._saved[key] = storage.nbytes(), self._depth > 0
            self._now[inside] += size
            if sum(self._now) > self.activations + self.attention:
                self.activations, self.attention = self._now
            # a backward pass frees what was saved for it: HiDiff's step has two
            weakref.finalize(storage, self._drop, key)
        return tensor

    def _drop(self, key: int) -> None:
        size, inside = self._saved.pop(key)
        self._now[inside] -= size


class _Trace:
    """One training step, its allocations and its FLOPs."""

    def __init__(self, resident: nn.Module, trained: nn.Module) -> None:
        self.resident, self.trained = resident, trained
        self.meter, self.saved = _Meter(), SavedBytes(trained)
        self.before = self.data = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with self.meter:
            for tensor in (*self.resident.parameters(), *self.resident.buffers()):
                self.meter.add(tensor.data)
            self.before = self.meter.live
            yield

    def data_is_there(self) -> None:
        self.data = self.meter.live - self.before
        self.meter.peak, self.meter.flops = self.meter.live, 0

    def run(self, step: Callable[[], None]) -> None:
        with self.saved:
            step()

    def cost(self, optimizer_values: int, average: bool, gpu: bool) -> Cost:
        weights = _bytes_of(self.resident)
        trained = sum(p.numel() for p in self.trained.parameters()) * FLOAT_BYTES
        kept = self.data + self.saved.activations + self.saved.attention
        # peak of the step, or of the update, when activations are freed: gradients and a temporary copy of them
        peak = max(self.meter.peak - self.before, kept, self.data + 2 * trained)
        gradients = min(trained, peak - kept)
        transient = peak - kept - gradients
        return Cost(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer_values * trained,
            average=_bytes_of(self.trained) if average else 0,
            data=self.data,
            activations=self.saved.activations,
            attention=self.saved.attention,
            transient=transient,
            workspace=int(WORKSPACE_SHARE * (kept + transient)) if gpu else 0,
            flops=self.meter.flops,
        )


def _bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
