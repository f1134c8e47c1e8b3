"""Planners on fingerprints: 2D, thin, anisotropic, cascade; targets that fit, that are too small, and time budgets."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from nnunet_diffusion.planners.DiffusionPlanner import DiffusionPlanner
from nnunet_diffusion.planners.DiffusionPlannerResEncL import DiffusionPlannerResEncL
from nnunet_diffusion.planners.DiffusionPlannerResEncM import DiffusionPlannerResEncM
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.model.settings import DiffusionSettings, topology_of
from nnunet_diffusion.planning import budgets, costs, timing
from nnunet_diffusion.planning.budgets import TimeBudget
from nnunet_diffusion.planning.data_reuse import shared_identifier
from nnunet_diffusion.planning.diffusion_planner import TargetTooSmall
from nnunet_diffusion.planning.explain import explanation
from nnunet_diffusion.planning.record import PlanRecord
from nnunet_diffusion.planning.summary import next_commands, summary
from nnunet_diffusion.planning.timing import StepTimes, Timing

NAME = "Dataset900_Sizes"


def read(preprocessed, name="nnUNetDiffusionPlans"):
    """Resolved configurations of plans on the disk, by name, with their settings and records."""
    manager = PlansManager(str(preprocessed / f"{name}.json"))
    resolved = {key: manager.get_configuration(key).configuration for key in manager.available_configurations}
    return {key: (one, DiffusionSettings.from_plans(one), PlanRecord.from_plans(one)) for key, one in resolved.items()}


@pytest.mark.slow
def test_large_volumes_fill_the_target_keep_nnunets_patch_and_get_a_cascade(fingerprint):
    """Neither the dataset's size nor its shape binds: both networks fit, and 85 % of the target are used."""
    preprocessed = fingerprint((300, 300, 300), (1.0, 1.0, 1.0), cases=100, labels=("background", "organ", "lesion"))
    planner = DiffusionPlanner(NAME, gpu_memory_target_in_gb=2)
    plans = planner.plan_experiment()
    found = read(preprocessed)
    assert set(found) == {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"}
    assert found["3d_cascade_fullres"][1] == found["3d_fullres"][1]
    for name in planner.sized:
        configuration, settings, record = found[name]
        assert 0.85 * 2 <= max(record.nnunet_gb, record.denoiser_gb) <= 2, (name, record)
        assert record.nnunet_fp32_gb > record.nnunet_gb and record.denoiser_fp32_gb > record.denoiser_gb
        assert tuple(configuration["patch_size"]) == record.stock_patch_size
        assert configuration["batch_size"] == record.stock_batch_size
        nnunet = topology_of(configuration)["features_per_stage"]
        assert nnunet[0] / 8 <= settings.features_per_stage[0] <= nnunet[0] == 32
        assert record.planner == "DiffusionPlanner"
    assert found["3d_lowres"][0]["data_identifier"] == "nnUNetDiffusionPlans_3d_lowres"
    assert all(name in summary(planner, plans) for name in planner.sized)
    assert next_commands(planner, plans, None, preprocessed=False).splitlines() == [
        "Next:",
        "  nnUNetv2_preprocess -d 900 -plans_name nnUNetDiffusionPlans -c 2d",
        "  nnunet_diffusion train 900 2d 0 -p nnUNetDiffusionPlans",
        "Other configurations: 3d_lowres, 3d_fullres.",
    ]
    assert next_commands(planner, plans, ["3d_lowres"], preprocessed=True).splitlines()[:2] == [
        "Next:",
        "  nnunet_diffusion train 900 3d_lowres 0 -p nnUNetDiffusionPlans",
    ]


def test_natural_images(fingerprint):
    preprocessed = fingerprint((1, 120, 160), (999.0, 1.0, 1.0), channels=("R", "G", "B"))
    DiffusionPlanner(NAME, gpu_memory_target_in_gb=1).plan_experiment()
    ((name, (configuration, settings, _)),) = read(preprocessed).items()
    assert name == "2d" and configuration["patch_size"] == [128, 160]
    assert settings.norm == ("batch" if configuration["batch_size"] >= 8 else "instance")


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((12, 96, 96), (5.0, 0.7, 0.7)), ((40, 1, 40), (1.0, 1.0, 1.0)), ((1, 1, 40), (1.0, 1.0, 1.0))],
)
def test_anisotropic_and_thin_volumes(fingerprint, shape, spacing):
    preprocessed = fingerprint(shape, spacing)
    DiffusionPlanner(NAME, gpu_memory_target_in_gb=1).plan_experiment()
    for configuration, settings, record in read(preprocessed).values():
        assert len(settings.features_per_stage) == len(topology_of(configuration)["strides"]) >= 2
        assert record.denoiser_gb <= 1


