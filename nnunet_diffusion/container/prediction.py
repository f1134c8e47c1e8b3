"""A trained model in one process: plain nnU-Net's or that of a diffusion trainer, and its result for one image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray

from nnunet_diffusion.container.images import CaseImage
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.cases import check_image
from nnunet_diffusion.inference.loading import NoDiffusionModel
from nnunet_diffusion.inference.memory import GIB, free_bytes, used_bytes
from nnunet_diffusion.inference.report import foreground_names
from nnunet_diffusion.inference.uncertainty import entropy

RESERVED_GIB = 1.0
"""Memory that the platform needs for itself."""
SHARE_OF_SAMPLES = 0.8
"""Of the seconds of a case; the rest is for resampling the result to the image and writing it."""


@dataclass(frozen=True, eq=False)
class Result:
    """Segmentation (z, y, x), and probabilities (K, z, y, x) of the classes or regions."""

    segmentation: NDArray
    probabilities: NDArray[np.float32]


class Model:
    """A trained model.

    Args:
        folder: of the model.
        folds: their names.
        checkpoint: name of the checkpoint file.
        threads: number of CPU threads.
        samples: number of samples; None for the model's setting.
        calibrated: scale the probabilities by the temperature of `nnunet_diffusion calibrate`.
        uncertainty: draw the samples of `predict --uncertainty`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or unsafe, or a setting does not go with the model.
        NotImplementedError: the model is the second stage of a cascade.
    """

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str],
        checkpoint: str,
        threads: int,
        samples: int | None = None,
        calibrated: bool = False,
        uncertainty: bool = False,
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(threads)
        self.predictor: Any = DiffusionPredictor(
            device=device,
            allow_tqdm=False,
            samples=samples,
            calibrated=calibrated,
            uncertainty=uncertainty,
            threads=threads,
        )
        try:
            self.predictor.initialize_from_trained_model_folder(str(folder), list(folds), checkpoint)
            self.is_diffusion = True
        except NoDiffusionModel as error:
            if samples is not None or calibrated:
                raise ValueError(
                    "the model is plain nnU-Net, which has no samples and no calibration: leave --samples and --calibrated out"
                ) from error
            self.is_diffusion = False
            self.predictor = nnUNetPredictor(
                perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
            )
            numbers = tuple(int(fold) if fold.isdecimal() else fold for fold in folds)
            self.predictor.initialize_from_trained_model_folder(str(folder), numbers, checkpoint)
        if self.predictor.configuration_manager.previous_stage_name is not None:
            raise NotImplementedError(
                "the model is the second stage of a cascade, which a container does not run: take another configuration"
            )

    @property
    def samples(self) -> int:
        """Number of samples of each fold; 0 of plain nnU-Net."""
        return self.predictor.network.settings.samples if self.is_diffusion else 0

    @property
    def reader(self) -> str:
        """Name of nnU-Net's reader of the training images."""
        return self.predictor.plans_manager.image_reader_writer_class.__name__

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes or regions, in the order of the probabilities."""
        return foreground_names(self.predictor.label_manager)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        description = self.predictor.dataset_json
        return len(description.get("channel_names") or description["modality"])

    def predict(self, name: str, image: CaseImage, limit: float, deadline: float | None = None) -> Result:
        """Segment one image.

        Args:
            name: of the case, for messages.
            image: its channels.
            limit: main memory that it may use, in bytes.
            deadline: `time.perf_counter()` until which samples may be drawn; None for no limit.

        Raises:
            ValueError: the image does not fit the model, or is empty.
            MemoryError: it does not fit into memory.
        """
        predictor = self.predictor
        managers = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        check_image(name, "CASE", image.channels, image.spacing, managers, limit)
        if self.is_diffusion:
            predictor.deadline = deadline
            if predictor.device.type == "cpu":
                predictor.state_memory_gb = max(0.0, limit - 2 * image.channels.nbytes) / GIB
        properties = {"spacing": list(image.spacing)}
        segmentation, probabilities = predictor.predict_single_npy_array(image.channels, properties, None, None, True)
        # nnU-Net's rounded weights of tiles may give a little more than 1
        return Result(np.asarray(segmentation), np.asarray(probabilities, np.float32).clip(0, 1))

    def class_probabilities(self, result: Result) -> list[NDArray[np.float32]]:
        """Return the probabilities (z, y, x) of each foreground class or region."""
        return list(result.probabilities[-len(self.classes) :])

    def entropy(self, result: Result) -> NDArray[np.float32]:
        """Return the entropy (z, y, x) of the probabilities in nats, of regions the sum of theirs."""
        return entropy(torch.from_numpy(result.probabilities), self.predictor.label_manager.has_regions).numpy()


def memory_limit(memory_gib: float) -> float:
    """Return the main memory in bytes that a case may use.

    Args:
        memory_gib: of the container.
    """
    return max(0.0, min((memory_gib - RESERVED_GIB) * GIB - used_bytes(), free_bytes(torch.device("cpu"))))


def deadline_of(begin: float, seconds: float | None) -> float | None:
    """Return until when samples may be drawn, on the clock of `time.perf_counter()`.

    Args:
        begin: when the case began.
        seconds: that it may take; None for no limit.
    """
    return None if seconds is None else max(begin + SHARE_OF_SAMPLES * seconds, time.perf_counter())
