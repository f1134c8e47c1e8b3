"""What stands beside a finished case is compared with what a continued run would do."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_diffusion.inference.finished import hash_of_weights, is_finished, why_not_kept

SETTINGS = {"samples": 3, "folds": ["0"], "weights_sha256": ["abc"], "start_step": 100}
PLANS = type("Plans", (), {"image_reader_writer_class": SimpleITKIO})
MANAGERS = (PLANS, None, {"file_ending": ".nii.gz"})


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (SETTINGS | {"seconds": 3}, ""),
        (SETTINGS | {"samples": 5}, "was predicted with samples 5, which is 3 now: leave --continue_prediction out"),
        (SETTINGS | {"weights_sha256": ["abd"]}, "with weights_sha256"),
        ({key: value for key, value in SETTINGS.items() if key != "folds"}, "does not tell folds"),
        (None, "has no readable report"),
        ([], "has no readable report"),
    ],
)
def test_other_settings_are_named_with_the_cure(tmp_path, report, reason):
    if report is not None:
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / "a.json").write_text(json.dumps(report))
    found = why_not_kept(str(tmp_path / "a"), ".png", SETTINGS)
    assert (reason in found and str(tmp_path / "a.png") in found) if reason else found == ""


def test_hash_tells_weights_apart_by_name_value_shape_and_type():
    weights = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(3)},
        {"a": torch.arange(6.0).flip(0), "b": torch.tensor(3)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)},
        {"a": torch.arange(6.0).double(), "b": torch.tensor(3)},
    ]
    hashes = {hash_of_weights(each) for each in (weights, *others)}
    assert len(hashes) == 5
    assert hash_of_weights({key: value.clone() for key, value in weights.items()}) in hashes


def test_only_what_can_be_read_is_finished(tmp_path):
    target, mask = str(tmp_path / "a"), tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8)), str(mask))
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
