"""Why a trained model segments a case as it does: heat maps of its units, attention of a voxel, the prior branch, ablations."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.explain.grad_cam import Key, enlarged, evaluated, heat_maps, heat_of
from nnunet_diffusion.explain.units import PRIOR, Unit, ablated, ablations_of, units_of
from nnunet_diffusion.inference.cases import PreparedCase
from nnunet_diffusion.inference.memory import free_bytes, readable_size
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.volume import Tile, VolumeProcess
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model import labels
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

CLASS, CHANGED = "class", "changed"
TARGETS = (CLASS, CHANGED)
OTHER_IMAGE, FROM_NOISE = "image of another case", "from noise"


class NothingToExplain(ValueError):
    """The result has no voxel of the class, or none that differs from nnU-Net's."""


@dataclass(frozen=True)
class Question:
    """What is asked about a case.

    Attributes:
        head: index of the class among the network's outputs.
        name: its name, for messages.
        target: CLASS explains the voxels that the result gives the class; CHANGED those in which it differs from nnU-Net's
            segmentation: their scores count where the class was added, and against it where it was taken away.
        voxel: whose attention is shown, on the network's grid; None for no voxel.
        stages: of each flow that are explained; empty for all.
    """

    head: int
    name: str
    target: str = CLASS
    voxel: tuple[int, ...] | None = None
    stages: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class PriorBranch:
    """What the prior branch says of a class.

    Attributes:
        presence: probability that the image shows it; of several tiles the largest.
        presence_heat: Grad-CAM of that head's logit at the branch's last features, (*volume), 0 to 1 (Fig. 8).
        location: where, as probabilities (*volume).
    """

    presence: float
    presence_heat: NDArray
    location: NDArray


@dataclass(frozen=True, eq=False)
class Reverse:
    """A reverse process that has been run, on the padded grid.

    Attributes:
        process: what was run.
        states: timestep and noisy state (1, K, *padded volume) before each evaluation, from T' - 1 downwards.
        presegmentation: nnU-Net's probabilities, (K, *padded volume).
        result: probabilities of the result, (K, *padded volume).
        inner: part of the padded volume in which the image lies.
    """

    process: VolumeProcess
    states: list[tuple[int, Tensor]]
    presegmentation: Tensor
    result: Tensor
    inner: tuple[slice, ...]

    def mask(self, probabilities: Tensor, head: int) -> Tensor:
        """Return the mask of a class, (*padded volume), in the segmentation that probabilities (K, *padded volume) give."""
        return labels.hardened(probabilities[None].float(), self.process.segmenter.settings.regions)[0, head].bool()


@dataclass(frozen=True, eq=False)
class Explanation:
    """All arrays are on the network's grid, (*volume).

    Attributes:
        timesteps: of the evaluations, from T' - 1 downwards.
        presegmentation: mask of the class in nnU-Net's segmentation.
        result: mask of the class in the reverse process's.
        heat: unit -> map at each timestep, (steps, *volume), 0 to 1: each divided by its largest value.
        prior: what the prior branch says; None without one.
        rows: flow and stage -> attention of the voxel at T', (*volume), sum 1.
        ablations: name -> mask of the class in the same reverse process without that part.
    """

    timesteps: Sequence[int]
    presegmentation: NDArray
    result: NDArray
    heat: Mapping[Key, NDArray]
    prior: PriorBranch | None
    rows: Mapping[tuple[str, int], NDArray]
    ablations: Mapping[str, NDArray]


