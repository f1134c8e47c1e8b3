"""The pre-segmentor: refused where it does not fit, resumed, validated, waited for."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER
from nnunet_diffusion.jobs.locks import HeldLock
from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training.presegmentor import (
    ensure_presegmentor,
    load_presegmentor_weights,
    lock,
    presegmentor_state,
    train,
)

pytestmark = pytest.mark.nnunet
CPU = torch.device("cpu")


@pytest.fixture
def stock(workplace, tmp_path):
    """An nnU-Net whose checkpoint lies in `fold_0` of a model folder."""
    torch.manual_seed(0)
    trainer = workplace.trainer(nnUNetTrainer)
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # as a training does, before it saves
    (tmp_path / "model" / "fold_0").mkdir(parents=True)
    trainer.save_checkpoint(str(tmp_path / "model" / "fold_0" / "checkpoint_final.pth"))
    return trainer, tmp_path / "model" / "fold_0" / "checkpoint_final.pth"


def load(stock, plans=None, configuration="2d", fold=0, description=None, **options):
    """Load the pre-segmentor into a training that differs in what is given."""
    trainer, path = stock
    plans, description = plans or trainer.plans_manager.plans, description or trainer.dataset_json
    return load_presegmentor_weights(path, plans, configuration, fold, description, trainer.do_split()[1], **options)


def test_fitting_weights_are_returned_and_load_into_the_segmenter(workplace, stock):
    weights = load(stock)
    ours = workplace.trainer(DiffusionTrainer)
    ours.initialize()
    ours.segmenter.presegmentor.load_state_dict(weights)
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        stock[0].network.eval()
        assert torch.equal(ours.segmenter.presegment(image).probabilities, stock[0].network(image)[0].softmax(1))


def test_state_is_what_is_left_to_do(stock):
    final = stock[1]
    folder, summary = final.parent, final.parent / "validation" / "summary.json"
    assert presegmentor_state(folder, given=True) == f"trained already, 1 epochs, named by {PRESEGMENTOR_FOLDER}"
    assert presegmentor_state(folder) == "trained already, to be validated first"
    summary.parent.mkdir()
    summary.write_text('{"metric_per_case": []}')
    assert presegmentor_state(folder) == "trained already, 1 epochs"
    final.rename(folder / "checkpoint_latest.pth")
    assert presegmentor_state(folder) == "half-trained, to be trained to the end first"
    (folder / "checkpoint_latest.pth").unlink()
    assert presegmentor_state(folder) == "to be trained and validated first"


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
    keys, value = OTHER_PLANS[key]
    with pytest.raises(
        ValueError, match=rf"checkpoint_final\.pth does not fit: its {key} is .*Move its folder"
    ) as error:
        load(stock, changed(stock[0].plans_manager.plans, *keys, value=value))
    assert str(value) in str(error.value)


@pytest.mark.parametrize("key", OTHER_PLANS)
def test_a_given_one_may_have_another_network_but_no_other_preprocessing(stock, key):
    keys, value = OTHER_PLANS[key]
    plans = changed(stock[0].plans_manager.plans, *keys, value=value)
    if key in ("patch_size", "architecture"):
        assert load(stock, plans, given=True)
    else:
        with pytest.raises(ValueError, match=f"its {key} is .*Unset nnUNet_diffusion_presegmentor"):
            load(stock, plans, given=True)


def test_other_fold_configuration_labels_and_channels_are_refused_naming_both_values(stock):
    description = stock[0].dataset_json
    with pytest.raises(ValueError, match="its fold is '0', this training has '3'"):
        load(stock, fold=3)
    with pytest.raises(ValueError, match="its fold is '0', this training has 'all'"):
        load(stock, fold="all")
    with pytest.raises(ValueError, match="its configuration is '2d', this training has '3d_fullres'"):
        load(stock, configuration="3d_fullres")
    with pytest.raises(ValueError, match="its labels is .*'tumour': 1"):
        load(stock, description=description | {"labels": {"background": 0, "tumour": 1}})
    with pytest.raises(ValueError, match="its channel_names is .*'T9'"):
        load(stock, description=description | {"channel_names": {"0": "T9"}})


def test_one_that_never_saw_mirrored_images_is_refused_where_they_are_mirrored(workplace, stock):
    assert load(stock, mirrored=(0, 1)) and load(stock, mirrored=None)
    trainer, path = stock
    trainer.inference_allowed_mirroring_axes = (1,)
    trainer.save_checkpoint(str(path))
    assert load(stock, mirrored=(1,))
    with pytest.raises(ValueError, match="never saw images mirrored along axis 0, .*DiffusionTrainerNoMirroring"):
        load(stock, mirrored=(0, 1))


def test_intensities_count_where_ct_is_normalised_by_them(stock):
    name = "foreground_intensity_properties_per_channel"
    plans = changed(stock[0].plans_manager.plans, name, "0", "mean", value=-777.0)
    assert load(stock, plans)  # MRI: each case by its own
    trainer, path = stock
    section = trainer.plans_manager.plans["configurations"]["2d"]
    section["normalization_schemes"] = ["CTNormalization"]
    trainer.save_checkpoint(str(path))
    assert load(stock)
    with pytest.raises(ValueError, match=f"its {name} is .*-777"):
        load(stock, changed(trainer.plans_manager.plans, name, "0", "mean", value=-777.0))


def test_a_summary_that_is_not_whole_counts_as_none(tmp_path):
    path = tmp_path / "summary.json"
    assert lock.measured_cases(path) is None
    path.write_bytes(b"\xff\x00")
    assert lock.measured_cases(path) is None
    for text in ("", '{"metric_per_case": 3}', '{"metric_per_case": [', "{}", "[]"):
        path.write_text(text)
        assert lock.measured_cases(path) is None
    path.write_text('{"metric_per_case": [1]}')
    assert lock.measured_cases(path) == [1]


@pytest.mark.parametrize("kind", ["latest", "final"])
def test_a_half_trained_one_of_other_plans_is_not_gone_on_with(workplace, stock, tmp_path, kind):
    folder = tmp_path / "results" / workplace.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    folder.mkdir(parents=True)
    shutil.copy(stock[1], folder / f"checkpoint_{kind}.pth")
    before = (workplace.preprocessed / "Tiny.json").read_text()
    try:
        workplace.write_plans("Tiny", "2d", patch=[64, 32])
        with pytest.raises(
            ValueError, match=r"its patch_size is \[32, 32\], this training has \[64, 32\]. Move its folder"
        ):
            ensure(workplace, [])
    finally:
        (workplace.preprocessed / "Tiny.json").write_text(before)


def test_another_split_is_refused_naming_the_cases(stock):
    trainer, path = stock
    training, validation = trainer.do_split()
    summary = path.parent / "validation" / "summary.json"
    summary.parent.mkdir()
    ending = trainer.dataset_json["file_ending"]
    measured = [{"prediction_file": f"/some/where/{case}{ending}"} for case in [training[0], *validation[1:]]]
    summary.write_text(json.dumps({"metric_per_case": measured}))
    named = ", ".join(sorted([training[0], validation[0]]))
    with pytest.raises(ValueError, match=f"was trained on another split: .* cases \\({named}\\)"):
        load(stock)


# a pre-segmentor that the user names


def test_given_one_of_another_architecture_is_built_into_the_checkpoint(workplace, stock, tmp_path, monkeypatch):
    stock[0].network.eval()
    monkeypatch.setenv(PRESEGMENTOR_FOLDER, str(tmp_path / "model"))

    def wider(plans):
        plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [12, 12, 24]

    trainer = workplace.trainer(DiffusionTrainer, change=wider)
    trainer.initialize()
    trainer._embed_presegmentor()
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        expected = stock[0].network(image)[0].softmax(1)
        assert torch.equal(trainer.segmenter.presegment(image).probabilities, expected)
        trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
        # a machine that has the checkpoint alone
        monkeypatch.delenv(PRESEGMENTOR_FOLDER)
        (tmp_path / "model").rename(tmp_path / "elsewhere")
        resumed = workplace.trainer(DiffusionTrainer, change=wider)
        resumed.load_checkpoint(str(tmp_path / "checkpoint_final.pth"))
        assert torch.equal(resumed.segmenter.presegment(image).probabilities, expected)


def test_given_folder_without_the_fold_is_refused(workplace, stock, tmp_path, monkeypatch):
    monkeypatch.setenv(PRESEGMENTOR_FOLDER, str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match=r"fold_1/checkpoint_final.pth does not exist"):
        workplace.trainer(DiffusionTrainer, fold=1)


def test_given_diffusion_model_and_network_of_other_axes_are_refused(workplace, stock, tmp_path, monkeypatch):
    monkeypatch.setenv(PRESEGMENTOR_FOLDER, str(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=rf"{PRESEGMENTOR_FOLDER} is .*configuration 2d in 2D, but this training is in 3D"
    ):
        workplace.trainer(DiffusionTrainer, plans="Tiny3d", configuration="3d_fullres")
    path = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "diffusion": {}}, path)
    with pytest.raises(ValueError, match=rf"{PRESEGMENTOR_FOLDER} is .*itself a diffusion trainer: name the folder"):
        workplace.trainer(DiffusionTrainer)


def test_code_in_the_plans_of_a_given_one_does_not_run(workplace, stock, tmp_path, monkeypatch):
    monkeypatch.setenv(PRESEGMENTOR_FOLDER, str(tmp_path / "model"))
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "hubconf.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    path = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    section = checkpoint["init_args"]["plans"]["configurations"]["2d"]
    keywords = {"repo_or_dir": str(tmp_path / "repository"), "model": "net", "source": "local"}
    section["architecture"] = {
        "network_class_name": "torch.hub.load",
        "arch_kwargs": keywords,
        "_kw_requires_import": [],
    }
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"{path} names 'torch.hub.load'"):
        workplace.trainer(DiffusionTrainer).initialize()
    assert not (tmp_path / "ran").exists()


def test_given_network_that_the_patch_does_not_fit_is_refused(workplace, stock, tmp_path, monkeypatch):
    monkeypatch.setenv(PRESEGMENTOR_FOLDER, str(tmp_path / "model"))

    def odd(plans):
        plans["configurations"]["2d"]["patch_size"] = [30, 32]

    with pytest.raises(
        ValueError, match=r"axis 0 by 4, but the patch size of these plans, \[30, 32\], is not divisible by 4"
    ):
        workplace.trainer(DiffusionTrainer, change=odd)


# the trainer that is resumed, and the validation that follows, without the latter's worker processes


@pytest.fixture
def validations(monkeypatch):
    """Replace nnU-Net's validation by one that writes the summary; returns who was validated how."""
    calls = []

    def validate(self, save_probabilities=False):
        calls.append((self.current_epoch, save_probabilities))
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text('{"metric_per_case": []}')

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
    return calls


