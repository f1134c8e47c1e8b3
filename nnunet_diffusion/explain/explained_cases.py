"""Files of explained cases: a page of each, its maps in the image's geometry, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnunet_diffusion.evaluation.folders import TRUTH
from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.explain.explanation import (
    CLASS,
    Explanation,
    Question,
    Reverse,
    Shares,
    check_memory,
    explain,
    numbers,
    shares_of,
)
from nnunet_diffusion.explain.explanation_figure import Attention, Flow, Page, Prior, explanation_figure
from nnunet_diffusion.explain.uncertainty_figure import plane_name
from nnunet_diffusion.explain.units import PRIOR, units_of
from nnunet_diffusion.files import write_json
from nnunet_diffusion.inference.cases import CaseFiles, PreparedCase, prepare_case
from nnunet_diffusion.inference.maps import map_ending, to_image, writer_of
from nnunet_diffusion.inference.predictor import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import read_presegmentation
from nnunet_diffusion.inference.reading import without_thickness

MAPS = "maps"
RGB = "RGBTo01Normalization"


@dataclass(frozen=True)
class Request:
    """What is asked about every case.

    Attributes:
        out: output folder.
        heads: name of each class -> index among the network's outputs.
        target: see `Question`.
        voxel: index in the image file, in the order z, y, x or, of a 2D image, y, x; None for no voxel.
        truths: folder of label maps; None without.
        maps: whether to write the heat maps.
        stages: see `Question`.
    """

    out: Path
    heads: dict[str, int]
    target: str = CLASS
    voxel: tuple[int, ...] | None = None
    truths: Path | None = None
    maps: bool = False
    stages: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked about one case, on the network's grid.

    Attributes:
        case: the case.
        voxel: the named voxel, or None.
        truth: masks of all heads in the ground truth, (K, *volume), or None.
    """

    case: PreparedCase
    voxel: tuple[int, ...] | None
    truth: NDArray | None


def read_image(predictor: DiffusionPredictor, name: str, files: Sequence[str]) -> PreparedCase:
    """Read and preprocess a case; see `prepare_case` for the errors."""
    return prepare_case(CaseFiles(name, files), predictor.managers)


def asked_of(predictor: DiffusionPredictor, request: Request, name: str, files: Sequence[str]) -> Asked:
    """Read a case, its truth and its voxel, before anything is computed.

    Args:
        predictor: with one fold of a model.
        request: what is asked.
        name: name of the case.
        files: its images, one per channel.

    Raises:
        MemoryError: the maps do not fit into memory.
        ValueError: a file cannot be read, the truth does not fit the image, or the voxel is outside.
    """
    case = read_image(predictor, name, files)
    voxel = _Grid(predictor, case).voxel(request.voxel)
    check_memory(predictor, case, request.stages)
    return Asked(case, voxel, _truth(predictor, request.truths, name, case))


def explain_class(
    predictor: DiffusionPredictor,
    request: Request,
    name: str,
    asked: Asked,
    run: Reverse,
    without: Mapping[str, Tensor],
    label: str,
) -> Path:
    """Explain one class of a case, and write its page, numbers and, where asked for, maps.

    Args:
        predictor: with one fold of a model.
        request: what is asked.
        name: name of the case.
        asked: what is asked about it.
        run: the reverse process of that case.
        without: its `ablations`.
        label: name of the class.

    Returns:
        The page, a PNG.

    Raises:
        NothingToExplain: there is nothing of that class.
        OSError: a file cannot be written.
    """
    question = Question(request.heads[label], label, request.target, asked.voxel, request.stages)
    found = explain(run, question, without)
    truth = None if asked.truth is None else asked.truth[question.head]
    shares = shares_of(found, question, truth)
    stem = f"{name}_{_as_file_name(label)}" + ("" if request.target == CLASS else f"_{request.target}")
    page = _page(predictor, name, request, asked, question, found, truth, shares)
    explanation_figure(page, [request.out / f"{stem}.png", request.out / f"{stem}.pdf"])
    if request.maps:
        _write_maps(predictor, found, request.out / MAPS, stem, asked.case)
    weights = {f"{flow}, stage {stage}": eta for (flow, stage), eta in _weights(predictor).items()}
    content = {
        "case": name,
        **numbers(found, question, shares, truth),
        **({} if request.voxel is None else {"voxel": list(request.voxel)}),
        **({"attention_weights": weights} if weights else {}),
        "settings": _settings(predictor),
    }
    write_json(content, request.out / f"{stem}.json")
    return request.out / f"{stem}.png"


def _as_file_name(label: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in label)


