"""Files of explained cases: a page of each, its maps in the image's geometry, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnunet_diffusion.explain.explanation import CLASS, Explanation, Question, Reverse, explain, numbers, share_inside
from nnunet_diffusion.explain.explanation_figure import Page, explanation_figure
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


def prepared(predictor: DiffusionPredictor, name: str, files: Sequence[str]) -> PreparedCase:
    """Read and preprocess a case; see `prepare_case` for the errors."""
    return prepare_case(CaseFiles(name, files), predictor.managers)


def explain_class(
    predictor: DiffusionPredictor,
    request: Request,
    name: str,
    case: PreparedCase,
    run: Reverse,
    without: Mapping[str, Tensor],
    label: str,
) -> Path:
    """Explain one class of a case, and write its page, numbers and, where asked for, maps.

    Args:
        predictor: with one fold of a model.
        request: what is asked.
        name: name of the case.
        case: the case on the network's grid.
        run: the reverse process of that case.
        without: its `ablations`.
        label: name of the class.

    Returns:
        The page, a PNG.

    Raises:
        MemoryError: the maps do not fit into memory.
        NothingToExplain: there is nothing of that class.
        ValueError: the truth does not fit the image, or the voxel is outside.
    """
    grid = _Grid(predictor, case)
    question = Question(request.heads[label], label, request.target, grid.voxel(request.voxel), request.stages)
    found = explain(run, question, without)
    truth = _truth(predictor, request.truths, name, case)
    mask = None if truth is None else truth[question.head]
    stem = f"{name}_{_as_file_name(label)}" + ("" if request.target == CLASS else f"_{request.target}")
    content = {"case": name, **numbers(found, question, mask), **_weights(predictor), "settings": _settings(predictor)}
    write_json(content, request.out / f"{stem}.json")
    voxel = "" if request.voxel is None else f"voxel {' '.join(map(str, request.voxel))}"
    page = _page(name, voxel, question, found, mask, grid)
    explanation_figure(page, [request.out / f"{stem}.png", request.out / f"{stem}.pdf"])
    if request.maps:
        _write_maps(predictor, found, request.out / MAPS, stem, case)
    return request.out / f"{stem}.png"


def _as_file_name(label: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in label)


def _settings(predictor: DiffusionPredictor) -> dict[str, Any]:
    settings = predictor.network.settings
    keys = ("sampler", "steps", "start_step", "from_noise", "draw", "seed")
    return {**predictor.identity, "folds": predictor.folds, **{key: getattr(settings, key) for key in keys}}


def _weights(predictor: DiffusionPredictor) -> dict[str, Any]:
    """Return eta of PGDiffSeg's Eq. 5: how much of the attention is added to the features, by flow and stage."""
    found: dict[str, dict[str, float]] = {}
    for unit in units_of(predictor.network.denoiser):
        if unit.attended:
            found.setdefault(unit.flow, {})[f"stage {unit.stage}"] = unit.eta.item()
    return {"attention_weights": found} if found else {}