def ensure(place, lines):
    return ensure_presegmentor("TinynnUNetTrainer", place.dataset, "2d", 0, "Tiny", CPU, lines.append)


@pytest.mark.slow
def test_half_trained_one_is_resumed_then_validated_then_left_alone(workplace, tmp_path, monkeypatch, validations):
    begun, trainers = [], []
    make = train._make_trainer

    def noted(*arguments):
        trainers.append(weakref.ref(trainer := make(*arguments)))
        return trainer

    monkeypatch.setattr(train, "_make_trainer", noted)
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
    assert trainers[1]() is None, "its memory is free for the denoiser's training"
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


def test_checkpoint_that_a_killed_job_left_in_pieces_is_named(workplace, tmp_path):
    folder = tmp_path / "results" / workplace.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").write_bytes(b"PK but no more")
    with pytest.raises(ValueError, match=r"checkpoint_latest.pth \(14 bytes\) is truncated or damaged.*Remove it"):
        ensure(workplace, [])


HOLD = """
import sys, time
from pathlib import Path
from nnunet_diffusion.jobs.locks import HeldLock
folder = Path(sys.argv[1])
with HeldLock(folder / sys.argv[2]) as lock:
    assert lock.acquire()
    print("locked", flush=True)
    time.sleep(2)
    (folder / "validation" / "summary.json").write_text('{"metric_per_case": []}')
"""


