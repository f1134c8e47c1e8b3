"""What stands beside a finished case is compared with what a continued run would do."""

import json

import pytest
import torch

from nnunet_diffusion.inference.finished import hash_of_weights, why_not_kept

SETTINGS = {"samples": 3, "folds": ["0"], "weights_sha256": ["abc"], "start_step": 100}


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
