"""The trainer in this process: steps, moving average, resuming, and what it refuses by name."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from torch.nn.functional import interpolate

from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training.checkpoints import read_checkpoint
from nnunet_diffusion.training.presegmentor import embed
from nnunet_diffusion.training.presegmentor.lock import FOLD_LOCK_NAME
from nnunet_diffusion.training.replacing import what_happens_to_finished
from nnunet_diffusion.training.steps import SKIPPED_IN_A_ROW, take_step

pytestmark = pytest.mark.nnunet


def make_batch(size=(32, 32), number=2, seed=0):
    """A smooth random image whose two structures are its bright and its very bright parts."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 1, *[length // 8 for length in size], generator=generator)
    image = interpolate(coarse, size=size, mode="bilinear" if len(size) == 2 else "trilinear")
    return {
        "data": image + 0.1 * torch.randn(image.shape, generator=generator),
        "target": ((image > 0.3).short() + (image > 0.8).short()),
        "keys": np.array([f"case_{i}" for i in range(number)]),
    }


def started(place, epoch=0, **arguments):
    """A trainer at the beginning of an epoch; the same weights each time."""
    torch.manual_seed(0)
    trainer = place.trainer(DiffusionTrainer, **arguments)
    trainer.initialize()
    trainer.current_epoch = epoch
    trainer.on_train_epoch_start()
    return trainer


def average_of(trainer):
    return trainer.learners["denoiser"].average


def copy_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "configuration, plans, size", [("2d", "Tiny", (32, 32)), ("3d_fullres", "Tiny3d", (16, 24, 16))]
)
@pytest.mark.parametrize("prediction_type", ["x0", "logits", "epsilon"])
def test_two_steps_move_every_parameter_of_the_denoiser_and_none_of_the_presegmentor(
    workplace, configuration, plans, size, prediction_type
):
    # without weight decay, which moves a parameter that has no gradient too
    trainer = started(
        workplace, plans=plans, configuration=configuration, prediction_type=prediction_type, weight_decay=0.0
    )
    before = copy_of(trainer.network)
    for seed in range(2):
        trainer.train_step(make_batch(size, seed=seed))
    trained = {f"denoiser.{name}" for name, _ in trainer.segmenter.denoiser.named_parameters()}
    for key, value in trainer.network.state_dict().items():
        if key in trained:
            assert not torch.equal(value, before[key]), key
        elif key.startswith("presegmentor."):
            assert torch.equal(value, before[key]), key
    assert not trainer.segmenter.presegmentor.training
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.segmenter.denoiser.parameters()}


def test_step_returns_the_loss_and_its_terms(workplace):
    losses = started(workplace).train_step(make_batch())
    assert losses["loss"] == pytest.approx(
        sum(losses[term] for term in ("denoising", "presence", "location")), rel=1e-5
    )


class DiffusionTrainerDA5(DiffusionTrainer, nnUNetTrainerDA5):
    presegmentor_trainer = "nnUNetTrainerDA5"


def test_augmentation_of_another_trainer_is_taken_by_a_second_parent(workplace, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    drawn = []
    transforms = nnUNetTrainerDA5.get_training_transforms
    monkeypatch.setattr(
        nnUNetTrainerDA5,
        "get_training_transforms",
        staticmethod(lambda *arguments, **named: drawn.append(arguments) or transforms(*arguments, **named)),
    )
    trainer = workplace.trainer(DiffusionTrainerDA5)
    trainer.initialize()
    trainer.on_train_epoch_start()
    batches, _ = trainer.get_dataloaders()
    assert len(drawn) == 1
    assert trainer.settings.presegmentor_trainer == "nnUNetTrainerDA5"
    assert np.isfinite(trainer.train_step(next(batches))["loss"])


@pytest.mark.parametrize("ema_decay", [0.999, 0.2])  # 0.2 is below the warm-up's (1 + n) / (10 + n) from n = 2 on
def test_moving_average_equals_the_hand_computed_one(workplace, ema_decay):
    trainer = started(workplace, ema_decay=ema_decay, norm="batch")  # with running statistics
    expected = None
    for n in range(5):
        trainer.train_step(make_batch(seed=n))
        raw = copy_of(trainer.segmenter.denoiser)
        decay = min(ema_decay, (1 + n) / (10 + n))
        for key, value in raw.items():
            if expected is not None and value.is_floating_point():
                raw[key] = decay * expected[key].double() + (1 - decay) * value.double()
        expected = raw
    averaged = average_of(trainer).module.state_dict()
    assert any("running_var" in key for key in averaged)
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key].double(), value.double(), rtol=1e-5, atol=1e-7)


