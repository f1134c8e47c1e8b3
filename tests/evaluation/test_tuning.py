"""Tuning chooses what is best if it is clearly better, and what is cheapest if not."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_diffusion.evaluation.preprocessed import mean_dice
from nnunet_diffusion.evaluation.tuning import NNUNET, Choice, Found, choose, found_in, on_unseen_cases, tune
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.settings import DiffusionSettings

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
    assert {choice for choice in found.found if not choice.presence_threshold} == {NNUNET} | {
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
            assert found.found[choice][number].dice == pytest.approx(wanted, abs=1e-6)
    tables = found.tables()
    assert "| settings | Dice | classes missed | false alarms |" in tables
    assert f"{found.chosen} (chosen)" in tables and "| nnU-Net | 4 |" in tables


LABELS = SimpleNamespace(
    has_ignore_label=False,
    has_regions=False,
    foreground_labels=[1, 2],
    convert_probabilities_to_segmentation=lambda p: p.argmax(0),
)


def test_missed_classes_and_false_alarms_are_counted():
    truth, found = np.zeros((6, 6)), np.zeros((6, 6))
    assert found_in(found, truth, LABELS) == Found(1.0, 0, 0)
    truth[1, 1] = 1
    found[2, 2] = 2
    assert found_in(found, truth, LABELS) == Found(0.0, 1, 1)
    assert found_in(truth, truth, LABELS) == Found(1.0, 0, 0)


def predicting():
    """A predictor whose nnU-Net finds class 1 in a corner, as surely as the image is bright, and whose denoiser too."""

    def predict(data, given=None):
        probabilities = torch.zeros(3, *data.shape[1:])
        probabilities[1, :3, :3] = float(data.max())
        probabilities[0] = 1 - probabilities[1]
        return SimpleNamespace(logits=labels.probabilities_to_logits(probabilities[None])[0])

    network = SimpleNamespace(
        settings=DiffusionSettings(features_per_stage=(8,)), overridden=lambda **_: contextlib.nullcontext()
    )
    return SimpleNamespace(network=network, label_manager=LABELS, predict_volume=predict)


@pytest.mark.parametrize(("doubtful", "wanted"), [(0.65, 0.7), (0.97, 0.98)])
def test_a_threshold_of_presence_is_chosen_where_false_alarms_are_less_sure_than_lesions(doubtful, wanted):
    def load(name):
        lesion = name.startswith("lesion")
        truth = np.zeros((8, 8))
        truth[:3, :3] = 1 if lesion else 0
        return SimpleNamespace(image=np.full((1, 8, 8), 0.99 if lesion else doubtful, np.float32), truth=truth)

    cases = [("0", f"{kind}{number}") for number in range(6) for kind in ("lesion", "normal")]
    tuned = tune({"0": predicting()}, cases, load, [100], [1], [0.5])
    assert tuned.chosen == Choice(0, 0, 1.0, wanted)
    assert tuned.chosen.settings() == {"presegmentation_weight": 1.0, "presence_threshold": wanted, "from_noise": False}
    assert sum(each.false_alarms for each in tuned.found[NNUNET]) == 6
    assert f"| nnU-Net alone, presence from {wanted:g} (chosen) | 1.0000 | 0 | 0 |" in tuned.tables()
    # without a false alarm there is nothing to choose
    tuned = tune({"0": predicting()}, [case for case in cases if "lesion" in case[1]], load, [100], [1], [0.5])
    assert {choice.presence_threshold for choice in tuned.found} == {0.0}


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


@pytest.mark.nnunet
def test_a_class_below_the_threshold_is_left_out_of_the_segmentation_and_keeps_its_probabilities(loaded):
    predictor, cases, load = loaded(None)
    image = torch.from_numpy(load(cases[0]).image)
    plain = predictor.predict_volume(image)
    highest = labels.activate(plain.logits[None])[0].flatten(1).amax(1)
    assert plain.decision is None
    with predictor.network.overridden(presence_threshold=float(highest[1:].max()) + 1e-3):
        found = predictor.predict_volume(image)
    assert torch.equal(found.logits, plain.logits)
    assert not found.decision.argmax(0).any()
