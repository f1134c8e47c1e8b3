"""What nnU-Net's loaders need disappears in the middle of a training: the cure is named, no finished epoch is lost."""

import shutil
from pathlib import Path

import pytest

from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]


@pytest.fixture
def interrupted(hippocampus, tmp_path, monkeypatch):
    """Builds a trainer of two short epochs, to which `loss` happens between them; its pre-segmentor is not trained."""
    place = type(hippocampus)(tmp_path, hippocampus.dataset)
    shutil.copytree(hippocampus.preprocessed, place.preprocessed)
    monkeypatch.setattr(DiffusionTrainer, "_embed_presegmentor", lambda self: None)

    def build(loss=None):
        trainer = place.trainer(DiffusionTrainer)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1
        begin = trainer.on_epoch_start

        def on_epoch_start():
            begin()
            if trainer.current_epoch == 1 and loss is not None:
                loss(trainer)

        trainer.on_epoch_start = on_epoch_start
        return trainer

    with place.in_process(tmp_path / "results"):
        yield place, build


def continue_to_the_end(build):
    trainer = build()
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    assert read_checkpoint(latest)["current_epoch"] == 1
    trainer.load_checkpoint(latest)
    trainer.run_training()
    assert len(read_checkpoint(latest.with_name("checkpoint_final.pth"))["logging"]["train_losses"]) == 2


def test_unplugged_preprocessed_folder(interrupted):
    place, build = interrupted
    away = place.root / "unplugged"
    with pytest.raises(FileNotFoundError, match=r"nnUNetPlans_2d is missing.*mount.*--c, from epoch 1 on"):
        build(lambda trainer: Path(trainer.preprocessed_dataset_folder).rename(away)).run_training()
    away.rename(place.preprocessed / "nnUNetPlans_2d")
    continue_to_the_end(build)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the loader's own thread
def test_killed_loading_process(interrupted, monkeypatch):
    _, build = interrupted
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")

    def kill(trainer):
        for process in trainer.dataloader_train._processes:
            process.kill()
            process.join()

    with pytest.raises(RuntimeError, match=r"has died.*nnUNet_n_proc_DA.*--c, from epoch 1 on"):
        build(kill).run_training()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    continue_to_the_end(build)
