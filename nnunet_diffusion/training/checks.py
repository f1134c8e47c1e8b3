"""Early checks of the user's folders, plans and cases; each error message names the cure."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.files import preprocess_command
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.precision import all_finite
from nnunet_diffusion.model.settings import PLANS_KEY, DiffusionSettings, inference_settings

PREPROCESSED, RESULTS = FOLDERS = ("nnUNet_preprocessed", "nnUNet_results")
PATIENCE_SECONDS = 5.0


def refuse_unusable_folders() -> None:
    """Raise an error if nnU-Net's folders cannot be used; nnU-Net itself would use a folder named None if one is not set.

    Raises:
        RuntimeError: a folder is not set.
        OSError: the results folder cannot be created or written.
    """
    for name in FOLDERS:
        if not os.environ.get(name):
            raise RuntimeError(f"{name} is not set: export {name}=/path/to/{name}, as for any nnU-Net training.")
    folder = Path(os.environ[RESULTS])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{RESULTS} is {folder}, which cannot be written ({error.strerror}): make it writable, free some space, "
            f"or export {RESULTS}=/another/folder."
        ) from error


def explained(error: Exception, preprocessed: Path, epoch: int) -> Exception | None:
    """Return an exception that explains an error in loading cases to the user; None if the error has another cause.

    Args:
        error: exception that nnU-Net raised in training.
        preprocessed: folder of the configuration's preprocessed cases.
        epoch: epoch in which it happened, from 0.
    """
    saved = f"Finished epochs are saved; continue with --c, from epoch {epoch} on."
    if not preprocessed.is_dir():
        return FileNotFoundError(f"{preprocessed} is missing: mount or restore it, or run nnUNetv2_preprocess. {saved}")
    # nnU-Net reports this about the processes that write the validation's cases
    if "Some background workers" in str(error):
        return RuntimeError(
            "A process that writes the validation's segmentations has died. Its own message, if any, is above. Without a "
            "message it was killed, mostly for lack of memory: export nnUNet_def_n_proc with a smaller number and run the "
            "same command again (with --c if this was the denoiser's validation)."
        )
    if "background workers" in str(error):
        return RuntimeError(
            "A process that loads and augments cases has died. Its own message, if any, is above. Without a message it was "
            "killed, mostly for lack of memory or of space in /dev/shm: free some, or export nnUNet_n_proc_DA with a "
            f"smaller number. {saved}"
        )
    return None


def refuse_foreign_plans(dataset_name: str, dataset_json: Mapping[str, Any]) -> None:
    """Raise ValueError if the plans are for another dataset, because nnU-Net would train on the cases of that dataset.

    Args:
        dataset_name: name of the dataset in the plans.
        dataset_json: dataset.json of the dataset that the user named.
    """
    path = Path(os.environ[PREPROCESSED]) / dataset_name / "dataset.json"
    theirs = json.loads(path.read_text()) if path.is_file() else None
    for key in ("labels", "channel_names"):
        if theirs is None or theirs.get(key) != dataset_json.get(key):
            found = f"has {key} {theirs.get(key)}, not {dataset_json.get(key)}" if theirs else f"has no {path}"
            raise ValueError(
                f"These plans were made for {dataset_name}, which {found}. Plan and preprocess this "
                "dataset with 'nnunet_diffusion plan -d ID --preprocess -c CONFIG', or transfer the plans with "
                "nnUNetv2_move_plans_between_datasets and run nnUNetv2_preprocess."
            )


def shared_with_other_folds(path: Path, configuration_name: str, settings: DiffusionSettings) -> DiffusionSettings:
    """Return the settings with the inference settings of the folds already trained, which share the model's plans.json.

    They may have been tuned since (`nnunet_diffusion tune`).

    Args:
        path: path of the model's plans.json, which may not exist yet.
        configuration_name: name of this training's configuration.
        settings: settings of this fold.

    Raises:
        ValueError: those folds have other settings of another section.
    """
    if not path.is_file():
        return settings
    plans = read_shared_json(path)
    if plans["configurations"].get(configuration_name, {}).get(PLANS_KEY) is None:
        return settings
    configuration = PlansManager(plans).get_configuration(configuration_name).configuration
    theirs = DiffusionSettings.from_plans(configuration)
    existing, ours = dataclasses.asdict(theirs), dataclasses.asdict(settings)
    differing = [key for key in ours if key not in inference_settings() and existing.get(key) != ours[key]]
    if differing:
        raise ValueError(
            f"{path} belongs to a training with other settings ({', '.join(differing)}: "
            f"{[existing.get(key) for key in differing]} there, {[ours[key] for key in differing]} here), and all folds of "
            "a model share it. Give the plans another plans_name, or remove that folder."
        )
    return dataclasses.replace(settings, **{key: existing[key] for key in inference_settings()})


def read_shared_json(path: Path) -> Any:
    """Read a JSON file that jobs of other folds also write; an incomplete file is read again until it is complete.

    Raises:
        ValueError: the file is not valid JSON for `PATIENCE_SECONDS`. The message names the file and the cure.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"{path} is damaged ({error}). Remove it: the next training of any fold writes it again."
                ) from error
            time.sleep(0.1)


def check_batch(batch: Mapping[str, Any], trainer: nnUNetTrainer) -> None:
    """Raise ValueError if a batch has a label that is not in dataset.json, or NaN or infinite voxels.

    The message names the case. Labels are not checked with regions, because their masks do not show unknown labels.

    Args:
        batch: batch of nnU-Net's loader, on the CPU; `target` may be a list (deep supervision), finest resolution first.
        trainer: trainer that uses the batch.
    """
    label_manager, plans = trainer.label_manager, trainer.plans_manager
    again = preprocess_command(plans.dataset_name, plans.plans_name, trainer.configuration_name)
    classes, ignored = label_manager.num_segmentation_heads, label_manager.ignore_label
    image, target = batch["data"], batch["target"]
    target = target[0] if isinstance(target, (list, tuple)) else target
    for number, case in enumerate(batch.get("keys", range(len(image)))):
        if not label_manager.has_regions:
            labels.check_labels(target[number], classes, case, ignored, again)
        if not all_finite(image[number]):
            raise ValueError(
                f"Case {case} has NaN or infinite voxels after preprocessing; a single one in the image can cause this. "
                f"Replace such voxels in the image, then preprocess again: {again}."
            )