def test_validation_uses_the_average_in_one_step_and_leaves_the_weights_in_place(workplace):
    trainer = started(workplace, steps=3, samples=2, presegmentation_weight=0.5)
    for seed in range(4):
        trainer.train_step(make_batch(seed=seed))
    batch, denoiser = make_batch(seed=9), trainer.segmenter.denoiser
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        found = trainer.validation_step(batch)
    assert trainer.segmenter.denoiser is denoiser
    assert (trainer.settings.steps, trainer.segmenter.settings.steps) == (3, 3)

    losses = {}
    for name, weights in (("average", average_of(trainer).module), ("raw", denoiser)):
        segmenter = copy.deepcopy(trainer.segmenter)
        segmenter.denoiser.load_state_dict(weights.state_dict())
        with torch.no_grad(), segmenter.eval().overridden(steps=1, samples=1, presegmentation_weight=0.0):
            losses[name] = trainer.loss(segmenter(batch["data"]), batch["target"]).item()
    assert found["loss"].item() == pytest.approx(losses["average"], rel=1e-6)
    assert found["loss"].item() != pytest.approx(losses["raw"], rel=1e-4)


def test_checkpoint_holds_the_average_for_inference_and_the_weights_for_resuming(workplace, tmp_path):
    trainer = started(workplace)
    for seed in range(3):
        trainer.train_step(make_batch(seed=seed))
    trainer.save_checkpoint(str(tmp_path / "a.pth"))
    saved = torch.load(tmp_path / "a.pth", weights_only=False)
    for key, value in average_of(trainer).module.state_dict().items():
        assert torch.equal(saved["network_weights"][f"denoiser.{key}"], value)
    for key, value in trainer.segmenter.denoiser.state_dict().items():
        assert torch.equal(saved["diffusion"]["denoiser_weights"][key], value)
    # inference builds the network from the plans alone and loads strictly
    place = trainer.plans_manager, trainer.configuration_manager
    network = DiffusionTrainer.build_network_architecture(*place, 1, 3, enable_deep_supervision=False)
    network.load_state_dict(saved["network_weights"])


def test_resumed_training_takes_the_same_next_step(workplace, tmp_path):
    first = started(workplace, norm="batch")
    for seed in range(3):
        first.train_step(make_batch(seed=seed))
    first._best_ema = 0.5
    path = tmp_path / "latest.pth"
    first.save_checkpoint(str(path))

    second = workplace.trainer(DiffusionTrainer)  # other settings: the checkpoint's count
    torch.manual_seed(1)
    second.load_checkpoint(path)
    assert second.settings == first.settings
    assert (second.current_epoch, second._best_ema) == (1, 0.5)
    first.current_epoch = 1
    for trainer in (first, second):
        trainer.on_train_epoch_start()
    assert torch.equal(first._generator.get_state(), second._generator.get_state())
    for seed in (7, 8):
        torch.manual_seed(seed)  # of other uses, which must not matter
        one = first.train_step(make_batch(seed=seed))
        torch.manual_seed(seed + 100)
        assert one == second.train_step(make_batch(seed=seed))
    for mine, other in ((first.network, second.network), (average_of(first), average_of(second))):
        theirs = other.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.state_dict().items())
    ours, theirs = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())
    assert first.logger.get_checkpoint() == second.logger.get_checkpoint()