def reverse(predictor: DiffusionPredictor, case: PreparedCase) -> Reverse:
    """Run one reverse process on a case.

    Args:
        predictor: with one fold of a model; its settings decide the steps and T'. One sample is run, nothing of it is
            averaged with nnU-Net's output or mirrored.
        case: the case.

    Raises:
        MemoryError: the state does not fit into memory.
        ValueError: the image, or the output of a network, is not finite.
    """
    run = VolumeRun(predictor, torch.from_numpy(case.data))
    network, settings = predictor.network, predictor.network.settings
    network.to(run.device).eval()
    network.load_state_dict(predictor.list_of_parameters[0])
    with torch.inference_mode():
        begun, _ = run.start()
        own = begun if begun is not None else run.presegment()
    # tensors of inference mode cannot be part of a graph
    start = None if begun is None else begun.clone()
    states: list[tuple[int, Tensor]] = []
    fold = predictor.folds[0]
    process = VolumeProcess(
        network, run.data, run.tiling, start, settings.seed, torch.device("cpu"),
        fold=int(fold) if fold.isdecimal() else 0,
        on_step=lambda timestep, noisy, clean: states.append((timestep, noisy.clone())),
    )  # fmt: skip
    result = process.run([0])[0]
    quiet = dataclasses.replace(process, on_step=None)
    return Reverse(quiet, states, own.float().cpu().clone(), result, tuple(run.unpad[1:]))


def explain(run: Reverse, question: Question, without: Mapping[str, Tensor] | None = None) -> Explanation:
    """Explain one class of a reverse process.

    Args:
        run: the reverse process.
        question: what is asked.
        without: what `ablations` returns; None for no ablations.

    Raises:
        NotImplementedError: the network is unknown.
        NothingToExplain: there is nothing of that class.
    """
    head, inner = question.head, run.inner
    units = _asked_for(run.process.segmenter.denoiser, question.stages)
    result, before = run.mask(run.result, head), run.mask(run.presegmentation, head)
    target = target_of(result, before, question)
    heat: dict[Key, list[Tensor]] = {unit.key: [] for unit in units}
    for timestep, noisy in run.states:
        for key, found in heat_maps(run.process, units, head, target, noisy, timestep).items():
            heat[key].append(_unit_scale(found[inner]).half())
    return Explanation(
        [timestep for timestep, _ in run.states],
        before[inner].numpy(),
        result[inner].numpy(),
        {key: torch.stack(maps).float().numpy() for key, maps in heat.items()},
        prior_branch(run.process, head, inner),
        _rows(run, units, question),
        {name: run.mask(found, head)[inner].numpy() for name, found in (without or {}).items()},
    )


def _asked_for(denoiser: nn.Module, stages: Sequence[int]) -> list[Unit]:
    """Return the units of these stages, of all without any, and the prior branch."""
    return [unit for unit in units_of(denoiser) if unit.flow == PRIOR or unit.stage in (stages or (unit.stage,))]


def _unit_scale(heat: Tensor) -> Tensor:
    return heat / heat.max().clamp_min(1e-30)


def check_memory(predictor: DiffusionPredictor, case: PreparedCase, stages: Sequence[int] = ()) -> None:
    """Compare the memory that the maps of a case need with what is free.

    Args:
        predictor: with one fold of a model.
        case: the case.
        stages: of each flow that are explained; empty for all.

    Raises:
        MemoryError: the maps do not fit.
        NotImplementedError: the network is unknown.
    """
    steps, units = predictor.network.settings.steps, len(_asked_for(predictor.network.denoiser, stages))
    # maps of all units in half precision at all steps, then once more as float32; those of one step, and its gradients
    needed = case.data[0].size * (units * steps * (2 + 4) + units * 8)
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"the maps of {units} units at {steps} steps need {readable_size(needed)} of memory, but {readable_size(free)} are "
            "free: give fewer --steps or --stages, or crop the image"
        )


def target_of(result: Tensor, before: Tensor, question: Question) -> Tensor:
    """Return the weight of each voxel in the score, (*volume).

    Args:
        result: mask of the class in the result.
        before: mask of the class in nnU-Net's segmentation.
        question: what is asked.

    Raises:
        NothingToExplain: there is nothing of that class.
    """
    if question.target == CHANGED:
        changed = result.float() - before.float()
        if not changed.any():
            raise NothingToExplain(
                f"the result has the same voxels of {question.name} as nnU-Net's segmentation: explain --target class"
            )
        return changed
    if not result.any():
        raise NothingToExplain(
            f"the result has no voxel of {question.name}: explain another --class, or --target changed if nnU-Net found it"
        )
    return result.float()


