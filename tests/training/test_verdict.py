"""The verdict at the end of a training: figures with known answers, plain words, and a file that is valid JSON."""

import json
import math

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.files import write_json
from nnunet_diffusion.training import DiffusionTrainer, diffusion_trainer, verdict
from nnunet_diffusion.training.presegmentor import presegmentor_folder
from nnunet_diffusion.training.verdict import (
    comparison_content,
    dice_of_cases,
    give_verdict,
    weights_content,
)

pytestmark = pytest.mark.nnunet
NAN = float("nan")


def summary_of(dice, folder="/elsewhere"):
    """nnU-Net's summary.json: case -> list of Dice, one per class."""
    return {
        "metric_per_case": [
            {
                "metrics": {str(label): {"Dice": value} for label, value in enumerate(values, 1)},
                "prediction_file": f"{folder}/{case}.nii.gz",
            }
            for case, values in dice.items()
        ]
    }


def write_summary(fold, dice):
    (fold / "validation").mkdir(parents=True, exist_ok=True)
    (fold / "validation" / "summary.json").write_text(json.dumps(summary_of(dice)))


def strict(path):
    """Read JSON, refusing NaN and Infinity as other readers do."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def cases_of(*dice):
    return {f"case_{number}": value for number, value in enumerate(dice)}


def rising(number, base=0.5, step=0.01):
    """`number` cases whose second value is better by step, 2 step, 3 step and so on."""
    return cases_of(*[base] * number), cases_of(*[base + step * (k + 1) for k in range(number)])


def test_dice_of_a_case_is_the_mean_over_classes_without_nan(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary_of({"a_1": [0.5, 0.7], "b.c": [NAN, 0.2], "empty": [NAN, NAN]})))
    found = dice_of_cases(path, ".nii.gz", "validate again")
    assert found.pop("a_1") == pytest.approx(0.6)
    assert found.pop("b.c") == pytest.approx(0.2)
    assert math.isnan(found.pop("empty"))
    assert not found


@pytest.mark.parametrize("content", ["", "[]", '{"mean": {}}'])
def test_a_damaged_summary_is_refused_with_the_cure(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match="summary.json.*validate again"):
        dice_of_cases(tmp_path / "summary.json", ".png", "validate again")


def test_pddpm_is_better_where_every_case_is():
    content = comparison_content(*rising(8))
    assert (content["n"], content["left_out"]) == (8, 0)
    assert content["nnunet_mean"] == pytest.approx(0.5)
    assert content["pddpm_mean"] == pytest.approx(0.545)
    assert content["mean_difference"] == pytest.approx(0.045)
    assert content["wilcoxon_p"] == pytest.approx(2 / 2**8)  # the most extreme of all 2^8 choices of signs, two-sided
    lower, upper = content["interval_95"]
    assert 0.01 < lower < 0.045 < upper < 0.08
    sentence = content["sentence"]
    assert sentence.startswith("Verdict: PD-DDPM is better than nnU-Net. On 8 validation cases the mean Dice is 0.5000")
    assert "difference +0.0450" in sentence
    assert "p = 0.0078" in sentence


def test_hidiffs_verdict_says_that_its_nnunet_was_trained_further():
    before, after = rising(8)
    told = comparison_content(before, after, method="HiDiff")["sentence"]
    assert told.startswith("Verdict: HiDiff is better than nnU-Net.")
    assert "for a fair comparison train nnU-Net alone for as many additional epochs" in told
    assert "additional epochs" not in comparison_content(before, after)["sentence"]


def test_a_worse_pddpm_is_a_warning():
    content = comparison_content(*reversed(rising(8)))
    assert content["mean_difference"] == pytest.approx(-0.045)
    assert content["sentence"].startswith("WARNING: Verdict: PD-DDPM is worse than nnU-Net; predict with nnU-Net's own")


def test_cases_are_paired_by_name_and_not_by_order():
    nnunet, pddpm = rising(8)
    shuffled = {case: pddpm[case] for case in sorted(pddpm, reverse=True)}
    assert comparison_content(nnunet, shuffled) == comparison_content(nnunet, pddpm)
    assert comparison_content(nnunet, pddpm)["cases"]["case_2"] == {"nnunet": 0.5, "pddpm": pytest.approx(0.53)}


def test_differences_both_ways_show_nothing():
    changes = [sign * step for step in (0.01, 0.02, 0.03, 0.04) for sign in (1, -1)]
    content = comparison_content(cases_of(*[0.5] * 8), cases_of(*[0.5 + change for change in changes]))
    assert content["wilcoxon_p"] > 0.5
    assert content["sentence"].startswith("Verdict: neither PD-DDPM nor nnU-Net is shown to be better.")


@pytest.mark.parametrize("number, little", [(5, True), (6, False)])
def test_few_cases_show_nothing_and_the_log_says_so(number, little):
    sentence = comparison_content(*rising(number))["sentence"]
    assert ("With fewer than 6 cases, p and the interval are not meaningful." in sentence) == little
    assert ("PD-DDPM is better" in sentence) != little


def test_cases_without_a_dice_are_left_out_counted_and_null_in_the_file(tmp_path):
    nnunet, pddpm = rising(8)
    nnunet |= {"empty": NAN, "only_nnunet": 0.9}
    pddpm |= {"empty": 0.0}
    content = comparison_content(nnunet, pddpm)
    assert (content["n"], content["left_out"]) == (8, 2)
    assert "left out because one of the two has no Dice: 1." in content["sentence"]
    write_json(content, tmp_path / "comparison.json")
    written = strict(tmp_path / "comparison.json")
    assert written["cases"]["empty"] == {"nnunet": None, "pddpm": 0.0}
    assert written["cases"]["only_nnunet"] == {"nnunet": 0.9, "pddpm": None}
    assert written["wilcoxon_p"] == content["wilcoxon_p"]


def test_without_a_common_case_there_is_nothing_to_compare(tmp_path):
    content = comparison_content({"a": 0.5}, {"b": 0.5})
    assert (content["n"], content["left_out"]) == (0, 2)
    assert "no validation case has a Dice for both" in content["sentence"]
    write_json(content, tmp_path / "comparison.json")
    assert strict(tmp_path / "comparison.json")["interval_95"] == [None, None]


def test_fold_all_is_said_not_to_tell_of_new_cases():
    content = comparison_content(*rising(8), on_training_cases=True)
    assert content["on_training_cases"] is True
    assert "On 8 training cases (fold all)" in content["sentence"]
    assert "says nothing about new cases" in content["sentence"]


def test_the_best_of_the_significantly_better_weights_is_named():
    own, better = rising(8)
    best = {case: value + 0.1 for case, value in better.items()}
    tempting = {**own, "case_0": 10.0}  # the highest mean, by one case
    content = weights_content({0.0: tempting, 0.25: better, 0.5: own, 1.0: best}, 0.5, "model/plans.json")
    assert (content["own"], content["better"]) == (0.5, 1.0)
    rows = {row["weight"]: row for row in content["table"]}
    assert rows[0.5] == {"weight": 0.5, "n": 8, "mean": 0.5, "mean_difference": 0.0, "wilcoxon_p": 1.0}
    assert rows[0.25]["mean_difference"] == pytest.approx(0.045)
    assert rows[1.0]["mean"] == pytest.approx(0.645)
    assert rows[1.0]["wilcoxon_p"] == pytest.approx(2 / 2**8)
    assert (
        "A weight of 1 (nnU-Net alone) is better than this model's 0.5 by +0.1450 (p = 0.0078)" in content["sentence"]
    )
    assert "set presegmentation_weight to 1 in model/plans.json" in content["sentence"]
    assert "optimistic" in content["sentence"]
    assert "preprocessed grid" in content["sentence"]


@pytest.mark.parametrize("number, sign", [(8, -1), (5, 1)])
def test_no_weight_is_named_that_is_worse_or_judged_on_few_cases(number, sign):
    own, other = rising(number, step=0.01 * sign)
    content = weights_content({0.5: own, 0.75: other}, 0.5, "plans.json")
    assert content["better"] is None
    assert content["sentence"].endswith("No other weight is significantly better than 0.5.")


@pytest.fixture
def finished(workplace, monkeypatch):
    """A trainer after its validation, beside its pre-segmentor; and the lines that it logs."""
    torch.manual_seed(0)
    stock = workplace.trainer(nnUNetTrainer)
    stock.initialize()
    stock.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # as a training does, before it saves
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    stock.save_checkpoint(str(presegmentor_folder(trainer) / "checkpoint_final.pth"))
    trainer.segmenter.presegmentor.load_state_dict(stock.network.state_dict())
    for fold, dice in zip((presegmentor_folder(trainer), workplace_fold(trainer)), rising(8), strict=True):
        write_summary(fold, {case: [value] for case, value in dice.items()})
    lines = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *words: lines.append(" ".join(map(str, words))))
    monkeypatch.setattr(verdict, "_compare_weights", lambda *_: {"sentence": "weights"})
    return trainer, lines


def workplace_fold(trainer):
    return presegmentor_folder(trainer).parents[1] / "DiffusionTrainer__Tiny__2d" / "fold_0"


def written(trainer):
    return strict(workplace_fold(trainer) / "validation" / "comparison.json")


def test_verdict_is_in_the_log_and_in_the_file(finished):
    trainer, lines = finished
    give_verdict(trainer)
    assert [line.split(".")[0] for line in lines] == ["Verdict: PD-DDPM is better than nnU-Net", "weights"]
    assert written(trainer)["sentence"] == lines[0]
    assert written(trainer)["presegmentation_weights"] == {"sentence": "weights"}


def test_a_failure_is_a_warning_and_the_comparison_stays(finished, monkeypatch):
    trainer, lines = finished

    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(verdict, "_compare_weights", fail)
    give_verdict(trainer)
    assert lines[1].startswith("WARNING: The comparison of presegmentation_weight stopped with MemoryError: too large.")
    assert written(trainer)["n"] == 8
    assert "presegmentation_weights" not in written(trainer)


def test_a_damaged_summary_is_a_warning_and_no_old_verdict_stays(finished):
    trainer, lines = finished
    give_verdict(trainer)
    (workplace_fold(trainer) / "validation" / "summary.json").write_text("{")
    lines.clear()
    give_verdict(trainer)
    (line,) = lines
    assert line.startswith("WARNING: The comparison with nnU-Net stopped with ValueError:")
    assert not (workplace_fold(trainer) / "validation" / "comparison.json").exists()


def retrained(checkpoint):
    content = torch.load(checkpoint, weights_only=False)
    next(iter(content["network_weights"].values())).add_(1)
    torch.save(content, checkpoint)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "validation" / "summary.json").unlink(), "summary.json is missing; validate that nnU-Net"),
        (lambda folder: (folder / "checkpoint_final.pth").unlink(), "No checkpoint at"),
        (lambda folder: retrained(folder / "checkpoint_final.pth"), "are not those in this model"),
    ],
    ids=["no validation", "no checkpoint", "retrained"],
)  # fmt: skip
def test_without_the_embedded_networks_validation_there_is_nothing_to_compare_with(finished, spoil, words):
    trainer, lines = finished
    spoil(presegmentor_folder(trainer))
    give_verdict(trainer)
    assert lines[0].startswith("PD-DDPM cannot be compared with nnU-Net: ")
    assert words in lines[0]
    assert lines[1] == "weights"
    content = written(trainer)
    assert (content["n"], content["pddpm_mean"]) == (0, None)
    assert content["cases"]["case_0"] == {"nnunet": None, "pddpm": pytest.approx(0.51)}


@pytest.mark.parametrize("rank, expected", [(0, ["validation", True]), (1, ["validation"])])
def test_verdict_comes_after_the_validation_with_the_averaged_weights_on_one_rank(
    finished, monkeypatch, rank, expected
):
    trainer, _ = finished
    trainer.local_rank, happened = rank, []
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: happened.append("validation"))
    monkeypatch.setattr(
        diffusion_trainer,
        "give_verdict",
        lambda given: happened.append(given.segmenter.denoiser is given.learners["denoiser"].average.module),
    )
    trainer.perform_actual_validation()
    assert happened == expected
