"""Dice at each weight equals that of predictions made with this weight, of labels, regions and ignored voxels."""

import json

import numpy as np
import pytest
import torch

from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training import plans as plans_of_trainings
from nnunet_diffusion.training.weights import dice_by_weight

pytestmark = pytest.mark.nnunet
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "Posterior": 2}, "regions_class_order": [1, 2]}


def overlap(found, truth):
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


@pytest.mark.parametrize(
    "configuration, plans, changes",
    [("2d", "Tiny", {}), ("3d_fullres", "Tiny3d", {}), ("2d", "Tiny", REGIONS)],
    ids=["2d", "3d", "regions"],
)
def test_dice_at_each_weight_is_that_of_predictions_with_this_weight(
    workplace, monkeypatch, configuration, plans, changes
):
    torch.manual_seed(0)
    monkeypatch.setattr(plans_of_trainings, "refuse_foreign_plans", lambda *_: None)  # other labels, same data
    description = json.loads((workplace.preprocessed / "dataset.json").read_text()) | changes
    trainer = workplace.trainer(
        DiffusionTrainer, configuration=configuration, plans=plans, description=description, presegmentation_weight=0.4
    )
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # as a training does
    for parameter in trainer.segmenter.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the last layer begins at zero: one class everywhere
    case = trainer.do_split()[1][0]
    found = dice_by_weight(trainer, [case], [0.0, 0.3, 0.4, 1.0])
    assert list(found) == [0.0, 0.3, 0.4, 1.0]
    assert trainer.segmenter.settings.presegmentation_weight == 0.4

    image, truth, _, _ = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)
    truth = truth[:][0]
    for weight, cases in found.items():
        predictor = DiffusionPredictor(device=torch.device("cpu"), allow_tqdm=False, presegmentation_weight=weight)
        predictor.manual_initialization(
            trainer.segmenter, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
            "DiffusionTrainer", trainer.inference_allowed_mirroring_axes,
        )  # fmt: skip
        logits = predictor.predict_volume(torch.from_numpy(image[:])).logits.numpy()
        if changes:
            whole, posterior = logits > 0
            expected = [overlap(whole | posterior, truth > 0), overlap(posterior, truth == 2)]
        else:
            expected = [overlap(logits.argmax(0) == label, truth == label) for label in (1, 2)]
        assert cases[case] == pytest.approx(np.mean(expected), abs=1e-4)
    assert len({round(cases[case], 3) for cases in found.values()}) > 1