def test_another_job_that_trains_it_is_waited_for_and_its_result_taken(workplace, tmp_path, monkeypatch):
    folder = tmp_path / "results" / workplace.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    (folder / "validation").mkdir(parents=True)
    (folder / "checkpoint_final.pth").touch()
    monkeypatch.setattr(train, "_make_trainer", lambda *_: pytest.fail("it was trained a second time"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, lock.LOCK_NAME], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "locked\n"
        begin, lines = time.monotonic(), []
        assert ensure(workplace, lines) == folder / "checkpoint_final.pth"
        assert (folder / "validation" / "summary.json").is_file()
        assert 1 < time.monotonic() - begin < 30
    assert "another job trains it now" in lines[0]
    assert lock.LOCK_NAME in lines[0]


def stock_log(place, root, text, silent_for=0.0):
    """The log of an nnU-Net training that was started by itself."""
    folder = root / "results" / place.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "training_log_2026_1_1_00_00_00.txt"
    log.write_text(text)
    os.utime(log, (time.time() - silent_for,) * 2)
    return log


FINISH = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
end = time.monotonic() + 30
while not (folder / "waiting").exists():
    assert time.monotonic() < end
    time.sleep(0.1)
(folder / "validation").mkdir()
(folder / "checkpoint_final.pth").touch()
(folder / "validation" / "summary.json").write_text('{"metric_per_case": []}')
"""


def test_an_nnunet_trained_by_itself_meanwhile_is_waited_for(workplace, tmp_path, monkeypatch):
    folder = stock_log(workplace, tmp_path, "Epoch time: 30.0 s").parent
    monkeypatch.setattr(train, "_make_trainer", lambda *_: pytest.fail("it was trained a second time"))

    class Lines(list):
        def append(self, line):
            super().append(line)
            (folder / "waiting").touch()  # only then does the other job finish

    lines = Lines()
    with subprocess.Popen([sys.executable, "-c", FINISH, folder]) as job:
        begin = time.monotonic()
        # the other job's checkpoint is taken, though ours had found none
        assert ensure(workplace, lines) == folder / "checkpoint_final.pth"
        assert job.wait() == 0
    assert time.monotonic() - begin < 30
    assert "nnU-Net is being trained by itself" in lines[0]
    (seconds,) = re.findall(r"continues in (\d+) s", lines[0])
    assert 60 < int(seconds) <= 90


@pytest.mark.slow
def test_an_nnunet_that_begins_while_ours_trains_is_given_way_to(workplace, tmp_path, monkeypatch, validations):
    """nnU-Net's own job begins in our second epoch; what it makes is taken, and nothing of ours is written beside it."""
    folder = tmp_path / "results" / workplace.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    begun, own_files = [], {}
    start = nnUNetTrainer.on_train_epoch_start

    def with_another_job(self):
        start(self)
        begun.append(self.current_epoch)
        if begun == [0, 1]:
            stock_log(workplace, tmp_path, "Epoch time: 1.0 s")
            own_files.update({path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")})

    def finished(wanted, log):
        if any(path.name == "training_log_2026_1_1_00_00_00.txt" for path in folder.iterdir()):
            assert own_files == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
            (folder / "checkpoint_final.pth").write_text("of nnU-Net's own job")
            (folder / "validation").mkdir()
            (folder / "validation" / "summary.json").write_text('{"metric_per_case": []}')

    monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_start", with_another_job)
    monkeypatch.setattr(train, "wait_for_stock_training", finished)
    lines = []
    assert ensure(workplace, lines).read_text() == "of nnU-Net's own job"
    assert begun == [0, 1]
    assert "began in" in lines[-1]
    assert "gives way to it" in lines[-1]
    assert not validations


def test_a_dead_jobs_log_and_our_own_are_not_waited_for(workplace, tmp_path):
    log = stock_log(workplace, tmp_path, "Epoch time: 30.0 s\nEpoch time: 2.0 s", silent_for=91)
    lock.wait_for_stock_training(log.parent, pytest.fail)
    stock_log(workplace, tmp_path, "Epoch time: 30.0 s", silent_for=80)
    assert 5 < lock.seconds_until_silent(log.parent) < 11
    lock.claim_log(log)
    lock.wait_for_stock_training(log.parent, pytest.fail)


KILLED_WITH_A_WORKER_LEFT = """
import os, signal, sys, time
from pathlib import Path
from nnunet_diffusion.training.presegmentor.lock import locked
with locked(Path(sys.argv[1]), print):
    if os.fork() == 0:  # a worker, as nnU-Net's loaders are, which does not notice
        time.sleep(30)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_the_lock_ends_with_its_job_though_a_worker_lives_on(tmp_path):
    job = subprocess.run([sys.executable, "-c", KILLED_WITH_A_WORKER_LEFT, tmp_path], stdout=subprocess.DEVNULL)
    assert job.returncode == -signal.SIGKILL
    assert HeldLock(tmp_path / lock.LOCK_NAME).acquire()


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("NoSuchTrainer", RuntimeError, "NoSuchTrainer"),
        ("DiffusionTrainer", ValueError, "presegmentor.trainer is 'DiffusionTrainer', itself a diffusion trainer"),
    ],
)
def test_impossible_presegmentor_is_refused_by_name(workplace, name, kind, message):
    with pytest.raises(kind, match=message):
        workplace.trainer(DiffusionTrainer, presegmentor_trainer=name).initialize()


def test_settings_name_the_presegmentor_for_inference(workplace):
    trainer = workplace.trainer(DiffusionTrainer)
    section = trainer.plans_manager.plans["configurations"]["2d"]["diffusion"]
    assert section["presegmentor"]["trainer"] == "nnUNetTrainer"
    assert json.loads(json.dumps(section)) == section


def test_age_of_a_log_is_measured_by_the_clock_of_its_file_server(workplace, tmp_path, monkeypatch):
    folder = stock_log(workplace, tmp_path, "Epoch time: 30.0 s").parent
    left = lock.seconds_until_silent(folder)
    assert 80 < left <= 90
    # this machine's clock is an hour ahead of the file server's
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert left - 10 < lock.seconds_until_silent(folder) <= left
    assert [path.name for path in folder.iterdir()] == ["training_log_2026_1_1_00_00_00.txt"]
