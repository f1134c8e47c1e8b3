from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_diffusion.model.settings import DiffusionSettings

pytest.importorskip("nnunetv2")

import compare
import comparison_options
import comparison_plans
import comparison_training
from comparison_evaluation import CORRUPTIONS, NNUNET, Case, CountedNetwork, Row, RowFile, Setting, measured_rows
from comparison_report import mean_rows, write_report

STOCK = {
    "plans_name": "nnUNetPlans",
    "configurations": {
        "2d": {
            "batch_size": 366,
            "patch_size": [56, 40],
            "spacing": [1.0, 1.0],
            "data_identifier": "nnUNetPlans_2d",
            "architecture": {
                "network_class_name": "PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 4,
                    "features_per_stage": [32, 64, 128, 256],
                    "kernel_sizes": [[3, 3]] * 4,
                    "strides": [[1, 1], [2, 2], [2, 2], [2, 2]],
                    "n_conv_per_stage": [2, 2, 2, 2],
                    "n_conv_per_stage_decoder": [2, 2, 2],
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                },
            },
        }
    },
}


def options(*words: str):
    return comparison_options.read_options(["--dataset", "d", "--workdir", "w", *words])


def row(model: str, case: str, label: str = "front", dice: float = 0.5, **changes) -> Row:
    values = {
        "setting": "" if model == NNUNET else "T'=300",
        "start": NNUNET,
        "hd95": 2.0,
        "start_dice": 0.5,
        "start_hd95": 2.0,
        "reference_voxels": 10,
        "predicted_voxels": 12,
        "corrected": 3,
        "broken": 1,
        "seconds": 0.25,
        "presegmentor_evaluations": 4,
        "denoiser_evaluations": 0 if model == NNUNET else 8,
    }
    return Row(model=model, case=case, label=label, dice=dice, **(values | changes))


def test_smaller_plans_follow_nnunets_topology() -> None:
    before = copy.deepcopy(STOCK)
    plans = comparison_plans.smaller_plans(STOCK, "small", "2d", [40, 32], 8, [8, 16, 32])
    section = plans["configurations"]["2d"]
    arguments = section["architecture"]["arch_kwargs"]
    assert before == STOCK
    assert (plans["plans_name"], section["patch_size"], section["batch_size"]) == ("small", [40, 32], 8)
    assert section["data_identifier"] == "nnUNetPlans_2d"
    assert arguments["strides"] == [[1, 1], [2, 2], [2, 2]]
    lengths = [
        arguments[key] for key in ("n_stages", "features_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder")
    ]
    assert lengths == [3, [8, 16, 32], [2, 2, 2], [2, 2]]


def test_smaller_plans_can_have_more_stages_than_stock() -> None:
    plans = comparison_plans.smaller_plans(STOCK, "small", "2d", [128, 128], None, [8, 16, 32, 64, 64, 64])
    arguments = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert arguments["n_conv_per_stage"] == [2] * 6 and arguments["n_conv_per_stage_decoder"] == [2] * 5
    assert len(arguments["kernel_sizes"]) == 6
    assert plans["configurations"]["2d"]["batch_size"] == 366


@pytest.mark.parametrize(
    ("patch", "features", "message"),
    [
        ([40, 32, 8], [8, 16], "must have 2 axes"),
        ([41, 32], [8, 16], "divisible by the product of the strides"),
        ([16, 16], [8] * 9, "give fewer"),
    ],
)
def test_smaller_plans_name_what_is_wrong(patch: list[int], features: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison_plans.smaller_plans(STOCK, "small", "2d", patch, 8, features)


def test_plans_of_one_name_are_not_replaced(tmp_path: Path) -> None:
    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    folders.preprocessed.mkdir(parents=True)
    plans = comparison_plans.diffusion_plans(STOCK, "2d", "x0", {"prediction_type": "x0"})
    comparison_plans.write_plans(folders, plans)
    comparison_plans.write_plans(folders, plans)
    assert comparison_plans.read_plans(folders, "nnUNetPlans_x0")["configurations"]["2d"]["diffusion"] == {
        "prediction_type": "x0"
    }
    with pytest.raises(ValueError, match="holds other plans"):
        comparison_plans.write_plans(folders, plans | {"extra": 1})


def test_control_trains_for_both_networks_time() -> None:
    # 10 epochs of 2 s, and a denoiser of 10 epochs of 3 s (the first compiles): 15 more, rounded up
    assert comparison_training.control_epochs([2.0] * 10, [60.0] + [3.0] * 9) == 25
    assert comparison_training.control_epochs([2.0] * 10, [3.1] * 10) == 26


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("nnUNetTrainer_37epochs", "nnUNetTrainer"),
        ("nnUNetTrainerNoMirroring_2epochs", "nnUNetTrainerNoMirroring"),
        ("DiffusionTrainerNoMirroring_2epochs", "DiffusionTrainerNoMirroring"),
        ("nnUNetTrainerUprightBfloat16_2epochs", "nnUNetTrainerUprightBfloat16"),
    ],
)
def test_missing_length_is_written_and_found_by_nnunet(
    name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    folders.control_trainers.mkdir()
    places = (comparison_plans.REPOSITORY / "trainers", comparison_plans.BENCHMARK_TRAINERS, folders.control_trainers)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(map(str, places)))
    assert comparison_training.write_missing_trainer(folders, name) == name
    found = recursive_find_trainer_class_by_name(name)
    assert found.__name__ == name
    assert [parent.__name__ for parent in found.__mro__][1] == base