def test_pretrained_weights_reach_the_denoiser_and_its_average_but_not_the_presegmentor(
    workplace, tmp_path, monkeypatch
):
    pretrained = started(workplace)
    pretrained.train_step(make_batch())
    pretrained.save_checkpoint(str(tmp_path / "pretrained.pth"))
    torch.manual_seed(1)
    own = workplace.trainer(nnUNetTrainer)
    own.initialize()
    own.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # as a training does, before it saves
    own.save_checkpoint(str(tmp_path / "own.pth"))

    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    with pytest.raises(AssertionError, match="missing in the pretrained model"):
        load_pretrained_weights(trainer.network, str(tmp_path / "own.pth"))
    load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    monkeypatch.setattr(embed, "ensure_presegmentor", lambda *_: tmp_path / "own.pth")
    trainer._embed_presegmentor()
    for key, value in own.network.state_dict().items():
        assert torch.equal(trainer.segmenter.presegmentor.state_dict()[key], value), key
    for key, value in average_of(pretrained).module.state_dict().items():
        assert torch.equal(trainer.segmenter.denoiser.state_dict()[key], value), key
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch())
    for key, value in trainer.segmenter.denoiser.state_dict().items():
        assert torch.equal(average_of(trainer).module.state_dict()[key], value), key


def test_a_training_goes_on_from_a_checkpoint_of_the_layout_without_sections(workplace, tmp_path):
    first = started(workplace, start_step=70, presegmentor_trainer="nnUNetTrainer")
    first.train_step(make_batch())
    first.save_checkpoint(str(tmp_path / "a.pth"))
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    planned = checkpoint["init_args"]["plans"]["configurations"]["2d"]
    planned["diffusion"] = {**json.loads(json.dumps(dataclasses.asdict(first.settings))), "version": 2}
    torch.save(checkpoint, tmp_path / "a.pth")
    second = workplace.trainer(DiffusionTrainer)
    second.load_checkpoint(str(tmp_path / "a.pth"))
    assert second.settings == first.settings and second.settings.start_step == 70
    for key, value in average_of(first).module.state_dict().items():
        assert torch.equal(average_of(second).module.state_dict()[key], value), key


def test_each_epoch_has_noise_of_its_own_from_the_settings_seed(workplace):
    states = [
        started(workplace, epoch=epoch, seed=seed)._generator.initial_seed() for epoch, seed in ((0, 1), (1, 1), (0, 9))
    ]
    assert len(set(states)) == 3
    assert states[0] == started(workplace, seed=1)._generator.initial_seed()


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type, steps", [("logits", 100), ("x0", 300)])
def test_overfits_a_batch_of_real_patches(workplace, prediction_type, steps):
    np.random.seed(0)

    def larger_batch(plans):
        plans["configurations"]["2d"]["batch_size"] = 4

    options = {"prediction_type": prediction_type, "learning_rate": 5e-3, "ema_decay": 0.9}
    trainer = started(workplace, change=larger_batch, **options)
    loader = trainer.get_dataloaders()[0]
    batch = next(each for each in loader if min((each["target"] == label).sum() for label in (1, 2)) > 100)
    assert set(batch["target"].unique().tolist()) == {0, 1, 2}
    losses = [trainer.train_step(batch)["loss"] for _ in range(steps)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 1
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        found = trainer.validation_step(batch)
    overlap, wrong = found["tp_hard"], found["fp_hard"] + found["fn_hard"]
    assert (2 * overlap / (2 * overlap + wrong) > 0.9).all()


def test_a_fold_beyond_the_splits_has_the_presegmentors_random_split(workplace):
    ours, theirs = (workplace.trainer(kind, fold=7).do_split() for kind in (DiffusionTrainer, nnUNetTrainer))
    assert [list(part) for part in ours] == [list(part) for part in theirs]
    assert [len(part) for part in ours] == [8, 2]


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_training_at_last(workplace):
    trainer = started(workplace, prediction_type="logits")
    trainer.train_step(make_batch())
    good, lines = trainer.loss, []
    trainer.print_to_log_file = lambda *words, **_: lines.append(" ".join(map(str, words)))
    before = [
        {
            key: value.clone()
            for key, value in network.state_dict().items()
            if "running" not in key and "batches" not in key
        }
        for network in (trainer.segmenter.denoiser, average_of(trainer).module)
    ]
    steps = int(average_of(trainer).n_averaged)
    trainer.loss = lambda logits, target: logits.sum() * float("inf")
    outputs = [trainer.train_step(make_batch()) for _ in range(2)]
    for network, old in zip((trainer.segmenter.denoiser, average_of(trainer).module), before, strict=True):
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in old.items())
    assert average_of(trainer).n_averaged == steps
    trainer.loss = good
    outputs.append(trainer.train_step(make_batch()))
    assert average_of(trainer).n_averaged == steps + 1
    trainer.on_train_epoch_end(outputs)
    assert "2 of 3 training steps were skipped" in lines[0]
    assert np.isfinite(trainer.logger.get_value("train_losses", -1))  # without the skipped ones

    trainer.loss = lambda logits, target: logits.sum() * float("nan")
    for _ in range(SKIPPED_IN_A_ROW):
        trainer.train_step(make_batch())
    with pytest.raises(FloatingPointError, match=r"21 training steps in a row.*epoch 0, last on cases .*case_1.*--c"):
        trainer.train_step(make_batch())