def _settings(predictor: DiffusionPredictor) -> dict[str, Any]:
    settings = predictor.network.settings
    keys = ("sampler", "steps", "start_step", "from_noise", "draw", "seed")
    return {**predictor.identity, "folds": predictor.folds, **{key: getattr(settings, key) for key in keys}}


def _weights(predictor: DiffusionPredictor) -> dict[tuple[str, int], float]:
    """Return eta of PGDiffSeg's Eq. 5: how much of the attention is added to the features, by flow and stage."""
    return {(unit.flow, unit.stage): unit.eta.item() for unit in units_of(predictor.network.denoiser) if unit.attended}


def _truth(predictor: DiffusionPredictor, folder: Path | None, name: str, case: PreparedCase) -> NDArray | None:
    """Return the masks of all heads in the ground truth, (K, *volume)."""
    if folder is None:
        return None
    path = folder / f"{name}{predictor.dataset_json['file_ending']}"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder with the ground truth of all cases, or leave -g out")
    found = read_presegmentation(
        path, case.properties, case.data.shape[1:], predictor.plans_manager, predictor.configuration_manager,
        predictor.label_manager, TRUTH, allow_ignored=True,
    )  # fmt: skip
    return found.probabilities > 0.5


@dataclass(frozen=True, eq=False)
class _Grid:
    """The way between the network's grid and the image file."""

    predictor: DiffusionPredictor
    case: PreparedCase

    @property
    def shape(self) -> tuple[int, ...]:
        return self.case.data.shape[1:]

    @property
    def forward(self) -> list[int]:
        return list(self.predictor.plans_manager.transpose_forward)

    @property
    def scale(self) -> list[float]:
        """Voxels of the image per voxel of the grid, for each axis of the grid."""
        cropped = self.case.properties["shape_after_cropping_and_before_resampling"]
        return [whole / part for whole, part in zip(cropped, self.shape, strict=True)]

    @property
    def spacing(self) -> list[float]:
        """Size of the grid's voxels in mm."""
        spacing = without_thickness(self.case.properties["spacing"])
        return [spacing[axis] * factor for axis, factor in zip(self.forward, self.scale, strict=True)]

    def voxel(self, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Return the grid's voxel that holds a voxel of the image.

        Raises:
            ValueError: it has another number of axes, or lies outside of the image or of its nonzero region.
        """
        if given is None:
            return None
        forward = self.forward
        size = [0] * 3
        for axis, edge in zip(forward, self.case.properties["shape_before_cropping"], strict=True):
            size[axis] = int(edge)
        axes = 2 if size[0] == 1 else 3
        if len(given) != axes:
            order = "y x" if axes == 2 else "z y x"
            raise ValueError(f"--voxel has {len(given)} numbers, but this image has {axes} axes: give {order}")
        place = [0, *given] if axes == 2 else list(given)
        for each, edge in zip(place, size, strict=True):
            if not 0 <= each < edge:
                shape = " x ".join(map(str, size[3 - axes :]))
                raise ValueError(
                    f"--voxel is {' '.join(map(str, given))}, but the image has {shape} voxels, counted from 0"
                )
        bounds = self.case.properties["bbox_used_for_cropping"]
        within = [place[axis] - low for axis, (low, _) in zip(forward, bounds, strict=True)]
        found = tuple(int((each + 0.5) // factor) for each, factor in zip(within, self.scale, strict=True))
        if any(not 0 <= each < edge for each, edge in zip(found, self.shape, strict=True)):
            raise ValueError(
                f"--voxel is {' '.join(map(str, given))}, where the image is 0 and was cropped: choose another"
            )
        return found

    def name_of_plane(self, axis: int, number: int) -> str:
        """Return the name of a plane of the grid as in the image file; empty for the only plane of a 2D image."""
        of_image = self.forward[axis]
        if self.case.properties["shape_before_cropping"][axis] == 1:
            return ""
        low = self.case.properties["bbox_used_for_cropping"][axis][0]
        return plane_name(of_image, int((number + 0.5) * self.scale[axis]) + low)


def _page(
    predictor: DiffusionPredictor,
    name: str,
    request: Request,
    asked: Asked,
    question: Question,
    found: Explanation,
    truth: NDArray | None,
    shares: Shares,
) -> Page:
    grid, result, before = _Grid(predictor, asked.case), found.result, found.presegmentation
    explained = result if question.target == CLASS else result != before
    axis = int(np.argmax(grid.spacing)) if min(grid.shape) > 1 else grid.shape.index(1)
    others = tuple(each for each in range(3) if each != axis)
    number = int(explained.sum(others).argmax()) if question.voxel is None else question.voxel[axis]

    def planes(volumes: Any) -> NDArray:
        """Return the plane of arrays (..., *volume), with the same leading axes."""
        return np.take(np.asarray(volumes), number, axis - 3)

    image = planes(asked.case.data)
    schemes = predictor.configuration_manager.configuration["normalization_schemes"]
    is_rgb = len(image) == 3 and all(each == RGB for each in schemes)
    where = grid.name_of_plane(axis, number)
    changed = "" if question.target == CLASS else ", where it differs from nnU-Net's segmentation"
    voxel = "" if request.voxel is None else f"voxel {' '.join(map(str, request.voxel))}"
    of_several = "" if is_rgb or len(image) == 1 else f"image of channel 0 of {len(image)}"
    title = (name, where, f"{question.name}{changed}", voxel, of_several)
    flows = dict.fromkeys(flow for flow, _, _ in found.heat if flow != PRIOR)
    in_plane = [grid.spacing[each] for each in others]
    prior, last = found.prior, (PRIOR, 1, False)
    masks = {"nnU-Net": before, **found.ablations}
    return Page(
        title=", ".join(each for each in title if each),
        image=image.transpose(1, 2, 0) if is_rgb else image[0],
        aspect=in_plane[0] / in_plane[1],
        presegmentation=planes(before),
        result=planes(result),
        truth=None if truth is None else planes(truth),
        explained=planes(explained),
        steps=[timestep + 1 for timestep in found.timesteps],
        flows={flow: _flow(flow, found, shares, planes) for flow in flows},
        expected=shares.expected,
        reference=shares.reference,
        of_volume=min(grid.shape) > 1,
        attention=_attention(predictor, found, shares, planes),
        prior=None
        if prior is None
        else Prior(
            prior.presence, planes(prior.presence_heat), shares.presence,  # type: ignore[arg-type]
            planes(found.heat[last][-1]), shares.heat[last][-1], planes(prior.location),
        ),
        rows={
            f"{flow}, stage {stage}": (planes(row), shares.rows[flow, stage])
            for (flow, stage), row in found.rows.items()
        },
        dice_with_result={what: dice(mask, result) for what, mask in masks.items()} if result.any() else {},
        voxel=None if question.voxel is None else tuple(question.voxel[each] for each in others),  # type: ignore[arg-type]
    )  # fmt: skip


def _flow(flow: str, found: Explanation, shares: Shares, planes: Any) -> Flow:
    """Return the maps of a flow, after attention where there is one."""
    stages = sorted({stage for name, stage, _ in found.heat if name == flow})
    keys = [(flow, stage, (flow, stage, True) in found.heat) for stage in stages]
    return Flow(
        stages, np.stack([planes(found.heat[key]) for key in keys]), np.array([shares.heat[key] for key in keys])
    )


def _attention(predictor: DiffusionPredictor, found: Explanation, shares: Shares, planes: Any) -> dict[str, Attention]:
    """Return the maps of each flow with attention before and after it, at T'."""
    weights, attention = _weights(predictor), {}
    for flow in dict.fromkeys(flow for flow, _, after in found.heat if after):
        stages = [stage for name, stage, after in found.heat if name == flow and after]
        keys = [[(flow, stage, after) for stage in stages] for after in (False, True)]
        attention[flow] = Attention(
            stages,
            np.stack([[planes(found.heat[key][0]) for key in row] for row in keys]),
            np.array([[shares.heat[key][0] for key in row] for row in keys]),
            [weights[flow, stage] for stage in stages],
        )
    return attention


def _write_maps(predictor: DiffusionPredictor, found: Explanation, folder: Path, stem: str, case: PreparedCase) -> None:
    """Write each map in the image's geometry, at each step; those of the prior branch and of attention once."""
    folder.mkdir(parents=True, exist_ok=True)
    write = writer_of(predictor.plans_manager.image_reader_writer_class, "leave --maps out")
    ending = map_ending(predictor.dataset_json["file_ending"])
    maps: dict[str, NDArray] = {}
    for (flow, stage, attended), each in found.heat.items():
        after = "_after_attention" if attended else ""
        for timestep, heat in zip(found.timesteps, each, strict=True):
            maps[f"{flow}_stage_{stage}{after}_T_{timestep + 1}"] = heat
    if found.prior is not None:
        maps["prior_branch_location"] = found.prior.location
        maps["prior_branch_presence"] = found.prior.presence_heat
    maps |= {f"{flow}_stage_{stage}_attention_of_voxel": row for (flow, stage), row in found.rows.items()}
    for name, values in maps.items():
        whole = to_image(
            values.astype(np.float32), 0.0, case.properties, predictor.plans_manager, predictor.configuration_manager
        )
        write(whole, folder / f"{stem}_{name.replace(' ', '_')}{ending}", case.properties)
