"""The pre-segmentor: refused where it does not fit, resumed, validated, waited for."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.training import DiffusionTrainer, presegmentor
from nnunet_diffusion.training.presegmentor import ensure_presegmentor, load_presegmentor_weights

pytestmark = pytest.mark.nnunet
CPU = torch.device("cpu")


@pytest.fixture
def stock(workplace, tmp_path):
    """A pre-segmentor's checkpoint, with the plans and labels that fit it."""
    torch.manual_seed(0)
    trainer = workplace.trainer(nnUNetTrainer)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    return tmp_path / "checkpoint_final.pth", trainer.plans_manager.plans, trainer.dataset_json["labels"], trainer


def test_fitting_weights_are_returned_and_load_into_the_segmenter(workplace, stock):
    path, plans, labels, trainer = stock
    weights = load_presegmentor_weights(path, plans, "2d", 0, labels)
    ours = workplace.trainer(DiffusionTrainer)
    ours.initialize()
    ours.segmenter.presegmentor.load_state_dict(weights)
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        trainer.network.eval()
        assert torch.equal(ours.segmenter.presegment(image), trainer.network(image)[0].softmax(1))


def changed(plans, *keys, value):
    plans = copy.deepcopy(plans)
    inner = plans
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return plans


OTHER_PLANS = {
    "dataset_name": (("dataset_name",), "Dataset001_Other"),
    "transpose_forward": (("transpose_forward",), [2, 1, 0]),
    "image_reader_writer": (("image_reader_writer",), "NibabelIO"),
    "spacing": (("configurations", "2d", "spacing"), [0.5, 0.5]),
    "patch_size": (("configurations", "2d", "patch_size"), [16, 16]),
    "normalization_schemes": (("configurations", "2d", "normalization_schemes"), ["CTNormalization"]),
    "architecture": (("configurations", "2d", "architecture", "arch_kwargs", "features_per_stage"), [4, 4, 4]),
}


@pytest.mark.parametrize("key", OTHER_PLANS)
def test_other_plans_are_refused_naming_what_differs(stock, key):
    path, plans, labels, _ = stock
    keys, value = OTHER_PLANS[key]
    with pytest.raises(
        ValueError, match=rf"checkpoint_final\.pth does not fit: its {key} is .*Move its folder"
    ) as error:
        load_presegmentor_weights(path, changed(plans, *keys, value=value), "2d", 0, labels)
    assert str(value) in str(error.value)


def test_other_fold_configuration_and_labels_are_refused_naming_both_values(stock):
    path, plans, labels, _ = stock
    with pytest.raises(ValueError, match="its fold is '0', this training has '3'"):
        load_presegmentor_weights(path, plans, "2d", 3, labels)
    with pytest.raises(ValueError, match="its fold is '0', this training has 'all'"):
        load_presegmentor_weights(path, plans, "2d", "all", labels)
    with pytest.raises(ValueError, match="its configuration is '2d', this training has '3d_fullres'"):
        load_presegmentor_weights(path, plans, "3d_fullres", 0, labels)
    with pytest.raises(ValueError, match="its labels is .*'tumour': 1"):
        load_presegmentor_weights(path, plans, "2d", 0, {"background": 0, "tumour": 1})


# the trainer that is resumed, and the validation that follows, without the latter's worker processes


@pytest.fixture
def validations(monkeypatch):
    """Replace nnU-Net's validation by one that writes the summary; returns who was validated how."""
    calls = []

    def validate(self, save_probabilities=False):
        calls.append((self.current_epoch, save_probabilities))
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
    return calls


def ensure(place, lines):
    return ensure_presegmentor("TinynnUNetTrainer", place.dataset, "2d", 0, "Tiny", CPU, lines.append)


@pytest.mark.slow
def test_half_trained_one_is_resumed_then_validated_then_left_alone(workplace, tmp_path, monkeypatch, validations):
    begun = []
    start = nnUNetTrainer.on_train_epoch_start

    def interrupted(self):
        begun.append(self.current_epoch)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        start(self)

    monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_start", interrupted)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        ensure(workplace, lines)
    folder = tmp_path / "results" / workplace.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    assert (folder / "checkpoint_latest.pth").is_file()
    assert not (folder / "checkpoint_final.pth").exists()

    final = ensure(workplace, lines)
    assert begun == [0, 1, 1]
    assert final == folder / "checkpoint_final.pth"
    saved = torch.load(final, weights_only=False)
    assert saved["current_epoch"] == 2
    assert len(saved["logging"]["train_losses"]) == 2
    assert validations == [(2, True)]

    assert ensure(workplace, lines) == final
    assert begun == [0, 1, 1]
    assert len(validations) == 1
    assert lines[-1].endswith("is trained already.")

    # a job that ended between training and validation
    (folder / "validation" / "summary.json").unlink()
    ensure(workplace, lines)
    assert begun == [0, 1, 1]
    assert validations == [(2, True), (2, True)]


HOLD = """
import sys, time
from pathlib import Path
from filelock import FileLock
folder = Path(sys.argv[1])
with FileLock(folder / sys.argv[2]):
    print("locked", flush=True)
    time.sleep(2)
    (folder / "validation" / "summary.json").write_text("{}")
"""


def test_another_job_that_trains_it_is_waited_for_and_its_result_taken(workplace, tmp_path, monkeypatch):
    folder = tmp_path / "results" / workplace.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    (folder / "validation").mkdir(parents=True)
    (folder / "checkpoint_final.pth").touch()
    monkeypatch.setattr(presegmentor, "_make_trainer", lambda *_: pytest.fail("it was trained a second time"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, presegmentor.LOCK_NAME], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "locked\n"
        begin, lines = time.monotonic(), []
        assert ensure(workplace, lines) == folder / "checkpoint_final.pth"
        assert (folder / "validation" / "summary.json").is_file()
        assert 1 < time.monotonic() - begin < 30
    assert "another job trains it now" in lines[0]
    assert presegmentor.LOCK_NAME in lines[0]


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("NoSuchTrainer", RuntimeError, "NoSuchTrainer"),
        ("DiffusionTrainer", ValueError, "presegmentor_trainer is 'DiffusionTrainer', itself a diffusion trainer"),
    ],
)
def test_impossible_presegmentor_is_refused_by_name(workplace, name, kind, message):
    with pytest.raises(kind, match=message):
        workplace.trainer(DiffusionTrainer, presegmentor_trainer=name).initialize()


def test_settings_name_the_presegmentor_for_inference(workplace):
    trainer = workplace.trainer(DiffusionTrainer)
    section = trainer.plans_manager.plans["configurations"]["2d"]["diffusion"]
    assert section["presegmentor_trainer"] == "nnUNetTrainer"
    assert json.loads(json.dumps(section)) == section
