"""Training on several raters' labels: one rater is drawn for each case each time that it is loaded.

nnU-Net preprocesses the labels of each further rater as it does those of the first, into a folder of their own beside the
configuration's, so that foreground oversampling and augmentation see the drawn rater's labels.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_diffusion.inference.cases import workers
from nnunet_diffusion.inference.reading import one_line

if TYPE_CHECKING:
    from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer

LABELS = "labelsTr"
RAW = "nnUNet_raw"


class SeveralRaters(nnUNetBaseDataset):
    """nnU-Net's dataset with the labels of a rater who is drawn anew each time that a case is loaded.

    Args:
        raters: datasets of the same cases, one for each rater.
    """

    def __init__(self, raters: Sequence[nnUNetBaseDataset]) -> None:
        self.raters = list(raters)
        self.source_folder = self.raters[0].source_folder
        self.folder_with_segs_from_previous_stage = self.raters[0].folder_with_segs_from_previous_stage
        self.identifiers = self.raters[0].identifiers

    def load_case(self, identifier: str) -> Any:
        """Return a case as nnU-Net's dataset does; the rater is drawn with NumPy's global generator, as the case is."""
        return self.raters[np.random.randint(len(self.raters))].load_case(identifier)

    @staticmethod
    def save_case(data: Any, seg: Any, properties: dict, output_filename_truncated: str) -> None:
        """Refuse: cases are saved by the datasets of the raters."""
        raise NotImplementedError("a dataset of several raters saves no cases: save them by that of each rater")

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Refuse: the identifiers are those of the raters' datasets."""
        raise NotImplementedError("a dataset of several raters searches no folder: ask that of one rater")


def folder_of(trainer: DiffusionTrainer, rater: str) -> Path:
    """Return the folder of a rater's preprocessed cases, beside that of the configuration."""
    folder = Path(trainer.preprocessed_dataset_folder)
    return folder.with_name(f"{folder.name}_{rater}")


def with_raters(trainer: DiffusionTrainer, dataset: nnUNetBaseDataset) -> nnUNetBaseDataset:
    """Return a training dataset with the labels of all raters in the settings; itself if there is one rater."""
    names = trainer.settings.raters
    if not names:
        return dataset
    stages = dataset.folder_with_segs_from_previous_stage
    others = [
        type(dataset)(
            str(folder_of(trainer, name)), list(dataset.identifiers), folder_with_segs_from_previous_stage=stages
        )
        for name in names
    ]
    return SeveralRaters([dataset, *others])


def prepare_raters(trainer: DiffusionTrainer) -> None:
    """Preprocess the labels of the further raters, where that is not done yet; only the first rank of a training does.

    Raises:
        FileNotFoundError: a rater's labels are missing, wholly or of a case. The message names them and the cure.
        ValueError: labels do not fit their image or dataset.json. The message names the file.
    """
    if trainer.settings.raters and trainer.local_rank == 0:
        cases = [case for part in trainer.do_split() for case in part]
        for name in trainer.settings.raters:
            _prepare(trainer, name, sorted(set(cases)))
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _prepare(trainer: DiffusionTrainer, rater: str, cases: Sequence[str]) -> None:
    folder, first = folder_of(trainer, rater), Path(trainer.preprocessed_dataset_folder)
    missing = [case for case in cases if not _is_newer(folder / f"{case}.pkl", first / f"{case}.pkl")]
    if not missing:
        return
    files = _files(trainer, rater, missing)
    folder.mkdir(exist_ok=True)
    trainer.print_to_log_file(f"Preprocessing the labels of rater {rater}: {len(missing)} cases, into {folder}")
    managers = trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
    with workers(min(default_num_processes, len(missing)) if len(missing) > 1 else 0) as pool:
        jobs = [pool.submit(_preprocess, folder, case, *files[case], *managers) for case in missing]
        for job in tqdm(jobs, unit="case", disable=None):
            job.result()


def _is_newer(path: Path, than: Path) -> bool:
    """Whether a rater's case, whose .pkl is its last file, was preprocessed after that of the first rater."""
    return path.is_file() and path.stat().st_mtime >= than.stat().st_mtime


def _files(trainer: DiffusionTrainer, rater: str, cases: Sequence[str]) -> dict[str, tuple[list[str], str]]:
    """Return image files and a rater's label file of each case."""
    name, ending = trainer.plans_manager.dataset_name, trainer.dataset_json["file_ending"]
    cure = f"add it, or take {rater!r} out of diffusion.training.raters in the plans"
    if not os.environ.get(RAW):
        raise FileNotFoundError(
            f"the labels of rater {rater!r} are not preprocessed yet, and {RAW} is not set: set it to the folder of {name}"
        )
    raw = Path(os.environ[RAW], name)
    labels = raw / f"{LABELS}_{rater}"
    if not labels.is_dir():
        raise FileNotFoundError(f"{labels}, the folder of the labels of rater {rater!r}, is missing: {cure}")
    first = get_filenames_of_train_images_and_targets(str(raw), trainer.dataset_json)
    files = {case: (first[case]["images"], str(labels / f"{case}{ending}")) for case in cases}
    absent = [path for _, path in files.values() if not Path(path).is_file()]
    if absent:
        raise FileNotFoundError(f"{absent[0]} is missing ({len(absent)} of {len(cases)} cases): {cure}")
    return files


def _preprocess(
    folder: Path, case: str, images: list[str], labels: str, plans: Any, configuration: Any, dataset_json: dict
) -> None:
    """Preprocess one case as nnU-Net does; its files appear together, the .pkl last."""
    found = np.unique(plans.image_reader_writer_class().read_seg(labels)[0]).tolist()
    manager = plans.get_label_manager(dataset_json)
    known = {0, *map(int, manager.all_labels), *([int(manager.ignore_label)] if manager.has_ignore_label else [])}
    if unknown := sorted(set(found) - known):
        raise ValueError(
            f"{labels} has label {unknown[0]:g}, which is not in dataset.json ({sorted(known)}): correct the file"
        )
    stage = folder / f".{case}_{os.getpid()}"
    stage.mkdir(exist_ok=True)
    try:
        try:
            configuration.preprocessor_class(verbose=False).run_case_save(
                str(stage / case), images, labels, plans, configuration, dataset_json
            )
        except AssertionError as error:  # nnU-Net compares the shapes
            raise ValueError(f"{labels} does not fit {images[0]}: {one_line(error)}") from error
        for path in sorted(stage.iterdir(), key=lambda path: path.suffix == ".pkl"):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
