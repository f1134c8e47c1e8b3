"""Prediction and measurement of validation cases at every setting, written row by row so that a run can go on."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_diffusion.evaluation.case_metrics import class_numbers, default_tolerance
from nnunet_diffusion.evaluation.corruptions import dilate, erase_half, erode
from nnunet_diffusion.evaluation.metrics import voxels_corrected_and_broken
from nnunet_diffusion.evaluation.tubular import centreline_dice, thin_vessel_recall
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.training.checkpoints import read_checkpoint
from nnunet_diffusion.training.presegmentor import build_presegmentor

NNUNET = "nnU-Net"
CORRUPTIONS: dict[str, Callable[[NDArray, int], NDArray]] = {
    "dilated 2": lambda truth, seed: dilate(truth, 2),
    "eroded 2": lambda truth, seed: erode(truth, 2),
    "half erased": erase_half,
}


@dataclass(frozen=True)
class Row:
    """One class of one case at one setting of one model; `start` names what the reverse process began with."""

    model: str
    setting: str
    start: str
    case: str
    label: str
    dice: float
    hd95: float
    start_dice: float
    start_hd95: float
    reference_voxels: int
    predicted_voxels: int
    corrected: int
    broken: int
    seconds: float
    presegmentor_evaluations: int
    denoiser_evaluations: int
    cldice: float = math.nan
    thin_recall: float = math.nan

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What is computed at once."""
        return self.model, self.setting, self.start, self.case


class RowFile:
    """CSV file of rows; a setting's classes are appended together, and what is there already is known.

    A line that a killed run left half written, and its unfinished group, are dropped on reading.
    """

    def __init__(self, path: Path, classes: int) -> None:
        self.path = path
        read = list(_read_rows(path)) if path.is_file() else []
        groups: dict[tuple, list[Row]] = {}
        for row in read:
            groups.setdefault(row.key, []).append(row)
        self.rows = [row for group in groups.values() if len(group) == classes for row in group]
        self.done = {row.key for row in self.rows}
        aside = path.with_suffix(".tmp")
        with aside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in dataclasses.fields(Row))
            writer.writerows(dataclasses.astuple(row) for row in self.rows)
        os.replace(aside, path)  # hours of work: never half of it

    def append(self, rows: Sequence[Row]) -> None:
        """Add the classes of one setting."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(dataclasses.astuple(row) for row in rows)
        self.rows += rows
        self.done.update(row.key for row in rows)


def _read_rows(path: Path) -> Iterator[Row]:
    kinds = {"str": str, "float": float, "int": int}
    fields = dataclasses.fields(Row)
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            with contextlib.suppress(TypeError, ValueError):
                # a file of an earlier version lacks what has a default
                known = [field for field in fields if field.name in line]
                yield Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in known})


@dataclass(frozen=True)
class Setting:
    """One way to sample, as changes to the model's default settings; `start` is nnU-Net, noise or a corruption."""

    name: str
    start: str
    changes: dict[str, Any]


class CountedNetwork(nn.Module):
    """A trained network as the predictor calls it; channels beyond the image's hold a given start."""

    def __init__(self, network: nn.Module, image_channels: int) -> None:
        super().__init__()
        self.network, self.image_channels = network, image_channels
        self.presegmentor_evaluations = self.denoiser_evaluations = 0
        segmenter = isinstance(network, DiffusionSegmenter)
        counted = network.presegmentor if segmenter else network
        # by its first stage where it has some, as HiDiff evaluates the encoder by itself
        first = counted.encoder.stages[0] if hasattr(counted, "encoder") else counted
        first.register_forward_hook(self._count("presegmentor_evaluations"))
        if segmenter:
            network.denoiser.register_forward_hook(self._count("denoiser_evaluations"))

    def _count(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            setattr(self, name, getattr(self, name) + len(inputs[0]))

        return hook

    def forward(self, tile: Tensor) -> Tensor:
        """(B, C [+ K], *patch) -> logits (B, K, *patch)."""
        image, start = tile[:, : self.image_channels], tile[:, self.image_channels :]
        if not start.shape[1]:
            return self.network(image)
        # nnU-Net pads tiles with zeros: there the start is background
        start = torch.cat((start[:, :1] + 1 - start.sum(1, keepdim=True), start[:, 1:]), 1)
        return labels.probabilities_to_logits(self.network.sample(image, presegmentation=start))


class BatchedPredictor(nnUNetPredictor):
    """nnU-Net's patch-wise prediction with several tiles in one batch and sums in float32.

    Tiles of a batch draw different start noise, where stock prediction gives all tiles the same: equal in distribution.
    """

    tile_batch = 16

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: list, do_on_device: bool = True
    ) -> Tensor:
        device = self.device if do_on_device else torch.device("cpu")
        patch = tuple(self.configuration_manager.patch_size)
        weight = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=device).float()
        logits = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), device=device)
        total = torch.zeros(data.shape[1:], device=device)
        for first in range(0, len(slicers), self.tile_batch):
            batch = slicers[first : first + self.tile_batch]
            tiles = torch.stack([data[where] for where in batch]).to(self.device)
            predictions = self._internal_maybe_mirror_and_predict(tiles).to(device, torch.float32)
            for where, prediction in zip(batch, predictions, strict=True):
                logits[where] += prediction * weight
                total[where[1:]] += weight
        return logits / total