def test_resenc_presets_have_their_own_names_networks_and_targets(fingerprint):
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0))
    for planner, name, target in (
        (DiffusionPlannerResEncM, "nnUNetDiffusionResEncUNetMPlans", 8),
        (DiffusionPlannerResEncL, "nnUNetDiffusionResEncUNetLPlans", 24),
    ):
        planner(NAME).plan_experiment()
        configuration, settings, record = read(preprocessed, name)["2d"]
        assert configuration["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
        assert record.memory_target_gb == target
        assert settings.features_per_stage == tuple(topology_of(configuration)["features_per_stage"])


@pytest.mark.parametrize("planner", [DiffusionPlanner, DiffusionPlannerResEncM])
def test_the_smallest_target_that_the_refusal_names_works(fingerprint, planner):
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0))
    with pytest.raises(TargetTooSmall, match=r"-gpu_memory_target 0.001 is too small") as refused:
        planner(NAME, gpu_memory_target_in_gb=0.001).plan_experiment()
    assert not list(preprocessed.glob("*Plans.json"))
    (named,) = re.findall(r"needs ([\d.]+) GB", str(refused.value))
    planner(NAME, gpu_memory_target_in_gb=float(named)).plan_experiment()
    assert list(preprocessed.glob("*Plans.json"))


def test_images_too_small_for_any_network_are_named(fingerprint):
    fingerprint((1, 6, 6), (999.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="images are too small for a network of two stages"):
        DiffusionPlanner(NAME).plan_experiment()


@pytest.mark.slow
def test_the_cascade_of_many_labels_fits_too(fingerprint):
    """Its networks see a channel for each label of the previous stage."""
    labels = ("background", *(f"organ{number}" for number in range(1, 41)))
    preprocessed = fingerprint((140, 140, 140), (1.0, 1.0, 1.0), labels=labels)
    DiffusionPlanner(NAME, gpu_memory_target_in_gb=0.5).plan_experiment()
    found = read(preprocessed)
    assert "3d_cascade_fullres" in found
    for configuration, settings, record in found.values():
        assert max(record.nnunet_gb, record.denoiser_gb) <= 0.5
        assert settings.features_per_stage[0] >= 4 and configuration["batch_size"] >= 2


@pytest.mark.parametrize(("limit", "largest"), [(9.0, 3), (10.0, 4), (10.5, 4), (33.0, 23), (99.0, 40)])
def test_the_largest_batch_that_fits_is_found(limit, largest):
    """Need is flat while the update decides, then grows with the batch."""
    planner = SimpleNamespace(UNet_vram_target_GB=limit, UNet_min_batch_size=2)

    def need(batch):
        return SimpleNamespace(total=max(9.0, 5.2 + 1.2 * batch) * 1e9)

    fits = [batch for batch in range(2, 41) if need(batch).total <= limit * 1e9]
    assert fits[-1] == largest
    assert DiffusionPlanner._fitting_batch(planner, need, 40) == largest
    planner.UNet_vram_target_GB = 8.9
    assert DiffusionPlanner._fitting_batch(planner, need, 40) == 0


def test_one_case(fingerprint):
    fingerprint((1, 64, 64), (999.0, 1.0, 1.0), cases=1)
    planner = DiffusionPlanner(NAME, gpu_memory_target_in_gb=1)
    plans = planner.plan_experiment()
    assert plans["configurations"]["2d"]["batch_size"] == 2
    text = next_commands(planner, plans, None, preprocessed=True)
    assert "train 900 2d all -p nnUNetDiffusionPlans" in text and "1 training cases are too few" in text


def test_nnunets_data_are_shared_where_they_are_the_same(fingerprint):
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0))
    own = DiffusionPlanner(NAME, gpu_memory_target_in_gb=1).plan_experiment()
    assert own["configurations"]["2d"]["data_identifier"] == "nnUNetDiffusionPlans_2d"
    stock = json.loads((preprocessed / "nnUNetDiffusionPlans.json").read_text())
    stock["configurations"]["2d"]["data_identifier"] = "nnUNetPlans_2d"
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(stock))
    assert shared_identifier(NAME, own, "2d") == "nnUNetPlans_2d"
    stock["configurations"]["2d"]["spacing"] = [2.0, 1.0]
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(stock))
    assert shared_identifier(NAME, own, "2d") == "nnUNetDiffusionPlans_2d"