def test_trainers_that_exist_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(comparison_plans.REPOSITORY / "trainers"))
    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    folders.control_trainers.mkdir()
    for name in ("nnUNetTrainer_20epochs", "DiffusionTrainer_10epochs", "nnUNetTrainerNoMirroring"):
        assert comparison_training.write_missing_trainer(folders, name) == name
    for name in ("nnUNetTrainerNoMiroring_5epochs", "nnUNetTrainerNoMiroring"):
        with pytest.raises(ValueError, match=f"no trainer {name}"):
            comparison_training.write_missing_trainer(folders, name)
    assert not list(folders.control_trainers.iterdir())


@pytest.mark.nnunet
def test_mixed_precision_on_a_cpu_trains_as_single_precision_does(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.setenv("nnUNet_extTrainer", str(comparison_plans.BENCHMARK_TRAINERS))
    single, mixed = (
        workplace.trainer(recursive_find_trainer_class_by_name(name))
        for name in ("nnUNetTrainerDA5", "nnUNetTrainerDA5Bfloat16")
    )
    for trainer in (single, mixed):
        trainer.initialize()
    mixed.network.load_state_dict(single.network.state_dict())
    seen = []
    mixed.network.decoder.seg_layers[-1].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 1, 32, 32, generator=generator)
    target = (torch.nn.functional.avg_pool2d(data, 5, 1, 2) > 0).float()
    batch = {"data": data, "target": [target, target[:, :, ::2, ::2]]}
    one, other = (trainer.train_step(batch)["loss"] for trainer in (single, mixed))
    assert seen == [torch.bfloat16]
    assert one != other == pytest.approx(one, rel=0.02)
    one, other = (
        torch.cat([weight.grad.flatten() for weight in trainer.network.parameters() if weight.grad is not None])
        for trainer in (single, mixed)
    )
    assert other.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98
    one, other = (float(trainer.validation_step(batch)["loss"]) for trainer in (single, mixed))
    assert one != other == pytest.approx(one, rel=0.02)


