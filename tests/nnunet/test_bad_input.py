"""Bad input through nnU-Net's own preprocessing, training and prediction: refused with name and cure, or it works."""

import functools
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.training import DiffusionTrainer

pytestmark = [
    pytest.mark.nnunet,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's own about NaN
    pytest.mark.filterwarnings("ignore:Warning. Received empty chunks"),  # a real dataset tells nnU-Net its patch size
]
DATASET = "Dataset004_Hippocampus"


@pytest.fixture
def altered(hippocampus, tmp_path):
    """Builds a workplace whose only training and validation case is a real one that was altered before preprocessing."""
    place = type(hippocampus)(tmp_path, hippocampus.dataset)
    shutil.copytree(hippocampus.preprocessed, place.preprocessed)

    def build(alter):
        plans = PlansManager(str(place.preprocessed / "Tiny.json"))
        configuration = plans.get_configuration("2d")
        description = json.loads((place.preprocessed / "dataset.json").read_text())
        io = plans.image_reader_writer_class()
        path = sorted((hippocampus.raw / "imagesTr").iterdir())[0]
        case = path.name.removesuffix("_0000.nii.gz")
        image, properties = io.read_images([str(path)])
        labels, _ = io.read_seg(str(hippocampus.raw / "labelsTr" / f"{case}.nii.gz"))
        image, labels = alter(image.copy(), labels.copy())
        preprocessed = configuration.preprocessor_class(verbose=False).run_case_npy(
            image, labels, dict(properties), plans, configuration, description
        )
        for old in (place.preprocessed / "nnUNetPlans_2d").glob(f"{case}*"):
            old.unlink()
        nnUNetDatasetBlosc2.save_case(*preprocessed, str(place.preprocessed / "nnUNetPlans_2d" / case))
        (place.preprocessed / "splits_final.json").write_text(json.dumps([{"train": [case], "val": [case]}]))
        return case, image, properties

    with place.in_process(tmp_path / "results"):
        yield place, build


def command(plans="Tiny"):
    """What nnUNetv2_train does once it has read its arguments."""
    run_training(DATASET, "2d", 0, "TinyDiffusionTrainer", plans, device=torch.device("cpu"))


def untrained(place):
    torch.manual_seed(0)
    trainer = place.trainer(DiffusionTrainer)
    trainer.initialize()
    trainer.on_train_epoch_start()
    return trainer


def predict(trainer, image, properties):
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        "DiffusionTrainer",
        (0, 1),
    )
    return predictor.predict_single_npy_array(image, dict(properties))


def with_voxel(value):
    def alter(image, labels):
        image[0, 10, 20, 20] = value
        return image, labels

    return alter


def with_unknown_label(image, labels):
    return image, np.full_like(labels, 7)


BAD_CASES = {
    "NaN": (with_voxel(np.nan), "has NaN or infinite voxels.*Replace such voxels"),
    "infinite": (with_voxel(np.inf), "has NaN or infinite voxels.*Replace such voxels"),
    "unknown label": (with_unknown_label, "is not in dataset.json.*Correct the label map"),
}


@pytest.mark.parametrize("kind", BAD_CASES)
def test_bad_case_stops_the_command_before_the_presegmentor_learns_from_it(altered, monkeypatch, kind):
    # nnU-Net 2.8.0 forgets its waiting producer thread when a network raises, and the process would never end
    monkeypatch.setattr(predict_from_raw_data, "Thread", functools.partial(threading.Thread, daemon=True))
    place, build = altered
    alter, message = BAD_CASES[kind]
    case, image, properties = build(alter)
    monkeypatch.setattr(nnUNetTrainer, "train_step", lambda *_: pytest.fail("nnU-Net trained on it"))
    with pytest.raises(ValueError, match=message) as error:
        command()
    assert case in str(error.value)
    if kind == "unknown label":
        assert "Label 7" in str(error.value)

    # with a pre-segmentor trained elsewhere, the diffusion trainer sees such a case first, here or in validation
    trainer = untrained(place)
    train, validation = trainer.get_dataloaders()
    for step, loader in ((trainer.train_step, train), (trainer.validation_step, validation)):
        with pytest.raises(ValueError, match=message) as error:
            step(next(loader))
        assert case in str(error.value)

    if kind != "unknown label":
        with pytest.raises(ValueError, match="The image has NaN or infinite voxels.*Replace them in the case"):
            predict(trainer, image, properties)


def small(image, labels):
    where = (slice(None), slice(10, 22), slice(10, 30), slice(10, 28))
    return image[where], labels[where]