@dataclass(frozen=True, eq=False)
class Case:
    """One validation case: as read, and as the network sees it."""

    name: str
    image: NDArray
    truth: NDArray
    spacing_mm: tuple[float, ...]
    data: Tensor
    properties: dict[str, Any]


class Model:
    """A trained model folder, ready to predict cases at any setting."""

    def __init__(self, name: str, folder: Path, fold: int, device: str, *, mirror: bool, tile_batch: int) -> None:
        self.name = name
        self.predictor = BatchedPredictor(
            use_mirroring=mirror,
            device=torch.device(device),
            perform_everything_on_device=device == "cuda",
            allow_tqdm=False,
        )
        self.predictor.tile_batch = tile_batch
        self.predictor.initialize_from_trained_model_folder(str(folder), (fold,), "checkpoint_final.pth")
        self.plans = self.predictor.plans_manager
        self.configuration = self.predictor.configuration_manager
        self.segmenter = self.predictor.network
        self.image_channels = len(self.predictor.dataset_json["channel_names"])
        self.network = CountedNetwork(self.segmenter, self.image_channels)
        self.predictor.network = self.network

    @property
    def classes(self) -> dict[int, str]:
        """Foreground label -> name."""
        named = self.predictor.dataset_json["labels"].items()
        if self.predictor.label_manager.has_regions or self.predictor.label_manager.has_ignore_label:
            raise NotImplementedError("the comparison measures plain labels, not regions or an ignore label")
        return {int(label): name for name, label in named if int(label) != 0}

    def load(self, name: str, raw: Path) -> Case:
        """Read and preprocess one training case of the raw dataset."""
        files = get_filenames_of_train_images_and_targets(str(raw), dict(self.predictor.dataset_json))[name]
        reader = self.plans.image_reader_writer_class()
        image, properties = reader.read_images(files["images"])
        truth, _ = reader.read_seg(files["label"])
        data, _, properties = self._preprocess(image, None, properties)
        spacing = tuple(float(size) for size in properties["spacing"])
        return Case(name, image, truth[0].astype(np.int16), spacing, torch.from_numpy(data), properties)

    def _preprocess(self, image: NDArray, truth: NDArray | None, properties: dict) -> tuple[NDArray, NDArray, dict]:
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        return preprocessor.run_case_npy(
            image, truth, dict(properties), self.plans, self.configuration, self.predictor.dataset_json
        )

    def start_channels(self, case: Case, start: NDArray) -> Tensor:
        """Return a label map on the image's grid as probabilities (K, ...) on the network's grid."""
        _, moved, _ = self._preprocess(case.image, start[None], case.properties)
        label_map = torch.from_numpy(np.maximum(moved, 0)).long()
        heads = self.predictor.label_manager.num_segmentation_heads
        return labels.labels_to_masks(label_map[None], heads)[0]

    def predict(self, case: Case, start: NDArray | None = None) -> tuple[NDArray, float]:
        """Return the label map on the image's grid and the seconds it took (prediction and resampling, no reading)."""
        data = case.data if start is None else torch.cat((case.data, self.start_channels(case, start)))
        self.network.presegmentor_evaluations = self.network.denoiser_evaluations = 0
        begin = time.perf_counter()
        logits = self.predictor.predict_sliding_window_return_logits(data).cpu()
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"case {case.name}: {self.name} gives NaN or infinite logits")
        segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans, self.configuration, self.predictor.label_manager, case.properties
        )
        return np.asarray(segmentation, dtype=np.int16), time.perf_counter() - begin


def start_from(model: Any, nnunet: Path) -> None:
    """Put another trained nnU-Net in the place of the pre-segmentor, if it is another.

    A denoiser that never met its pre-segmentor in training works with any of the same images and classes. HiDiff keeps its own.

    Args:
        model: a Model of a diffusion trainer.
        nnunet: fold's folder of a trained nnU-Net.

    Raises:
        ValueError: the denoiser did meet its own, so that the exchange would change what it was trained for.
    """
    settings, own = model.segmenter.settings, model.segmenter.presegmentor.state_dict()
    if settings.is_hidiff:
        return
    checkpoint = read_checkpoint(nnunet / "checkpoint_final.pth")
    weights = checkpoint["network_weights"]
    if weights.keys() == own.keys() and all(torch.equal(weights[key].to(own[key]), own[key]) for key in own):
        return
    trainer = nnunet.parent.name.split("__")[0]
    if "presegmentation" in settings.starts or model.predictor.label_manager.has_ignore_label:
        raise ValueError(
            f"{model.name} was trained on the segmentations of another {settings.presegmentor_trainer}, so {trainer} "
            "cannot take its place: train it with that one (--epochs, --denoiser-epochs)"
        )
    if {key: each.shape for key, each in weights.items()} == {key: each.shape for key, each in own.items()}:
        model.segmenter.presegmentor.load_state_dict(weights)
    else:
        model.segmenter.presegmentor = _network_of(checkpoint, model)
    known = checkpoint["inference_allowed_mirroring_axes"] or ()
    axes = tuple(axis for axis in model.predictor.allowed_mirroring_axes or () if axis in known)
    model.predictor.allowed_mirroring_axes = axes or None  # nnU-Net takes no empty tuple
    print(f"{model.name} starts from {trainer} instead of {settings.presegmentor_trainer}")


