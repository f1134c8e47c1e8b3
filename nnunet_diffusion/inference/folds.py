"""The mean of several prediction folders, such as those of nnU-Net's five folds, and the uncertainty of their disagreement."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunet_diffusion import __version__
from nnunet_diffusion.files import read_dictionary, write_json
from nnunet_diffusion.inference.cases import fitting_processes, run_each
from nnunet_diffusion.inference.finished import hash_of_json
from nnunet_diffusion.inference.fusion import votes_of
from nnunet_diffusion.inference.maps import writer_of
from nnunet_diffusion.inference.output import map_of, mask_of, numbers_file_of, remove_case, written_at_once
from nnunet_diffusion.inference.presegmentation import check_geometry, check_shape, read_probabilities
from nnunet_diffusion.inference.reading import one_line, without_thickness
from nnunet_diffusion.inference.report import foreground_names
from nnunet_diffusion.inference.staging import staging_folders
from nnunet_diffusion.inference.uncertainty import MAPS, CaseUncertainty, Uncertainty, numbers_of
from nnunet_diffusion.training.checkpoints import write_aside

DESCRIPTION, PROBABILITIES, PROPERTIES = "dataset.json", ".npz", ".pkl"
AGAIN = "give the same command again: finished cases are kept"
WITHOUT_MAPS = "use nnUNetv2_ensemble, which writes no maps"
CHANNEL_COPIES, MAP_COPIES = 6, 12
"""Arrays in float32, of all channels and of one map, that a case needs at once."""


@dataclass(frozen=True)
class Ensemble:
    """Prediction folders and where their mean is written.

    Attributes:
        folders: two or more; each has `CASE.npz` and the segmentation of every case, and counts with weight 1.
        output: output folder.
        dataset_json: content of nnU-Net's dataset.json.
        reader: instance of nnU-Net's reader of the segmentations.
        save_probabilities: also write the mean probabilities.
    """

    folders: tuple[Path, ...]
    output: Path
    dataset_json: Mapping[str, Any]
    reader: Any
    save_probabilities: bool = False

    @property
    def ending(self) -> str:
        """File ending of the segmentations."""
        return self.dataset_json["file_ending"]

    def label_manager(self) -> LabelManager:
        """Return nnU-Net's label manager."""
        return LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))

    def inputs(self, case: str) -> list[tuple[Path, Path]]:
        """Return segmentation and probabilities of a case in each folder."""
        return [(mask_of(folder / case, self.ending), folder / f"{case}{PROBABILITIES}") for folder in self.folders]

    def outputs(self, case: str) -> list[Path]:
        """Return all files that are written for a case."""
        target = self.output / case
        maps = [map_of(target, name, self.ending) for name in MAPS]
        endings = (PROBABILITIES, PROPERTIES) if self.save_probabilities else ()
        return [mask_of(target, self.ending), numbers_file_of(target), *maps, *(Path(f"{target}{e}") for e in endings)]

    def settings(self, case: str) -> dict[str, Any]:
        """Return what decides the files of a case: folders, and a hash of their files' sizes and times, labels and version."""
        files = [path.stat() for pair in self.inputs(case) for path in pair]
        order = self.dataset_json.get("regions_class_order")
        content = [
            [(each.st_size, each.st_mtime_ns) for each in files],
            self.dataset_json["labels"],
            order,
            __version__,
        ]
        return {
            "folders": [str(folder.resolve()) for folder in self.folders],
            "save_probabilities": self.save_probabilities,
            "fingerprint": hash_of_json(content),
        }

    def is_finished(self, case: str) -> bool:
        """True if all files of a case are there and were made of the files that the folders have now."""
        try:
            numbers = read_dictionary(numbers_file_of(self.output / case), "")
        except (OSError, ValueError):  # missing or damaged
            return False
        return numbers.get("settings") == self.settings(case) and all(path.is_file() for path in self.outputs(case))


