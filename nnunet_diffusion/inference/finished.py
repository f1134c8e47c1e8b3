"""Finished cases of an output folder, which a continued run leaves as they are if they were predicted as it predicts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from nnunet_diffusion.inference.output import Managers, mask_of, report_of

CURE = "leave --continue_prediction out to predict all cases again, or choose another output folder (-o)"
SHORT = 16  # hexadecimal digits of a hash: enough to tell models apart


def is_finished(target: str, managers: Managers, save_probabilities: bool) -> bool:
    """Whether a case's segmentation can be read and, with `save_probabilities`, its .npz is there as a whole.

    Args:
        target: path of the segmentation without its file ending.
        managers: of the model.
        save_probabilities: whether the run writes probabilities.
    """
    plans_manager, _, dataset_json = managers
    mask = mask_of(target, dataset_json["file_ending"])
    if not mask.is_file() or mask.stat().st_size == 0:
        return False
    if save_probabilities and not zipfile.is_zipfile(f"{target}.npz"):  # its directory stands at the end
        return False
    try:
        plans_manager.image_reader_writer_class().read_seg(str(mask))
    except Exception:  # each reader raises what its library raises
        return False
    return True


def why_not_kept(target: str, ending: str, settings: Mapping[str, Any]) -> str:
    """Say why a finished case cannot stand beside those of a run with `settings`; empty if it can.

    Args:
        target: path of the segmentation without its file ending.
        ending: of the segmentation.
        settings: all that decides a result, JSON-ready.
    """
    mask, path = mask_of(target, ending), report_of(target)
    report = None
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict):
        return f"{mask} has no readable report ({path}), so nothing tells how it was predicted: {CURE}."
    for key, now in json.loads(json.dumps(settings)).items():
        if key not in report:
            return f"{path} does not tell {key} of {mask}, which is {now} now: {CURE}."
        if report[key] != now:
            return f"{mask} was predicted with {key} {report[key]}, which is {now} now: {CURE}."
    return ""


def hash_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict's names and values, shortened."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:SHORT]


def hash_of_json(content: Any) -> str:
    """SHA-256 of what a JSON file holds, shortened."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:SHORT]