def _truth(predictor: DiffusionPredictor, folder: Path | None, name: str, case: PreparedCase) -> NDArray | None:
    """Return the masks of all heads in the ground truth, (K, *volume)."""
    if folder is None:
        return None
    path = folder / f"{name}{predictor.dataset_json['file_ending']}"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder with the ground truth of all cases, or leave -g out")
    found = read_presegmentation(
        path, case.properties, case.data.shape[1:], predictor.plans_manager, predictor.configuration_manager,
        predictor.label_manager,
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


def _page(name: str, voxel: str, question: Question, found: Explanation, truth: NDArray | None, grid: _Grid) -> Page:
    result, before = found.result, found.presegmentation
    explained = result if question.target == CLASS else result != before
    axis = int(np.argmax(grid.spacing)) if min(grid.shape) > 1 else grid.shape.index(1)
    others = tuple(each for each in range(3) if each != axis)
    number = int(explained.sum(others).argmax()) if question.voxel is None else question.voxel[axis]

    def plane(volume: NDArray) -> NDArray:
        return np.take(volume, number, axis)

    def planes(volumes: NDArray) -> NDArray:
        return np.take(volumes, number, axis + 1)

    image = planes(grid.case.data)
    is_rgb = len(image) == 3 and all(
        each == RGB for each in grid.predictor.configuration_manager.configuration["normalization_schemes"]
    )
    reference = result if truth is None else truth
    flows, stages, shares, attention, attention_shares = _flows(found, reference, planes)
    where = grid.name_of_plane(axis, number)
    what = (
        question.name if question.target == CLASS else f"{question.name}, where it differs from nnU-Net's segmentation"
    )
    in_plane = [grid.spacing[each] for each in others]
    attended = sorted({stage for _, stage, after in found.heat if after})
    return Page(
        title=", ".join(each for each in (name, where, what, voxel) if each),
        image=image.transpose(1, 2, 0) if is_rgb else image.mean(0),
        aspect=in_plane[0] / in_plane[1],
        presegmentation=plane(before),
        result=plane(result),
        truth=None if truth is None else plane(truth),
        explained=plane(explained),
        steps=[timestep + 1 for timestep in found.timesteps],
        flows=flows,
        stages=stages,
        shares=shares,
        expected=float(reference.mean()),
        reference="result" if truth is None else "truth",
        attention=attention,
        attention_shares=attention_shares,
        attention_stages=attended,
        attention_step=found.timesteps[0] + 1,
        prior=plane(found.heat[PRIOR, 1, False][-1]) if found.prior is not None else None,
        location=None if found.prior is None else plane(found.prior.location),
        presence=None if found.prior is None else found.prior.presence,
        rows={f"{flow}, stage {stage}": plane(row) for (flow, stage), row in found.rows.items()},
        voxel=None if question.voxel is None else tuple(question.voxel[each] for each in others),  # type: ignore[arg-type]
    )


def _flows(found: Explanation, reference: NDArray, planes: Any) -> tuple[dict, dict, dict, dict, dict]:
    """Return the page's heat maps, stages and shares of each flow, and those before and after attention at T'."""

    def share(heat: NDArray) -> float:
        return share_inside(heat, reference)

    flows: dict[str, NDArray] = {}
    numbers: dict[str, list[int]] = {}
    shares: dict[str, NDArray] = {}
    attention: dict[str, tuple[NDArray, NDArray]] = {}
    attention_shares: dict[str, tuple[NDArray, NDArray]] = {}
    for flow in dict.fromkeys(flow for flow, _, _ in found.heat if flow != PRIOR):
        stages = sorted({stage for name, stage, _ in found.heat if name == flow})
        numbers[flow] = stages
        last = [found.heat.get((flow, stage, True), found.heat[flow, stage, False]) for stage in stages]
        flows[flow] = np.stack([planes(maps) for maps in last])
        shares[flow] = np.array([[share(heat) for heat in maps] for maps in last])
        attended = [stage for stage in stages if (flow, stage, True) in found.heat]
        if attended:
            pair = [[found.heat[flow, stage, after][0] for stage in attended] for after in (False, True)]
            before, after = (np.stack([planes(heat[None])[0] for heat in maps]) for maps in pair)
            attention[flow] = before, after
            attention_shares[flow] = (
                np.array([share(heat) for heat in pair[0]]),
                np.array([share(heat) for heat in pair[1]]),
            )
    return flows, numbers, shares, attention, attention_shares


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
    maps |= {f"{flow}_stage_{stage}_attention_of_voxel": row for (flow, stage), row in found.rows.items()}
    for name, values in maps.items():
        whole = to_image(
            values.astype(np.float32), 0.0, case.properties, predictor.plans_manager, predictor.configuration_manager
        )
        write(whole, folder / f"{stem}_{name.replace(' ', '_')}{ending}", case.properties)
