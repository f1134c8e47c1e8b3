"""Finished cases of an output folder; a continued run keeps them if they were predicted with the same settings."""

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
SHORT = 16  # hexadecimal digits of a hash, enough to distinguish models


def is_finished(target: str, managers: Managers, save_probabilities: bool) -> bool:
    """True if a case's segmentation is readable and, with `save_probabilities`, its .npz is complete.

    Args:
        target: path of the segmentation without its file ending.
        managers: of the model.
        save_probabilities: whether the run writes probabilities.
    """
    plans_manager, _, dataset_json = managers
    mask = mask_of(target, dataset_json["file_ending"])
    if not mask.is_file() or mask.stat().st_size == 0:
        return False
    if save_probabilities and not zipfile.is_zipfile(f"{target}.npz"):  # a zip file's directory is at its end
        return False
    try:
        plans_manager.image_reader_writer_class().read_seg(str(mask))
    except Exception:  # the exception depends on the reader's library
        return False
    return True


ADDED = {"mirror_samples": False, "uncertainty": False, "temperature": 1.0, "draw": "no", "volume_half_widths": []}
"""Settings that reports of earlier versions do not have, and what was done then."""


def why_not_kept(target: str, ending: str, settings: Mapping[str, Any]) -> str:
    """Return why a finished case cannot be kept in a run with `settings`; empty if it can.

    Args:
        target: path of the segmentation without its file ending.
        ending: of the segmentation.
        settings: everything that determines a result, JSON-serialisable.
    """
    mask, path = mask_of(target, ending), report_of(target)
    report = None
    with contextlib.suppress(OSError, ValueError):
        report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict):
        return f"{mask} has no readable report ({path}), so nothing tells how it was predicted: {CURE}."
    report = {**ADDED, **report}
    for key, now in json.loads(json.dumps(settings)).items():
        if key not in report:
            return f"{path} does not tell {key} of {mask}, which is {now} now: {CURE}."
        if report[key] != now:
            return f"{mask} was predicted with {key} {report[key]}, which is {now} now: {CURE}."
    return ""


def hash_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the shortened SHA-256 of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:SHORT]


def hash_of_json(content: Any) -> str:
    """Return the shortened SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:SHORT]
