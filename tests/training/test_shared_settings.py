"""The folds of a model share its plans.json: settings of training must agree, those of inference are taken over."""

import json
from pathlib import Path

import pytest

from nnunet_diffusion.training import DiffusionTrainer, DiffusionTrainerUNet, HiDiffTrainer
from nnunet_diffusion.training.plans import notes, planned_settings, share_settings_of_folds

pytestmark = pytest.mark.nnunet


@pytest.fixture
def other_fold(workplace):
    """A function of changes by section: a trainer of a fold beside a trained one whose plans.json has these changes."""

    def make(**sections):
        trainer = workplace.trainer(DiffusionTrainer)
        trainer.initialize()
        plans = json.loads(json.dumps(trainer.plans_manager.plans, default=str))
        for section, changes in sections.items():
            plans["configurations"]["2d"]["diffusion"][section] |= changes
        path = Path(trainer.output_folder_base) / "plans.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plans))
        return trainer

    return make


def test_inference_settings_are_those_of_the_model(other_fold):
    trainer = other_fold(inference={"start_step": 300, "presegmentation_weight": 0.25})
    share_settings_of_folds(trainer)
    assert (trainer.settings.start_step, trainer.settings.presegmentation_weight) == (300, 0.25)
    assert trainer.segmenter.settings == trainer.settings
    written = trainer.plans_manager.plans["configurations"]["2d"]["diffusion"]["inference"]
    assert (written["start_step"], written["presegmentation_weight"]) == (300, 0.25)
    log = "".join(path.read_text() for path in Path(trainer.output_folder).glob("training_log*"))
    assert "start_step 300 (not 100), presegmentation_weight 0.25 (not 0.5)" in log


@pytest.mark.parametrize("changes", [{"learning_rate": 0.01}, {"learning_rate": 0.01, "max_train_step": 50}])
def test_other_settings_of_training_are_refused_by_name(other_fold, changes):
    trainer = other_fold(training=changes, inference={"start_step": 20})
    with pytest.raises(ValueError, match=r"belongs to a training with other settings \(.*learning_rate"):
        share_settings_of_folds(trainer)


def test_a_section_without_a_denoiser_is_for_the_trainers(workplace):
    """Unless our planner made the plans, whose values are PGDiffSeg's."""
    section = {"inference": {"samples": 3}, "training": {"learning_rate": 5e-4}}
    trainer = workplace.trainer(DiffusionTrainerUNet, **section)
    assert (trainer.settings.denoiser, trainer.settings.samples, trainer.settings.learning_rate) == ("nnunet", 3, 5e-4)
    assert (trainer.settings.prediction_type, trainer.settings.signal_scale) == ("logits", 0.1)
    plans = json.loads((workplace.preprocessed / "Tiny.json").read_text())
    chosen = plans["configurations"]["2d"]
    chosen["diffusion"] = {**section, "network": {"denoiser": "pgdiffseg"}}
    description = json.loads((workplace.preprocessed / "dataset.json").read_text())
    assert planned_settings(plans, "2d", description, "nnunet").samples == 1
    assert "is for the denoiser 'pgdiffseg'" in notes(chosen, "nnunet")[0]
    assert notes(chosen) == []


def test_a_training_does_not_go_on_from_the_checkpoint_of_another_denoiser(workplace):
    checkpoint = {
        "network_weights": {},
        "trainer_name": "DiffusionTrainerUNet",
        "diffusion": {},
        "init_args": workplace.trainer(DiffusionTrainerUNet).my_init_kwargs,
    }
    with pytest.raises(
        ValueError, match=r"of the denoiser 'nnunet' \(DiffusionTrainerUNet\), this training is of 'hidiff'"
    ):
        workplace.trainer(HiDiffTrainer).load_checkpoint(checkpoint)


def test_hidiff_takes_nothing_but_the_presegmentor_from_plans_for_another_denoiser(workplace):
    trainer = workplace.trainer(HiDiffTrainer, denoiser="pgdiffseg", schedule="cosine", learning_rate=0.5)
    assert trainer.settings.denoiser == "hidiff"
    assert trainer.settings.schedule == "linear" and trainer.settings.learning_rate != 0.5
    # settings written for HiDiff are its own
    trainer = workplace.trainer(HiDiffTrainer, denoiser="hidiff", schedule="cosine", prediction_type="flip")
    assert trainer.settings.schedule == "cosine"