def test_data_of_nnunets_presets_are_shared_and_other_intensities_are_not(fingerprint):
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0))
    own = DiffusionPlanner(NAME, gpu_memory_target_in_gb=1).plan_experiment()
    stock = json.loads((preprocessed / "nnUNetDiffusionPlans.json").read_text())
    stock["configurations"]["2d"]["data_identifier"] = "nnUNetPlans_2d"
    path = preprocessed / "nnUNetResEncUNetMPlans.json"
    path.write_text(json.dumps(stock))
    assert shared_identifier(NAME, own, "2d") == "nnUNetPlans_2d"
    stock["foreground_intensity_properties_per_channel"]["0"]["mean"] = 2.0
    path.write_text(json.dumps(stock))
    assert shared_identifier(NAME, own, "2d") == "nnUNetDiffusionPlans_2d"


def test_data_of_earlier_plans_of_that_name_are_refused_where_they_differ(fingerprint):
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0))
    own = DiffusionPlanner(NAME, gpu_memory_target_in_gb=1).plan_experiment()
    folder = preprocessed / "nnUNetDiffusionPlans_2d"
    folder.mkdir()
    (folder / "case0.b2nd").touch()
    changed = json.loads(json.dumps(own))
    changed["configurations"]["2d"]["preprocessor_name"] = "Mine"
    assert shared_identifier(NAME, changed, "2d"), "an interrupted preprocessing holds nothing yet"
    (folder / "case0.pkl").touch()
    with pytest.raises(
        ValueError, match=r"another preprocessor_name \(according to nnUNetDiffusionPlans.json\).*-overwrite_plans"
    ):
        shared_identifier(NAME, changed, "2d")


@pytest.fixture
def steady_machine(monkeypatch):
    """Steps whose seconds are their FLOPs at `rate`, the denoiser's `overhead` more: a machine whose speed is known.

    Returns a function of the two that returns the list of the steps of nnU-Net that are timed.
    """

    def set_rate(rate, overhead=0.0):
        timed = []

        def nnunet(configuration, channels, heads, batch, patch, device):
            timed.append((topology_of(configuration)["features_per_stage"][0], batch, tuple(map(int, patch))))
            cost = costs.nnunet_cost({**configuration, "patch_size": patch}, channels, heads, batch, amp=False)
            return Timing(cost.flops / rate)

        def denoiser(configuration, settings, channels, heads, batch, patch, device):
            configuration = {**configuration, "patch_size": patch}
            cost = costs.denoiser_cost(configuration, settings, channels, heads, batch, amp=False)
            return Timing(overhead + cost.flops / rate)

        monkeypatch.setattr(budgets, "time_nnunet", nnunet)
        monkeypatch.setattr(budgets, "time_denoiser", denoiser)
        return timed

    return set_rate


@pytest.mark.parametrize(("rate", "width", "shrunk"), [(1e12, 32, False), (2e11, 16, False), (5e9, 8, True)])
def test_time_budget_takes_the_batch_then_the_width_then_the_patch(fingerprint, steady_machine, rate, width, shrunk):
    preprocessed = fingerprint((1, 128, 128), (999.0, 1.0, 1.0), cases=2000)
    steady_machine(rate)
    planner = DiffusionPlanner(NAME, budget=TimeBudget(1.0))
    planner.plan_experiment()
    configuration, _, record = read(preprocessed)["2d"]
    assert record.step_seconds == 1 and record.machine
    assert topology_of(configuration)["features_per_stage"][0] == width
    assert (math.prod(configuration["patch_size"]) < 128 * 128) == shrunk
    assert configuration["batch_size"] < record.stock_batch_size
    assert configuration["batch_size"] >= (2 if shrunk else 8)
    seconds = planner.sized["2d"].cost.flops / rate
    assert 0.5 < seconds <= 1, "a training step takes about a second"