@torch.no_grad()
def prior_branch(process: VolumeProcess, head: int, inner: tuple[slice, ...]) -> PriorBranch | None:
    """Return what the prior branch says of a class; None without such a branch.

    Args:
        process: reverse process of the volume.
        head: index of the class among the network's outputs.
        inner: part of the padded volume in which the image lies.
    """
    denoiser, settings = process.segmenter.denoiser, process.segmenter.settings
    if not isinstance(denoiser, PGDiffSeg):
        return None
    foreground = head - (not settings.regions)
    presence = 0.0
    heat, location = torch.zeros_like(process.total_weight), torch.zeros_like(process.total_weight)
    weight = process.tiling.weight
    for tile in process.tiling.tiles:
        found = denoiser.prior(process.seen([tile]))
        presence = max(presence, float(found.presence_logits[0, foreground].float().sigmoid()))
        # of a linear head on pooled features (Eq. 7) the weights of Grad-CAM are the head's, up to the number of voxels
        looked = heat_of(found.features, denoiser.prior.presence.weight[foreground][None])
        heat[tile[1:]] += (enlarged(looked, weight.shape) * weight).to(heat)
        larger = enlarged(found.location_logits[:, foreground], weight.shape)
        location[tile[1:]] += (larger.sigmoid() * weight).to(location)
    heat, location = ((each / process.total_weight)[inner] for each in (heat, location))
    return PriorBranch(presence, _unit_scale(heat).numpy(), location.numpy())