@dataclass(frozen=True, eq=False)
class Average:
    """Mean of a case's predictions.

    Attributes:
        probabilities: (K, *image), float32.
        uncertainty: on the image's grid; each folder is a sample.
        properties: geometry of the image, as nnU-Net's reader returns it.
    """

    probabilities: NDArray
    uncertainty: CaseUncertainty
    properties: dict[str, Any]


def find_cases(folders: Sequence[Path], ending: str) -> list[str]:
    """Return the sorted names of the cases, of which every folder has probabilities and segmentation.

    Args:
        folders: prediction folders.
        ending: file ending of the segmentations.

    Raises:
        FileNotFoundError: there is none, or a folder lacks one. The message names folder, case and what to do.
    """
    masks, probabilities = ([_names(folder, each) for folder in folders] for each in (ending, PROBABILITIES))
    found = [mask | soft for mask, soft in zip(masks, probabilities, strict=True)]
    if not set.intersection(*found):
        raise FileNotFoundError(
            f"{', '.join(map(str, folders))} have no case in common (CASE{ending} and CASE{PROBABILITIES}): give folders of "
            "nnUNetv2_predict --save_probabilities for the same images"
        )
    cases = set.union(*found)
    for folder, mask, soft, either in zip(folders, masks, probabilities, found, strict=True):
        _refuse_missing(
            folder, "all files", cases - either, "predict it there too, or move it out of the other folders"
        )
        _refuse_missing(folder, PROBABILITIES, cases - soft, "predict with --save_probabilities")
        _refuse_missing(folder, ending, cases - mask, "it has the geometry, so predict the case again")
    return sorted(cases)


def _refuse_missing(folder: Path, what: str, cases: set[str], cure: str) -> None:
    if cases:
        raise FileNotFoundError(
            f"{folder} lacks {what} of the case {min(cases)} ({len(cases)} such cases in all): {cure}"
        )


def _names(folder: Path, ending: str) -> set[str]:
    names = (path.name for path in folder.iterdir() if path.is_file())
    return {name.removesuffix(ending) for name in names if name.endswith(ending) and not name.startswith(".")}


def average_folders(
    ensemble: Ensemble,
    cases: Sequence[str],
    processes: int | None = None,
    on_case: Callable[[str], object] = lambda name: None,
) -> dict[str, str]:
    """Average all cases that are not finished yet and write their files. A case that fails does not stop the others.

    Args:
        ensemble: what is averaged.
        cases: from `find_cases`.
        processes: number of further processes, 0 for none; None for as many as there are cores and fit into the memory.
        on_case: called with the name of each case that ended.

    Returns:
        name of each case that failed -> why. It has no files in the output folder.

    Raises:
        NotImplementedError: maps cannot be written in the images' format.
        OSError: nothing can be written to the output folder.
    """
    writer_of(type(ensemble.reader), WITHOUT_MAPS)  # raises before a case is read
    with staging_folders([ensemble.output]) as stages:
        _write_description(ensemble)
        todo = [case for case in cases if not ensemble.is_finished(case)]
        for case in sorted(set(cases) - set(todo)):
            on_case(case)
        if processes is None:
            processes = fitting_processes([needed_bytes(ensemble, case) for case in todo])
        return run_each(_average_case, {case: (ensemble, stages, case) for case in todo}, processes, on_case)


def needed_bytes(ensemble: Ensemble, case: str) -> float:
    """Return a rough estimate of the memory of a case, from the size of its probabilities; 0 if they cannot be read."""
    heads = ensemble.label_manager().num_segmentation_heads
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        with zipfile.ZipFile(ensemble.inputs(case)[0][1]) as archive:
            size = archive.getinfo("probabilities.npy").file_size  # uncompressed
        return size * (CHANNEL_COPIES + MAP_COPIES / heads)
    return 0