def test_a_small_dataset_keeps_nnunets_width_where_its_small_batch_is_in_time(fingerprint, steady_machine):
    """nnU-Net lets a batch cover 5 % of the dataset: two slices of these."""
    preprocessed = fingerprint((1, 128, 128), (999.0, 1.0, 1.0), cases=20)
    steady_machine(2e11)
    DiffusionPlanner(NAME, budget=TimeBudget(1.0)).plan_experiment()
    configuration, _, record = read(preprocessed)["2d"]
    assert configuration["batch_size"] == 2 and configuration["patch_size"] == [128, 128]
    assert topology_of(configuration)["features_per_stage"][0] == 32
    assert record.nnunet_step_seconds <= 0.5


def test_a_thin_volume_on_a_slow_machine_keeps_its_only_slice(fingerprint, steady_machine):
    preprocessed = fingerprint((1, 128, 128), (1.0, 1.5, 1.5))
    steady_machine(1e8)
    DiffusionPlanner(NAME, budget=TimeBudget(0.01)).plan_experiment()
    assert all(min(configuration["patch_size"]) >= 1 for configuration, _, _ in read(preprocessed).values())


def test_a_cascade_within_a_time_budget_takes_few_timings(fingerprint, steady_machine):
    """nnU-Net plans a low resolution anew at each of many spacings: every network is timed once."""
    preprocessed = fingerprint((160, 160, 160), (1.0, 1.0, 1.0), cases=40)
    timed = steady_machine(1e11)
    DiffusionPlanner(NAME, budget=TimeBudget(1.0)).plan_experiment()
    found = read(preprocessed)
    assert set(found) == {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"}
    for name in ("3d_lowres", "3d_fullres"):
        assert found[name][0]["batch_size"] == 2 and found[name][2].denoiser_step_seconds <= 1.15
    assert len(set(timed)) == len(timed) <= 15, timed


@pytest.mark.parametrize(
    ("patch", "strides", "probe"),
    [
        ((128, 128, 128), [1, 2, 2, 2, 2, 2], (64, 32, 32)),
        ((512, 512), [1, *[2] * 7], (256, 128)),
        ((224, 320, 320), [[1, 1, 1], *[[2, 2, 2]] * 5, [1, 2, 2]], (64, 64, 64)),
        ((56, 40), [1, 2, 2], (56, 40)),
        ((1, 224, 224), [[1, 1, 1], *[[1, 2, 2]] * 5], (1, 32, 32)),
    ],
)
def test_probes_are_small_and_keep_all_stages(patch, strides, probe):
    found = timing.probe_patch(patch, strides)
    if patch[0] == 1:
        assert found[0] == 1 and max(found[1:]) == 64 and math.prod(found) == 64 * 32
    else:
        assert found == probe


def test_time_budget_of_the_denoiser_is_met_where_small_networks_take_as_long_for_fewer_flops(
    fingerprint, steady_machine
):
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0), cases=2000)
    steady_machine(2e11, overhead=0.5)
    DiffusionPlanner(NAME, budget=TimeBudget(1.0)).plan_experiment()
    configuration, settings, record = read(preprocessed)["2d"]
    cost = costs.denoiser_cost(configuration, settings, 1, 2, configuration["batch_size"], amp=False)
    assert record.denoiser_step_seconds == pytest.approx(0.5 + cost.flops / 2e11, abs=1e-3)
    assert 0.8 < record.denoiser_step_seconds < 1.25
    assert settings.features_per_stage[0] > 4


@pytest.mark.parametrize(
    ("measured", "flops", "seconds"),
    [
        ({2.0: 1.0}, 4.0, 2.0),
        ({2.0: 1.0, 4.0: 1.5}, 6.0, 2.0),
        ({2.0: 1.0, 4.0: 1.5}, 1.0, 0.75),
        ({2.0: 1.0, 4.0: 1.5, 8.0: 4.5}, 6.0, 3.0),
        ({2.0: 1.0, 4.0: 1.5, 8.0: 4.5}, 3.0, 1.25),
        ({2.0: 1.0, 4.0: 0.9}, 6.0, 1.0),
    ],
)
def test_step_times_lie_on_lines_through_the_measured_and_never_fall(measured, flops, seconds):
    assert StepTimes(measured).seconds_of(flops) == pytest.approx(seconds)


