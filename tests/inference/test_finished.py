"""Settings beside each case: a continued run keeps what it would predict itself, and says what differs."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_diffusion.inference.finished import hash_of_json, hash_of_weights, is_finished, why_not_kept

SETTINGS = {"trainer": "DiffusionTrainer", "steps": 2, "folds": ("0", "1"), "weights_sha256": ["ab", "cd"]}
PLANS = type("Plans", (), {"image_reader_writer_class": SimpleITKIO})
MANAGERS = (PLANS, None, {"file_ending": ".nii.gz"})


@pytest.fixture
def target(tmp_path):
    """A finished case, its path without the file ending."""
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "a.json").write_text(json.dumps({**SETTINGS, "seconds": 3.0, "device": "cpu"}))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8)), str(tmp_path / "a.nii.gz"))
    return str(tmp_path / "a")


def test_equal_settings_are_kept(target):
    assert why_not_kept(target, ".nii.gz", SETTINGS) == ""


@pytest.mark.parametrize("key, value", [("steps", 3), ("folds", ["0"]), ("weights_sha256", ["ab", "ce"])])
def test_what_differs_is_named_with_both_values_and_the_cure(target, key, value):
    reason = why_not_kept(target, ".nii.gz", {**SETTINGS, key: value})
    before = json.loads(json.dumps(SETTINGS[key]))
    assert f"{target}.nii.gz was predicted with {key} {before}, which is {value} now" in reason
    assert "leave --continue_prediction out" in reason


def test_a_report_that_does_not_tell_is_no_agreement(target, tmp_path):
    report = tmp_path / "reports" / "a.json"
    assert "does not tell seed" in why_not_kept(target, ".nii.gz", {**SETTINGS, "seed": 1})
    for content in ("", "[]", '{"steps":'):
        report.write_text(content)
        assert f"{target}.nii.gz has no readable report ({report})" in why_not_kept(target, ".nii.gz", SETTINGS)
    report.unlink()
    assert "has no readable report" in why_not_kept(target, ".nii.gz", SETTINGS)


def test_only_what_can_be_read_is_finished(target, tmp_path):
    mask = tmp_path / "a.nii.gz"
    assert is_finished(target, MANAGERS, False)
    assert not is_finished(target, MANAGERS, True)  # no .npz
    np.savez_compressed(f"{target}.npz", probabilities=np.zeros(1000))
    assert is_finished(target, MANAGERS, True)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:-20])
    assert not is_finished(target, MANAGERS, True)
    for broken in (b"", b"no image"):
        mask.write_bytes(broken)
        assert not is_finished(target, MANAGERS, False)
    mask.unlink()
    assert not is_finished(target, MANAGERS, False)


def test_hashes_tell_models_apart():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {key: tensor.clone() for key, tensor in weights.items()}
    assert hash_of_weights(weights) == hash_of_weights(same)
    for key in weights:
        assert hash_of_weights({**weights, key: weights[key] + 1}) != hash_of_weights(weights)
    assert hash_of_weights({**weights, "a": weights["a"].reshape(3, 2)}) != hash_of_weights(weights)
    assert hash_of_json({"a": 1, "b": 2}) == hash_of_json({"b": 2, "a": 1}) != hash_of_json({"a": 1, "b": 3})