def _network_of(checkpoint: Mapping[str, Any], model: Any) -> nn.Module:
    """Build the frozen network of nnU-Net's checkpoint for the classes and on the device of a Model."""
    init = checkpoint["init_args"]
    plans, heads = PlansManager(init["plans"]), model.predictor.label_manager.num_segmentation_heads
    configuration = plans.get_configuration(init["configuration"])
    channels = determine_num_input_channels(plans, configuration, init["dataset_json"])
    network = build_presegmentor(checkpoint["trainer_name"], plans, configuration, channels, heads)
    network.load_state_dict(checkpoint["network_weights"])
    return network.requires_grad_(False).eval().to(model.predictor.device)


def evaluate(
    model: Model,
    settings: Sequence[Setting],
    cases: Sequence[str],
    raw: Path,
    baseline_folder: Path,
    rows: RowFile,
    check_time: Callable[[], None],
    seed: int,
    *,
    vessels: bool = False,
) -> None:
    """Fill in the missing rows of one model, case by case; the baseline's label maps are kept in `baseline_folder`."""
    for number, name in enumerate(cases):
        missing = [each for each in settings if (model.name, each.name, each.start, name) not in rows.done]
        if not missing:
            continue
        case = model.load(name, raw)
        for setting in missing:
            check_time()
            rows.append(_measure(model, setting, case, baseline_folder, seed, vessels))
        print(f"[{time.strftime('%H:%M:%S')}] {model.name}: {name} ({number + 1} of {len(cases)})", flush=True)


def _measure(model: Model, setting: Setting, case: Case, baseline_folder: Path, seed: int, vessels: bool) -> list[Row]:
    kept = baseline_folder / f"{case.name}.npz"
    corruption = CORRUPTIONS.get(setting.start)
    given = corruption(case.truth, seed + zlib.crc32(case.name.encode())) if corruption else None
    with model.segmenter.overridden(**setting.changes) if setting.changes else contextlib.nullcontext():
        result, seconds = model.predict(case, given)
    if model.name == NNUNET:
        np.savez_compressed(kept, labels=result)
    start = given if given is not None else result if model.name == NNUNET else np.load(kept)["labels"]
    evaluations = model.network.presegmentor_evaluations, model.network.denoiser_evaluations
    key = model.name, setting.name, setting.start
    return measured_rows(key, case, model.classes, start, result, seconds, evaluations, vessels)


def measured_rows(
    key: tuple[str, str, str],
    case: Case,
    classes: dict[int, str],
    start: NDArray,
    result: NDArray,
    seconds: float,
    evaluations: tuple[int, int],
    vessels: bool = False,
) -> list[Row]:
    """Measure a label map of a case, and the one it is compared with.

    Args:
        key: model, setting and start of the rows.
        case: with the truth.
        classes: foreground label -> name.
        start: label map that voxels are corrected or broken against.
        result: label map.
        seconds: that the result took.
        evaluations: of the pre-segmentor and of the denoiser.
        vessels: measure centrelines too.
    """
    everywhere, rows = np.ones(case.truth.shape, bool), []
    for label, name in classes.items():
        begun, found, true = (each == label for each in (start, result, case.truth))
        before, after = (
            class_numbers(mask, true, everywhere, case.spacing_mm, default_tolerance(case.spacing_mm))
            for mask in (begun, found)
        )
        changes = voxels_corrected_and_broken(begun, found, true)
        cldice, thin_recall = math.nan, math.nan
        if vessels:
            cldice, thin_recall = centreline_dice(found, true), thin_vessel_recall(found, true)
        rows.append(
            Row(
                *key,
                case=case.name,
                label=name,
                dice=after["dice"],
                hd95=after["hd95_mm"],
                start_dice=before["dice"],
                start_hd95=before["hd95_mm"],
                reference_voxels=int(np.count_nonzero(true)),
                predicted_voxels=int(np.count_nonzero(found)),
                corrected=changes.corrected,
                broken=changes.broken,
                seconds=round(seconds, 4),
                presegmentor_evaluations=evaluations[0],
                denoiser_evaluations=evaluations[1],
                cldice=cldice,
                thin_recall=thin_recall,
            )
        )
    return rows