def test_a_machine_too_slow_gets_the_smallest_plan_that_learns_and_is_told(fingerprint, steady_machine):
    preprocessed = fingerprint((1, 96, 96), (999.0, 1.0, 1.0))
    steady_machine(1e8)
    planner = DiffusionPlanner(NAME, budget=TimeBudget(0.01))
    plans = planner.plan_experiment()
    configuration, settings, record = read(preprocessed)["2d"]
    assert configuration["patch_size"] == [64, 64] and configuration["batch_size"] == 2
    assert topology_of(configuration)["features_per_stage"][0] == 8 and settings.features_per_stage[0] == 4
    assert record.denoiser_step_seconds > 0.01 < record.nnunet_step_seconds
    assert "s instead of 0.01 s" in summary(planner, plans) and "WARNING" not in summary(planner, plans)
    planner.budget.timings = [Timing(1.0, share=0.5)]
    assert "WARNING: this machine was busy" in summary(planner, plans), "not the hardware alone"
    text = next_commands(planner, plans, None, preprocessed=True)
    assert "train 900 2d 0 -p nnUNetDiffusionPlans -tr DiffusionTrainerUNet_5epochs -device cpu" in text
    assert "preprocess" not in text


@pytest.mark.parametrize("shape", [(288, 384), (96, 144), (100, 72)])
def test_no_machine_is_so_slow_that_the_patch_goes_below_its_floor(fingerprint, steady_machine, shape):
    """nnU-Net's loop goes from 64 x 72 to 56 x 72 voxels, which is below 64 x 64."""
    preprocessed = fingerprint((1, *shape), (999.0, 1.0, 1.0))
    steady_machine(1e8)
    DiffusionPlanner(NAME, budget=TimeBudget(0.01)).plan_experiment()
    configuration, _, _ = read(preprocessed)["2d"]
    assert 64 * 64 <= math.prod(configuration["patch_size"]) <= 1.3 * 64 * 64


def test_regions_are_timed_too(fingerprint):
    """Their targets are masks, one a region; the timings are real here."""
    preprocessed = fingerprint((1, 64, 64), (999.0, 1.0, 1.0), labels=("background", "edema", "core", "active"))
    description = preprocessed.parents[1] / "raw" / NAME / "dataset.json"
    content = json.loads(description.read_text())
    content |= {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3}}
    description.write_text(json.dumps({**content, "regions_class_order": [1, 2, 3]}))
    planner = DiffusionPlanner(NAME, budget=TimeBudget(0.2))
    plans = planner.plan_experiment()
    _, settings, record = read(preprocessed)["2d"]
    assert settings.regions and record.denoiser_step_seconds > 0
    assert "denoiser" in explanation(planner, plans, torch.device("cpu"))


def test_time_budget_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        TimeBudget(0)


def test_explanation_names_rules_values_and_alternatives(fingerprint, steady_machine):
    import torch

    fingerprint((1, 64, 48), (999.0, 1.0, 1.0))
    steady_machine(1e10)
    planner = DiffusionPlanner(NAME, gpu_memory_target_in_gb=1)
    plans = planner.plan_experiment()
    text = explanation(planner, plans, torch.device("cpu"))
    settings = planner.sized["2d"].settings
    for field in ("patch_size", "features_per_stage", "attention_tokens", "ema_decay", "learning_rate", "start_step"):
        assert field in text
    assert f"| {settings.attention_tokens} " in text and "median shape [64, 48]" in text
    assert "denoiser 4/32" in text and "(chosen)" in text and "hours, 1000 epochs" in text
    assert "GFLOP" in text and "0.000" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows[: rows.index(next(row for row in rows if "network" in row))]}) == 1, (
        "columns in line"
    )


def test_explanation_of_hidiff_leaves_out_what_only_pgdiffseg_has(fingerprint, steady_machine):
    import torch

    fingerprint((1, 64, 48), (999.0, 1.0, 1.0))
    steady_machine(1e10)
    planner = DiffusionPlanner(NAME, gpu_memory_target_in_gb=1)
    planner.denoiser = "hidiff"
    text = explanation(planner, planner.plan_experiment(), torch.device("cpu"))
    assert "sdb_depth" not in text and "attention_stages" not in text and "| norm" not in text
    assert "HiDiff: attention at the lowest stage alone" in text and "defaults.md" not in text