def test_float16_scaler_skips_as_torch_does():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    taken = []
    for _ in range(40):
        optimizer.zero_grad()
        taken.append(take_step((weight * 1e10).sum(), [weight], optimizer, scaler))
    first = taken.index(True)
    assert 0 < first < 30 and all(taken[first:])
    assert scaler.get_scale() == 2.0 ** (120 - first)
    assert torch.isfinite(weight).all() and weight != 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_of_a_fold_is_refused(workplace, resume):
    trainer = started(workplace)
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.resumed = resume
    held = "import sys, time\nfrom nnunet_diffusion.jobs.locks import HeldLock\nlock = HeldLock(sys.argv[1])\n"
    held += "assert lock.acquire()\nprint('held', flush=True)\ntime.sleep(60)"
    job = subprocess.Popen(
        [sys.executable, "-c", held, str(folder / FOLD_LOCK_NAME)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout.readline() == "held\n"
        before = sorted(folder.iterdir())
        for work in (trainer.run_training, trainer.perform_actual_validation):
            with pytest.raises(RuntimeError, match=rf"Another job trains or validates in {folder} now.*plans_name"):
                work()
        assert sorted(folder.iterdir()) == before
    finally:
        job.kill()
        job.wait()


def test_what_happens_to_a_finished_training_is_said_and_it_is_kept(workplace, tmp_path):
    trainer = started(workplace)
    folder = Path(trainer.output_folder)
    assert what_happens_to_finished(trainer, resumed=False) == []
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    finished = (folder / "checkpoint_final.pth").read_bytes()
    (line,) = what_happens_to_finished(trainer, resumed=False)
    assert str(folder) in line and "holds a finished training, and this command starts a new one" in line
    again = started(workplace)
    again.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert not (folder / "checkpoint_final.pth").exists()  # --c would go on from it
    assert (folder / "checkpoint_replaced.pth").read_bytes() == finished
    again.current_epoch = again.num_epochs
    (line,) = what_happens_to_finished(again, resumed=True)
    assert "only validated again" in line


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision_of_the_training_step_is_a_setting(workplace, precision, dtype):
    trainer, seen = started(workplace, precision=precision), []
    trainer.segmenter.denoiser.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    losses = trainer.train_step(make_batch())
    assert seen == [dtype] and np.isfinite(losses["loss"]) and trainer.grad_scaler is None


@pytest.mark.parametrize("section", [{"training": {"min_snr_gamma": 5.0}}, {"version": 2, "min_snr_gamma": 5.0}])
def test_a_setting_that_was_removed_is_named_in_the_log(workplace, section):
    trainer = workplace.trainer(
        DiffusionTrainer, change=lambda plans: plans["configurations"]["2d"].update(diffusion=section)
    )
    assert "WARNING: the plans' min_snr_gamma does not exist any more" in Path(trainer.log_file).read_text()
