"""What the plans say of how they were made: read back, or refused with key, value and limit."""

import json

import pytest

from nnunet_diffusion.planning.record import RECORD_KEY, PlanRecord, memory_target_gb

RECORD = PlanRecord("DiffusionPlanner", 8.0, 0.0, "", 0.0, 0.0, 5.7, 7.9, 10.1, 14.2, (128, 128), 12)


def test_survives_json():
    section = json.loads(json.dumps(RECORD.to_plans()))
    assert PlanRecord.from_plans({RECORD_KEY: section}) == RECORD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, ["version", "2", "reads 1", "install a newer one"]),
        ({"version": "1"}, ["version", "'1'"]),
        ({"memory_target": 8}, ["memory_target", "unknown"]),
        ({"memory_target_gb": "8"}, ["memory_target_gb", "'8'", "number"]),
        ({"step_seconds": -1}, ["step_seconds", "-1", "0"]),
        ({"memory_target_gb": float("nan")}, ["memory_target_gb", "nan", "number"]),
        ({"memory_target_gb": True}, ["memory_target_gb", "True", "number"]),
        ({"nnunet_fp32_gb": "x"}, ["nnunet_fp32_gb", "'x'", "number"]),
        ({"denoiser_step_seconds": -3}, ["denoiser_step_seconds", "-3", "0"]),
        ({"planner": 7}, ["planner", "7", "text"]),
        ({"stock_batch_size": "many"}, ["stock_batch_size", "'many'", "whole number"]),
        ({"stock_patch_size": 5}, ["stock_patch_size", "5", "two or three"]),
        ({"stock_patch_size": [128, 0]}, ["stock_patch_size", "[128, 0]", "at least 1"]),
    ],
)
def test_edited_by_hand(change, words):
    with pytest.raises(ValueError) as error:
        PlanRecord.from_plans({RECORD_KEY: {**RECORD.to_plans(), **change}})
    assert all(word in str(error.value) for word in words), error.value


def test_missing_entry_and_no_dictionary():
    section = RECORD.to_plans()
    del section["machine"]
    with pytest.raises(ValueError, match=r"machine is missing"):
        PlanRecord.from_plans({RECORD_KEY: section})
    with pytest.raises(ValueError, match="dictionary"):
        PlanRecord.from_plans({RECORD_KEY: [1]})


def test_target_of_ours_of_nnunets_planners_and_of_unknown_ones():
    assert memory_target_gb({}, {RECORD_KEY: RECORD.to_plans()}) == 8
    assert memory_target_gb({"experiment_planner_used": "nnUNetPlannerResEncL"}, {}) == 24
    assert memory_target_gb({"experiment_planner_used": "MyPlanner"}, {}) is None
