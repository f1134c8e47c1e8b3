"""Plans of `nnunet_diffusion plan` in nnU-Net's own commands, on real cases."""

import json

import numpy as np
import pytest

from nnunet_diffusion.training import DiffusionTrainer

pytestmark = [pytest.mark.slow, pytest.mark.nnunet]

CONFIGURATION = "2d"
NAME = "nnUNetDiffusionPlans"


@pytest.fixture(scope="module")
def planned(workplace_maker, hippocampus_data, tmp_path_factory):
    """A workplace with plans for a small memory target; its data are those of nnU-Net."""
    folder = tmp_path_factory.mktemp("planned")
    place = workplace_maker(hippocampus_data, folder, number=5, configurations=(CONFIGURATION,), slices=16)
    before = modified(place)
    done = place.run(
        "nnunet_diffusion",
        "plan",
        "-d",
        4,
        "-gpu_memory_target",
        0.02,
        "--preprocess",
        "-c",
        CONFIGURATION,
        "--explain",
    )
    assert modified(place) == before, "nnU-Net's data were written again"
    assert f"nnUNetPlans_{CONFIGURATION} is preprocessed already" in done.stdout
    assert f"\nNext:\n  nnunet_diffusion train 4 {CONFIGURATION} 0 -p {NAME}\n" in done.stdout, "after preprocessing"
    return place, done.stdout


def modified(place):
    return {path: path.stat().st_mtime_ns for path in (place.preprocessed / f"nnUNetPlans_{CONFIGURATION}").iterdir()}


def test_stock_preprocessing_training_and_prediction_take_the_plans(planned):
    place, text = planned
    assert "denoiser 4/32" in text and "patch_size" in text
    section = json.loads((place.preprocessed / f"{NAME}.json").read_text())["configurations"][CONFIGURATION]
    assert section["data_identifier"] == f"nnUNetPlans_{CONFIGURATION}"
    place.run("nnUNetv2_preprocess", "-d", 4, "-plans_name", NAME, "-c", CONFIGURATION, "-np", 1)
    for trainer in ("TinynnUNetTrainer", "TinyDiffusionTrainer"):
        words = (4, CONFIGURATION, 0, "-tr", trainer, "-p", NAME, "-device", "cpu")
        done = place.run("nnUNetv2_train", *words)
        assert "on a GPU this training needs" not in done.stdout
        model = place.results / f"{trainer}__{NAME}__{CONFIGURATION}"
        assert (model / "fold_0" / "checkpoint_final.pth").is_file()
    kept = json.loads((model / "plans.json").read_text())["configurations"][CONFIGURATION]
    assert kept["diffusion"]["network"] == section["diffusion"]["network"]
    out = place.root / "out"
    words = ("-i", place.raw / "imagesTs", "-o", out, "-d", 4, "-c", CONFIGURATION, "-f", 0, "-p", NAME)
    place.run("nnUNetv2_predict", *words, "-tr", "TinyDiffusionTrainer", "-device", "cpu", "-npp", 0, "-nps", 0)
    place.assert_geometry_and_labels({path.name: read(path) for path in out.glob("*.nii.gz")})


def read(path):
    import SimpleITK as sitk

    return sitk.ReadImage(str(path))


def test_another_spacing_gets_data_of_its_own_and_is_refused_over_them(planned):
    place, _ = planned
    words = ("-d", 4, "-gpu_memory_target", 0.02, "-overwrite_plans_name", "Coarse", "-overwrite_target_spacing", 2)
    place.run("nnunet_diffusion", "plan", *words, 2, 2, "--preprocess", "-c", CONFIGURATION, "-np", 1)
    section = json.loads((place.preprocessed / "Coarse.json").read_text())["configurations"][CONFIGURATION]
    assert section["data_identifier"] == "Coarse_2d" and section["spacing"] == [2, 2]
    assert (place.preprocessed / "Coarse_2d").is_dir()
    done = place.run("nnunet_diffusion", "plan", *words, 3, 3, check=False)
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("Coarse_2d holds data of another spacing", "-overwrite_plans_name")), (
        done.stderr
    )


def test_a_plan_for_this_cpu(planned):
    place, _ = planned
    words = ("-d", 4, "-device", "cpu", "-step_seconds", 0.1, "-overwrite_plans_name", "Laptop")
    done = place.run("nnunet_diffusion", "plan", *words)
    assert "nnUNetv2_preprocess -d 4 -plans_name Laptop -c 2d\n" in done.stdout
    assert "train 4 2d 0 -p Laptop -tr DiffusionTrainerUNet_5epochs -device cpu\n" in done.stdout
    section = json.loads((place.preprocessed / "Laptop.json").read_text())["configurations"][CONFIGURATION]
    assert section["diffusion_plan"]["step_seconds"] == 0.1 and section["diffusion_plan"]["machine"]
    assert np.prod(section["patch_size"]) <= np.prod(section["diffusion_plan"]["stock_patch_size"])


def test_a_plan_edited_by_hand_is_refused(planned):
    place, _ = planned
    path = place.preprocessed / f"{NAME}.json"
    plans = json.loads(path.read_text())
    for key, value, words in (
        ("diffusion_plan", {"version": 9}, ("diffusion_plan.version is 9", "newer one")),
        ("diffusion", {"version": 7}, ("diffusion.version is 7", "newer one")),
        ("diffusion", {"network": {"attention_stages": [9]}}, ("attention_stages", "[9]")),
    ):
        edited = json.loads(json.dumps(plans))
        edited["plans_name"] = "Edited"
        edited["configurations"][CONFIGURATION][key] |= value
        path.with_name("Edited.json").write_text(json.dumps(edited))
        with place.in_process(place.root / "results"), pytest.raises(ValueError) as error:
            place.trainer(DiffusionTrainer, "Edited", CONFIGURATION)
        assert all(word in str(error.value) for word in words)


def test_stock_plans_that_need_more_than_their_target_are_warned_about(planned):
    """With 8 GB the stock plans of small volumes never need it, so the batch is made larger."""
    from nnunet_diffusion.model.settings import default_settings
    from nnunet_diffusion.planning.memory_warning import memory_warning

    place, _ = planned
    plans = json.loads((place.preprocessed / "nnUNetPlans.json").read_text())
    configuration = plans["configurations"][CONFIGURATION]
    assert memory_warning(plans, configuration, default_settings(configuration), 1, 3) is None
    larger = {**configuration, "batch_size": 3000}
    warning = memory_warning(plans, larger, default_settings(larger), 1, 3)
    assert warning is not None and "more than the 8 GB" in warning and "nnunet_diffusion plan -d 4" in warning
    assert warning.endswith(f"--preprocess; then train with -p {NAME}")
    assert memory_warning({**plans, "experiment_planner_used": "Mine"}, larger, default_settings(larger), 1, 3) is None