def without_foreground(image, labels):
    return image, np.zeros_like(labels)


@pytest.mark.parametrize("alter", [small, without_foreground])
def test_image_smaller_than_the_patch_and_case_without_foreground_work(altered, alter):
    place, build = altered
    _, image, properties = build(alter)
    trainer = untrained(place)
    assert min(image.shape[2:]) < min(trainer.configuration_manager.patch_size) or alter is without_foreground
    train, validation = trainer.get_dataloaders()
    losses = [trainer.train_step(next(train)) for _ in range(2)]
    assert all(np.isfinite(value) for each in losses for value in each.values())
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(validation))["loss"])
    image = image[:, :12]
    found = predict(trainer, image, properties)
    assert found.shape == image.shape[1:]
    assert set(np.unique(found)) <= {0, 1, 2}


BAD_SETTINGS = [
    ({"start_stepp": 300}, r"Unknown key diffusion\.start_stepp \(value 300\).*start_step"),
    ({"start_step": "300"}, r"diffusion\.inference\.start_step must be of type int, got '300'"),
    (
        {"start_step": 1001},
        r"diffusion\.inference\.start_step is 1001, more than diffusion\.process\.timesteps \(1000\)",
    ),
    (
        {"start_step": 5, "steps": 6},
        r"diffusion\.inference\.steps is 6, more than diffusion\.inference\.start_step \(5\)",
    ),
    ({"sampler": "magic"}, r"diffusion\.inference\.sampler is 'magic'; legal: .*`ddim`"),
    ({"features_per_stage": [8, 8]}, r"features_per_stage has 2 entries, the plans' network has 3 stages"),
]


@pytest.mark.parametrize("section, message", BAD_SETTINGS)
def test_bad_settings_stop_the_command_before_the_presegmentor_is_trained(altered, section, message):
    place, _ = altered
    place.write_plans("Bad", "2d", patch=[32, 32], **section)
    with pytest.raises(ValueError, match=message):
        command("Bad")
    assert not list((place.root / "results").rglob("checkpoint_*"))


@pytest.mark.slow
def test_bad_settings_end_the_console_command_with_the_reason_last(altered):
    place, _ = altered
    place.write_plans("Bad", "2d", patch=[32, 32], sampler="magic")
    done = place.run(
        "nnUNetv2_train", 4, "2d", 0, "-tr", "TinyDiffusionTrainer", "-p", "Bad", "-device", "cpu", check=False
    )
    assert done.returncode != 0
    assert "diffusion.inference.sampler is 'magic'; legal: " in done.stderr.splitlines()[-1]


def foreign(name):
    def change(plans):
        plans["dataset_name"] = name

    return change


def test_plans_of_another_dataset_are_refused_naming_both(altered):
    place, _ = altered
    with pytest.raises(ValueError, match="made for Dataset009_Absent, which has no .*nnunet_diffusion plan -d ID"):
        place.trainer(DiffusionTrainer, change=foreign("Dataset009_Absent"))
    other = place.preprocessed.parent / "Dataset009_Other"
    other.mkdir()
    described = json.loads((place.preprocessed / "dataset.json").read_text())
    for key, value in (("labels", {"background": 0, "tumour": 1}), ("channel_names", {"0": "CT"})):
        (other / "dataset.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(ValueError, match=f"made for Dataset009_Other, which has {key} .*move_plans") as error:
            place.trainer(DiffusionTrainer, change=foreign("Dataset009_Other"))
        assert str(value) in str(error.value) and str(described[key]) in str(error.value)


@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_unset_folders_are_named_with_the_cure(altered, monkeypatch, name):
    place, _ = altered
    monkeypatch.delenv(name)
    with pytest.raises(RuntimeError, match=f"{name} is not set: export {name}="):
        place.trainer(DiffusionTrainer)


def test_architecture_without_nnunets_topology_is_refused_by_name_before_a_folder_is_made(altered):
    place, _ = altered
    results = place.root / "results"

    def transformer(plans):
        plans["configurations"]["2d"]["architecture"] = {
            "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
            "arch_kwargs": {"embed_dim": 864},
            "_kw_requires_import": [],
        }

    with pytest.raises(NotImplementedError, match=r"primus\.Primus has no conv_op, strides"):
        place.trainer(DiffusionTrainer, change=transformer)
    assert not list(results.rglob("fold_0"))
    place.trainer(DiffusionTrainer)
    assert list(results.rglob("fold_0"))
