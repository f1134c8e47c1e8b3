"""Tuning chooses what is best if it is clearly better, and what is cheapest if not."""

import numpy as np
import pytest
import torch

from nnunet_diffusion.evaluation.preprocessed import mean_dice
from nnunet_diffusion.evaluation.tuning import NNUNET, Choice, choose, on_unseen_cases, tune
from nnunet_diffusion.model import labels

ONE, FIVE = Choice(1, 100, 0.0), Choice(5, 100, 0.0)
CASES = np.linspace(0.7, 0.9, 20)
NOISE = np.resize([0.01, -0.01], 20)


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        ({ONE: 0.05, FIVE: 0.10}, FIVE),
        ({ONE: 0.05, FIVE: 0.051}, ONE),
        ({ONE: 0.001, FIVE: 0.001}, NNUNET),
        ({ONE: -0.05, FIVE: -0.02}, NNUNET),
    ],
)
def test_cheaper_settings_are_kept_unless_others_are_better_by_a_standard_error(gains, wanted):
    # of each difference the standard error is 0.0023 against nnU-Net, and 0.0046 among the others
    scores = {NNUNET: CASES, ONE: CASES + gains[ONE] + NOISE, FIVE: CASES + gains[FIVE] - NOISE}
    assert choose(scores) == wanted


def test_tuned_settings_are_measured_on_cases_that_did_not_choose_them():
    """Even cases prefer one step, odd ones five: each half is measured at the other's choice, where both lose."""
    even = np.arange(20) % 2 == 0
    scores = {
        NNUNET: CASES,
        ONE: CASES + np.where(even, 0.1, -0.1),
        FIVE: CASES + np.where(even, -0.1, 0.1),
    }
    found = on_unseen_cases(scores, FIVE)
    assert found["nnU-Net"].mean_difference == pytest.approx(-0.1)
    assert found["the settings before"].mean_difference == pytest.approx(-0.1)


@pytest.mark.nnunet
def test_scores_are_those_of_predictions_at_these_settings(loaded):
    predictor, cases, load = loaded(None)
    for parameter in predictor.network.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    predictor.list_of_parameters = [predictor.network.state_dict()]
    found = tune({"0": predictor}, [("0", name) for name in (*cases, *cases)], load, [50], [1, 2], [0.25])
    own = predictor.network.settings
    assert set(found.scores) == {NNUNET} | {
        Choice(steps, step, weight)
        for steps in (1, 2)
        for step in (50, own.start_step)
        for weight in (0.25, own.presegmentation_weight)
    }
    assert found.before == Choice(own.steps, own.start_step, own.presegmentation_weight)
    for choice in (NNUNET, Choice(2, 50, 0.25), found.before):
        for number, name in enumerate(cases):
            case = load(name)
            with predictor.network.overridden(**choice.settings()):
                logits = predictor.predict_volume(torch.from_numpy(case.image)).logits
            segmentation = predictor.label_manager.convert_probabilities_to_segmentation(
                labels.activate(logits[None], own.regions)[0]
            )
            wanted = mean_dice(np.asarray(segmentation), case.truth, predictor.label_manager)
            assert found.scores[choice][number] == pytest.approx(wanted, abs=1e-6)
    tables = found.tables()
    assert f"{found.chosen} (chosen)" in tables and "| nnU-Net | 4 |" in tables


@pytest.mark.nnunet
def test_models_that_start_from_noise_are_refused(loaded):
    predictor, cases, load = loaded(None)
    with (
        predictor.network.overridden(from_noise=True, start_step=1000),
        pytest.raises(NotImplementedError, match="starts from pure noise"),
    ):
        tune({"0": predictor}, [("0", name) for name in (*cases, *cases)], load)


@pytest.mark.nnunet
def test_too_few_cases_are_refused(loaded):
    predictor, cases, load = loaded(None)
    with pytest.raises(ValueError, match="got 2 cases"):
        tune({"0": predictor}, [("0", name) for name in cases], load)