def average_case(ensemble: Ensemble, case: str) -> Average:
    """Read a case from all folders, and return the mean and the disagreement.

    Raises:
        ValueError: a file cannot be read, is not of probabilities of these classes, or its geometry is not that of the first
            folder. The message names the file, the value found and the expected one.
    """
    label_manager = ensemble.label_manager()
    regions, heads = label_manager.has_regions, label_manager.num_segmentation_heads
    inputs = ensemble.inputs(case)
    grids = [_read_geometry(mask, ensemble.reader) for mask, _ in inputs]
    (shape, properties), where = grids[0], f"the segmentation {inputs[0][0]}"
    total, uncertainty = np.zeros((heads, *shape), np.float32), Uncertainty(regions)
    for folder, (mask, path), (own_shape, own_properties) in zip(ensemble.folders, inputs, grids, strict=True):
        check_shape("segmentation", mask, own_shape, shape, where)
        check_geometry("segmentation", mask, own_properties, properties, where)
        probabilities = read_probabilities("file", path, shape, heads, regions, where)
        total += probabilities
        member = torch.from_numpy(probabilities)
        # a region is where its probability is above 0.5, its logit above 0
        uncertainty.add(member, votes_of(member - 0.5 if regions else member, regions), 1.0, folder.name)
    total /= len(inputs)
    found = uncertainty.result(torch.from_numpy(total), tuple(slice(None) for _ in shape))
    return Average(total, found, properties)


def _read_geometry(path: Path, reader: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    try:
        found, properties = reader.read_seg(str(path))
    except Exception as error:  # the exception depends on the reader's library
        raise ValueError(f"The segmentation {path} cannot be read: {one_line(error)}; predict it again.") from error
    return found.shape[1:], properties


def _average_case(ensemble: Ensemble, stages: Mapping[Path, Path], case: str) -> None:
    """Average a case and write its files, all or none; those of an earlier run are removed first."""
    remove_case(ensemble.output / case, ensemble.ending)
    settings = ensemble.settings(case)  # before the files are read
    average = average_case(ensemble, case)
    with written_at_once(ensemble.output / case, ensemble.ending, stages, AGAIN) as stage:
        _write(ensemble, average, settings, stage / case)


def _write(ensemble: Ensemble, average: Average, settings: Mapping[str, Any], target: Path) -> None:
    """Write the files of a case as nnU-Net's ensemble does, and those of `nnunet_diffusion predict --uncertainty`."""
    label_manager, properties = ensemble.label_manager(), average.properties
    segmentation = label_manager.convert_probabilities_to_segmentation(average.probabilities)
    ensemble.reader.write_seg(segmentation, str(mask_of(target, ensemble.ending)), properties)
    if ensemble.save_probabilities:
        np.savez_compressed(f"{target}{PROBABILITIES}", probabilities=average.probabilities)
        save_pickle(properties, f"{target}{PROPERTIES}")
    numbers_file_of(target).parent.mkdir(exist_ok=True)
    write_map = writer_of(type(ensemble.reader), WITHOUT_MAPS)
    for name, values in average.uncertainty.maps.items():
        write_map(values.numpy(), map_of(target, name, ensemble.ending), properties)
    voxel_mm3 = math.prod(without_thickness(properties["spacing"]))
    numbers = numbers_of(average.uncertainty, foreground_names(label_manager), voxel_mm3)
    write_json({**numbers, "settings": settings}, numbers_file_of(target))


def _write_description(ensemble: Ensemble) -> None:
    """Write dataset.json, from which nnU-Net and `nnunet_diffusion evaluate` know the classes, unless it is there."""
    path = ensemble.output / DESCRIPTION
    with contextlib.suppress(OSError, ValueError):  # missing or damaged
        if read_dictionary(path, "") == ensemble.dataset_json:
            return
    write_aside(lambda aside: write_json(ensemble.dataset_json, Path(aside)), path, f"Free some space, then {AGAIN}.")