@torch.no_grad()
def _rows(run: Reverse, units: Sequence[Any], question: Question) -> dict[tuple[str, int], NDArray]:
    """Return the attention of a voxel at T', in the tile whose centre is nearest to it."""
    if question.voxel is None:
        return {}
    process, (timestep, noisy) = run.process, run.states[0]
    voxel = [part.start + place for part, place in zip(run.inner, question.voxel, strict=True)]
    tile = min(process.tiling.tiles, key=lambda tile: _distance(tile, voxel))
    within = [place - part.start for part, place in zip(tile[1:], voxel, strict=True) if isinstance(part, slice)]
    attended = [unit for unit in units if unit.attended]
    found, _ = evaluated(process, attended, tile, noisy, timestep)
    rows = {}
    for unit in attended:
        features, flow, *seen = found[unit.key][0]
        size, patch = features.shape[2:], process.tiling.weight.shape
        place = [min(edge * each // whole, each - 1) for edge, each, whole in zip(within, size, patch, strict=True)]
        whole = torch.zeros_like(process.total_weight)
        whole[tile[1:]] = enlarged(unit.module.row(features, place, *seen), patch).to(whole)
        inside = whole[run.inner]
        rows[unit.flow, unit.stage] = (inside / inside.sum()).numpy()
    return rows


def _distance(tile: Tile, voxel: Sequence[int]) -> float:
    """Return the distance of a voxel from a tile's centre; infinite if it is outside."""
    parts = [slice(part, part + 1) if isinstance(part, int) else part for part in tile[1:]]
    if not all(part.start <= place < part.stop for part, place in zip(parts, voxel, strict=True)):
        return math.inf
    return math.dist([(part.start + part.stop - 1) / 2 for part in parts], voxel)


def ablations(run: Reverse, other: Tensor | None = None) -> dict[str, Tensor]:
    """Run the same reverse process without each part in turn. Return name -> probabilities (K, *padded volume).

    Args:
        run: the reverse process.
        other: image of another case, (C, *any size), which takes the place of this one; None: its own, reversed along all axes.
    """
    process = run.process
    segmenter, settings = process.segmenter, process.segmenter.settings
    image = (
        process.image.flip(list(range(1, process.image.ndim))) if other is None else fitted(other, process.image.shape)
    )
    changes: dict[str, tuple[VolumeProcess, Any, Mapping[str, Any]]] = {
        OTHER_IMAGE: (dataclasses.replace(process, image=image), contextlib.nullcontext(), {}),
        # a process of its own each: it keeps the last conditions
        **{
            name: (dataclasses.replace(process), ablated(segmenter.denoiser, name), {})
            for name in ablations_of(segmenter.denoiser)
        },
    }
    if not settings.is_hidiff and settings.max_train_step == settings.timesteps and not settings.shows_presegmentation:
        noise = {"from_noise": True, "start_step": settings.timesteps}
        changes[FROM_NOISE] = dataclasses.replace(process, presegmentation=None), contextlib.nullcontext(), noise
    found = {}
    for name, (changed, context, further) in changes.items():
        with context, segmenter.overridden(**further):
            found[name] = changed.run([0])[0]
    return found


def fitted(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an image (C, *any) cropped or padded with zeros about its centre to the shape (C, *volume)."""
    # towards zero, so that what is left over lies behind
    starts = [int((theirs - ours) / 2) for theirs, ours in zip(image.shape[1:], shape[1:], strict=True)]
    return crop_and_pad_nd(image, [[start, start + edge] for start, edge in zip(starts, shape[1:], strict=True)])


def share_inside(heat: NDArray, mask: NDArray) -> float:
    """Return the share of a map's heat (*volume) inside a mask of the same shape; NaN for a map without heat."""
    total = float(heat.sum(dtype=np.float64))
    return float(heat[mask].sum(dtype=np.float64)) / total if total > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Shares:
    """How much of each map lies inside a mask.

    Attributes:
        reference: what the mask is: "truth", "result" or "changed voxels".
        expected: share of the volume that it has, which a map without any preference would have.
        heat: unit -> share at each timestep, NaN of a map without heat.
        presence: share of the presence head's map; None without a prior branch.
        rows: flow and stage -> share of the voxel's attention.
    """

    reference: str
    expected: float
    heat: Mapping[Key, Sequence[float]]
    presence: float | None
    rows: Mapping[tuple[str, int], float]


def shares_of(found: Explanation, question: Question, truth: NDArray | None = None) -> Shares:
    """Return the shares of all maps inside what is explained: the changed voxels, else the truth, else the result.

    Args:
        found: the explanation.
        question: that it answers.
        truth: mask of the class in the ground truth, (*volume), or None.
    """
    if question.target == CHANGED:
        name, mask = "changed voxels", found.result != found.presegmentation
    else:
        name, mask = ("result", found.result) if truth is None else ("truth", truth)
    return Shares(
        name,
        float(mask.mean()),
        {key: [share_inside(heat, mask) for heat in maps] for key, maps in found.heat.items()},
        None if found.prior is None else share_inside(found.prior.presence_heat, mask),
        {key: share_inside(row, mask) for key, row in found.rows.items()},
    )


def numbers(found: Explanation, question: Question, shares: Shares, truth: NDArray | None = None) -> dict[str, Any]:
    """Return the numbers of an explanation, for its JSON file.

    Args:
        found: the explanation.
        question: that it answers.
        shares: of its maps.
        truth: mask of the class in the ground truth, (*volume), or None.
    """
    result = found.result

    def overlaps(mask: NDArray) -> dict[str, Any]:
        known = {"dice_with_result": dice(mask, result), "voxels": int(mask.sum())}
        return known if truth is None else {**known, "dice_with_truth": dice(mask, truth)}

    heat: dict[str, dict[str, Any]] = {}
    for (flow, stage, attended), values in shares.heat.items():
        heat.setdefault(flow, {})[f"stage {stage}" + (" after attention" if attended else "")] = list(values)
    numbers: dict[str, Any] = {
        "class": question.name,
        "target": question.target,
        "noising_steps": [timestep + 1 for timestep in found.timesteps],
        "voxels_of_the_grid": result.size,
        "reference": shares.reference,
        "share_of_reference": shares.expected,
        "share_of_heat_in_reference": heat,
        "nnunet": overlaps(found.presegmentation),
        "result": overlaps(result),
        "ablations": {name: overlaps(mask) for name, mask in found.ablations.items()},
    }
    if found.prior is not None:
        numbers["prior_branch"] = {
            "presence": found.prior.presence,
            "share_of_presence_heat_in_reference": shares.presence,
            "location": overlaps(found.prior.location > 0.5),
        }
    if found.rows:
        rows = {f"{flow}, stage {stage}": share for (flow, stage), share in shares.rows.items()}
        numbers["share_of_attention_in_reference"] = rows
    return numbers