@pytest.mark.nnunet
def test_denoiser_in_mixed_precision_on_a_cpu(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.setenv("nnUNet_extTrainer", str(comparison_plans.BENCHMARK_TRAINERS))
    trainer = workplace.trainer(recursive_find_trainer_class_by_name("DiffusionTrainerBfloat16"))
    trainer.initialize()
    trainer.on_train_epoch_start()
    seen = []
    trainer.segmenter.denoiser.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    step = trainer.train_step({"data": torch.randn(2, 1, 32, 32), "target": torch.ones(2, 1, 32, 32)})
    assert math.isfinite(step["loss"])
    assert seen == [torch.bfloat16]


@pytest.mark.nnunet
def test_upright_training_keeps_up_and_down(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.setenv("nnUNet_extTrainer", str(comparison_plans.BENCHMARK_TRAINERS))
    for name in ("nnUNetTrainerUprightBfloat16", "nnUNetTrainerUprightDA5Bfloat16"):
        trainer = workplace.trainer(recursive_find_trainer_class_by_name(name))
        rotation, dummy_2d, patch, mirrored = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert rotation == pytest.approx((-0.2618, 0.2618), abs=1e-4)
        assert not dummy_2d
        assert all(patch > trainer.configuration_manager.patch_size)
        assert mirrored == trainer.inference_allowed_mirroring_axes == (1,)


def test_deadline_stops() -> None:
    comparison_training.Deadline().check()
    with pytest.raises(comparison_training.TimeIsUp):
        comparison_training.Deadline(0.0).check()


def test_variants_become_plans_sections() -> None:
    chosen = options("--prediction-types", "x0", "--variant", 'wide:{"samples": 5}')
    assert comparison_options.diffusion_sections(chosen, {}) == {
        "x0": {"prediction_type": "x0"},
        "wide": {"samples": 5},
    }
    planned = {"prediction_type": "logits", "samples": 2, "sdb_depth": 3}
    assert comparison_options.diffusion_sections(chosen, planned) == {
        "x0": {"prediction_type": "x0", "samples": 2, "sdb_depth": 3},
        "wide": {"prediction_type": "logits", "samples": 5, "sdb_depth": 3},
    }
    for wrong in ("wide", "x0:{}", "a b:{}"):
        with pytest.raises(ValueError, match="must be NAME:JSON"):
            comparison_options.diffusion_sections(options("--prediction-types", "x0", "--variant", wrong), {})


def test_settings_are_legal_distinct_and_repaired_at_each_start_step() -> None:
    defaults = DiffusionSettings(features_per_stage=(8, 16))
    settings = comparison_options.sampling_settings(options("--presegmentation-weights", "0.5"), defaults)
    for setting in settings:
        DiffusionSettings(**{"features_per_stage": (8, 16)} | setting.changes)
    keys = [(setting.name, setting.start) for setting in settings]
    assert len(set(keys)) == len(keys)

    def weight(setting: Setting) -> float:
        return setting.changes.get("presegmentation_weight", defaults.presegmentation_weight)

    # 3 T' x 4 steps x 2 ensembles of the denoiser alone; with nnU-Net the fewest steps, of which one is the default
    plain = [s for s in settings if s.start == NNUNET and not weight(s)]
    assert len(plain) == 3 * 4 * 2
    assert len([s for s in settings if s.start == NNUNET and weight(s)]) == 3 * 2
    assert settings[0].name.startswith("default") and weight(settings[0]) == defaults.presegmentation_weight
    assert len([s for s in settings if s.start == "noise"]) == 2
    assert len([s for s in settings if s.start in CORRUPTIONS]) == 3 * len(CORRUPTIONS)
    assert not [
        s for s in comparison_options.sampling_settings(options("--no-repair"), defaults) if s.start in CORRUPTIONS
    ]
    low = DiffusionSettings(features_per_stage=(8, 16), max_train_step=400)
    assert not [s for s in comparison_options.sampling_settings(options(), low) if s.start == "noise"]


def test_options_say_which_plans() -> None:
    def kind(*words: str) -> tuple[str, bool, bool]:
        chosen = options(*words)
        return chosen.plans_name, chosen.stock, chosen.planned

    assert kind() == ("nnUNetPlans", True, False)
    assert kind("--batch", "4") == ("small", False, False)
    assert kind("--batch", "4", "--plans-name", "tiny") == ("tiny", False, False)
    assert kind("--plans-name", "nnUNetDiffusionPlans") == ("nnUNetDiffusionPlans", False, True)
    with pytest.raises(SystemExit):
        options("--batch", "4", "--plans-name", "nnUNetPlans")


def test_planned_plans_are_taken_as_they_are(tmp_path: Path) -> None:
    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    chosen = options("--plans-name", "P")
    for folder in (folders.preprocessed, folders.raw):
        folder.mkdir(parents=True)
    (folders.raw / "splits_final.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"P\.json is missing: plan first"):
        compare.make_plans(folders, chosen)
    plans = {**copy.deepcopy(STOCK), "plans_name": "P"}
    comparison_plans.write_plans(folders, plans)
    with pytest.raises(FileNotFoundError, match="nnUNetv2_preprocess -d 4 -plans_name P -c 2d"):
        compare.make_plans(folders, chosen)
    (folders.preprocessed / "nnUNetPlans_2d").mkdir()
    assert compare.make_plans(folders, chosen) == plans
    assert (folders.preprocessed / "splits_final.json").read_text() == "[]"


def test_another_nnunet_takes_the_presegmentors_place_unless_the_denoiser_met_its_own(tmp_path: Path) -> None:
    import torch
    from comparison_evaluation import start_from

    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    training = comparison_training.Training("nnUNetTrainer_20epochs", "small", "2d", 0, "cpu")
    training.folder(folders).mkdir(parents=True)
    longer, shorter = torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(1, 2, 1)
    checkpoint = {"network_weights": longer.state_dict(), "inference_allowed_mirroring_axes": (1,)}
    torch.save(checkpoint, training.folder(folders) / "checkpoint_final.pth")

    def start(mirrored: tuple[int, ...] | None, **changes) -> tuple[int, ...] | None:
        settings = DiffusionSettings(features_per_stage=(8, 16), **changes)
        manager = SimpleNamespace(has_ignore_label=False)
        model = SimpleNamespace(
            name="logits",
            segmenter=SimpleNamespace(settings=settings, presegmentor=shorter),
            predictor=SimpleNamespace(label_manager=manager, allowed_mirroring_axes=mirrored),
        )
        start_from(model, training.folder(folders))
        return model.predictor.allowed_mirroring_axes

    given = {"presegmentor_trainer": "nnUNetTrainer_10epochs"}
    with pytest.raises(ValueError, match="was trained on the segmentations of another nnUNetTrainer_10epochs"):
        start((0, 1), **given, starts={"truth": 0.5, "presegmentation": 0.5})
    weights = copy.deepcopy(shorter.state_dict())
    # mirrored only as both were trained
    for mirrored, left in (((0, 1), (1,)), ((0,), None), (None, None)):
        shorter.load_state_dict(weights)
        assert start(mirrored, **given) == left
        assert torch.equal(shorter.weight, longer.weight)
    # the same network, whatever its trainer is called
    start((0, 1), **given, starts={"truth": 0.5, "presegmentation": 0.5})


def test_one_training_gives_the_control_with_and_without_averaged_weights(tmp_path: Path) -> None:
    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    averaged, plain = (
        comparison_training.Training(f"{base}_7epochs", "small", "2d", 0, "cpu")
        for base in ("nnUNetTrainerEMA", "nnUNetTrainer")
    )
    source, target = averaged.folder(folders), plain.folder(folders)
    source.mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (source.parent / name).write_text("{}")
    checkpoint = {"network_weights": {"w": torch.ones(2)}, "raw_weights": {"w": torch.zeros(2)}, "current_epoch": 7}
    torch.save(checkpoint | {"trainer_name": averaged.trainer}, source / "checkpoint_final.pth")
    comparison_training.without_averaging(folders, averaged, plain)
    written = torch.load(target / "checkpoint_final.pth")
    assert torch.equal(written["network_weights"]["w"], torch.zeros(2))
    assert written["trainer_name"] == "nnUNetTrainer_7epochs" and written["current_epoch"] == 7
    assert (target.parent / "plans.json").read_text() == "{}"
    # one that was trained by itself stays
    torch.save({"network_weights": {}}, target / "checkpoint_final.pth")
    comparison_training.without_averaging(folders, averaged, plain)
    assert torch.load(target / "checkpoint_final.pth") == {"network_weights": {}}


def test_a_presegmentor_of_its_own_is_not_taken_for_the_shared_one(tmp_path: Path) -> None:
    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    training = comparison_training.Training("nnUNetTrainer_10epochs", "small", "2d", 0, "cpu")
    folders.model(training.trainer, "small", "2d").mkdir(parents=True)
    for _ in range(2):
        comparison_training.share_presegmentor(folders, training, "small_x0")
    assert folders.model(training.trainer, "small_x0", "2d").is_symlink()
    folders.model(training.trainer, "small_logits", "2d").mkdir()
    with pytest.raises(ValueError, match="is a training of its own"):
        comparison_training.share_presegmentor(folders, training, "small_logits")


def test_another_seed_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = comparison_plans.Folders(tmp_path, "Dataset004_X")
    names = {compare.output_folder(folders, options(*words)).name for words in ([], ["--seed", "1"])}
    assert names == {"nnUNetPlans_2d_10epochs_fold0", "nnUNetPlans_2d_10epochs_fold0_seed1"}


def test_cases_are_evenly_spaced(tmp_path: Path) -> None:
    measured = [{"reference_file": f"/gt_segmentations/c{number:02d}.nii.gz"} for number in reversed(range(21))]
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": measured}))
    assert compare.validation_cases(tmp_path, ".nii.gz", 3) == ["c00", "c10", "c20"]
    assert len(compare.validation_cases(tmp_path, ".nii.gz", None)) == 21


def test_rows_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = RowFile(path, classes=2)
    rows.append([row("logits", "a"), row("logits", "a", "back", math.nan, hd95=math.inf)])
    rows.append([row("logits", "b"), row("logits", "b", "back")])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:9])
    again = RowFile(path, classes=2)
    assert again.done == {("logits", "T'=300", NNUNET, "a")}
    assert math.isnan(again.rows[1].dice) and again.rows[1].hd95 == math.inf
    with path.open() as file:
        assert len(list(csv.reader(file))) == 3


def test_rows_without_the_vessels_metrics_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    RowFile(path, classes=1).append([row("logits", "a")])
    path.write_text("\n".join(line.rsplit(",", 2)[0] for line in path.read_text().splitlines()) + "\n")
    assert "cldice" not in path.read_text()
    (read,) = RowFile(path, classes=1).rows
    assert read.case == "a" and read.denoiser_evaluations == 8 and math.isnan(read.cldice)


def test_centrelines_are_measured_on_demand() -> None:
    import torch

    truth = np.zeros((1, 20, 30), np.int16)
    truth[0, 5, 2:28] = 1
    found = truth.copy()
    found[0, :, 15:] = 0
    case = Case("a", truth, truth, (999.0, 1.0, 1.0), torch.zeros(1), {})
    (plain,), (vessels,) = (
        measured_rows(("m", "", NNUNET), case, {1: "vessel"}, truth, found, 0.1, (1, 0), each) for each in (False, True)
    )
    assert math.isnan(plain.cldice) and math.isnan(plain.thin_recall) and plain.dice == vessels.dice
    # half of the vessel is found, and nothing beside it
    assert vessels.thin_recall == pytest.approx(0.5, abs=0.02) and vessels.cldice == pytest.approx(2 / 3, abs=0.02)


def test_report_pairs_lesions_and_sets_normal_cases_apart() -> None:
    cases = {"ill1": 0.5, "ill2": 0.7}
    rows = [row(NNUNET, case, dice=dice) for case, dice in cases.items()]
    rows += [row("logits", case, dice=dice + 0.1) for case, dice in cases.items()]
    normal = {"reference_voxels": 0, "start_dice": math.nan, "hd95": math.nan}
    rows += [row(NNUNET, "well", dice=0.0, predicted_voxels=40, **normal)]
    rows += [row("logits", "well", dice=math.nan, **(normal | {"predicted_voxels": 0}))]
    rows += [row("logits", case, start="eroded 2", start_dice=0.6, dice=0.8) for case in cases]
    report = write_report(rows, "# heading", seed=0)
    assert "| nnU-Net | 2 | 0 | 0.6000 | 0.6000 | - | - | - | - | - |" in report
    assert "| logits, T'=300 | 2 | 0 | 0.7000 | 0.7000 | +0.1000 | +0.1000 to +0.1000 | 0.5 | 3.0 | 1.0 |" in report
    assert "| nnU-Net | 1 | 100.0 % | 40.0 |" in report and "| logits, T'=300 | 1 | 0.0 % | - |" in report
    assert "| logits, T'=300, eroded 2 | front | 2 | 0.6000 | 0.8000 | +0.2000 |" in report
    assert "mean of the classes" not in report and "clDice" not in report
    rows = [dataclasses.replace(each, cldice=each.dice / 2, thin_recall=each.dice / 4) for each in rows]
    report = write_report(rows, "# heading", seed=0)
    assert "## clDice, front" in report and "| logits, T'=300 | 2 | 0 | 0.3500 | 0.3500 | +0.0500 |" in report
    assert (
        "at most two voxels wide, front" in report
        and "| logits, T'=300 | 2 | 0 | 0.1750 | 0.1750 | +0.0250 |" in report
    )


def test_mean_rows_average_the_classes_that_have_a_dice() -> None:
    rows = [row("logits", "a", "front", 0.4), row("logits", "a", "back", 0.8), row("logits", "b", "front", 0.2)]
    rows += [row("logits", "b", "back", math.nan, reference_voxels=0), row("logits", "c", "front", 0.5)]
    rows += [row("logits", "c", "back", 0.0, reference_voxels=0)]  # found where there is none
    means = {each.case: each for each in mean_rows(rows)}
    assert [means[case].dice for case in "abc"] == pytest.approx([0.6, 0.2, 0.5])
    assert means["a"].corrected == 6
    assert "## Dice, mean of the classes" in write_report(
        [*rows, *(row(NNUNET, "a", c) for c in ("front", "back"))], "", 0
    )


def test_given_starts_reach_the_segmenter_with_background_in_the_padding() -> None:
    import torch

    seen = {}

    class Segmenter(torch.nn.Module):
        def sample(self, image, presegmentation):
            seen.update(image=image, presegmentation=presegmentation)
            return presegmentation

        def forward(self, image):
            return image

    network = CountedNetwork(Segmenter(), image_channels=2)
    tile = torch.zeros(1, 2 + 3, 4)
    tile[0, 3, 0] = 1
    logits = network(tile)
    np.testing.assert_array_equal(logits.argmax(1), [[1, 0, 0, 0]])
    np.testing.assert_array_equal(seen["presegmentation"].sum(1), np.ones((1, 4)))
    assert seen["image"].shape == (1, 2, 4)
    network(tile[:, :2])
    assert network.presegmentor_evaluations == 1
