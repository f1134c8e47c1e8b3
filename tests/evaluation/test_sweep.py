"""A sweep measures what prediction does at each of its points, once, and keeps every finished case."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from nnunet_diffusion.diffusion.samplers import SAMPLERS
from nnunet_diffusion.evaluation import sweep as module
from nnunet_diffusion.evaluation.preprocessed import PreprocessedCase, mean_dice
from nnunet_diffusion.evaluation.sweep import measure, points, sweep
from nnunet_diffusion.evaluation.sweep_results import (
    NNUNET,
    NOISE,
    PRESEGMENTATION,
    Point,
    markdown,
    read_cases,
    summarise,
    write_case,
    write_tables,
)
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.settings import HIDIFF, HIDIFF_DENOISER, DiffusionSettings

BOTH = (NOISE, PRESEGMENTATION)
GAUSSIAN = DiffusionSettings(features_per_stage=(8, 8))
BERNOULLI = DiffusionSettings(features_per_stage=(8, 8), denoiser=HIDIFF, starts={"truth": 1.0}, **HIDIFF_DENOISER)


def test_points_are_all_combinations_but_more_steps_than_noising_steps():
    plan = points(GAUSSIAN, ["ddim", "ddpm"], [5, 1, 200], BOTH, range(3))
    assert len(plan.points) == len(set(plan.points)) == 2 * 3 * 3 + 2 * 2 * 3
    assert {(point.start, point.start_step) for point in plan.points} == {(NOISE, 1000), (PRESEGMENTATION, 100)}
    assert Point("ddim", NOISE, 1000, 200, 2) in plan.points
    assert plan.evaluations == 2 * 3 * (1 + 5 + 200) + 2 * 3 * (1 + 5)
    assert plan.left_out == ["steps 200 from presegmentation: more than T' = 100"]
    assert points(GAUSSIAN, ["ddim"], [200], BOTH, [0], 300).left_out == []


def test_hidiff_has_one_start_and_no_solver():
    plan = points(BERNOULLI, ["ddim", "unipc"], [1, 10, 20], BOTH, [0])
    assert plan.points == [Point("ddim", PRESEGMENTATION, 10, steps, 0) for steps in (1, 10)]
    told = " ".join(plan.left_out)
    assert "sampler unipc: for Gaussian" in told and "start noise: HiDiff" in told and "steps 20" in told
    with pytest.raises(ValueError, match="start_step is 5, but HiDiff always starts after all 10"):
        points(BERNOULLI, ["ddim"], [1], BOTH, [0], 5)


def test_samplers_of_diffusers_are_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    plan = points(GAUSSIAN, list(SAMPLERS), [1], [NOISE], [0])
    assert [point.sampler for point in plan.points] == ["ddpm", "ddim"]
    assert plan.left_out[0] == "sampler dpm_solver: needs diffusers: pip install diffusers"
    with pytest.raises(ValueError, match="Nothing is left to measure. Left out: sampler unipc: needs diffusers"):
        points(GAUSSIAN, ["unipc"], [1], [NOISE], [0])


def test_noise_is_left_out_where_training_did_not_reach_it():
    early = DiffusionSettings(features_per_stage=(8, 8), max_train_step=300)
    plan = points(early, ["ddim"], [1], BOTH, [0])
    assert plan.points == [Point("ddim", PRESEGMENTATION, 100, 1, 0)]
    assert plan.left_out == ["start noise: the denoiser was trained up to T' = 300 of 1000 noising steps only"]
    with pytest.raises(ValueError, match="start_step is 301, but must be 1 to the model's max_train_step, 300"):
        points(early, ["ddim"], [1], BOTH, [0], 301)


def test_a_model_from_noise_needs_a_start_step_for_the_other_start():
    settings = DiffusionSettings(features_per_stage=(8, 8), from_noise=True, start_step=1000)
    with pytest.raises(ValueError, match="starts from pure noise, .* give --start_step, or .* --starts noise"):
        points(settings, ["ddim"], [1], BOTH, [0])
    assert len(points(settings, ["ddim"], [1], BOTH, [0], 100).points) == 2
    assert len(points(settings, ["ddim"], [1], [NOISE], [0]).points) == 1


def made(seeds):
    """Two cases at nnU-Net and one process of so many seeds; the means over the cases are 0.6, 0.7, 0.8 and so on."""
    return {
        case: {NNUNET: 0.5 + shift}
        | {Point("ddim", NOISE, 1000, 5, seed): 0.6 + 0.1 * seed + shift for seed in range(seeds)}
        for case, shift in (("a", -0.1), ("b", 0.1))
    }


def test_mean_and_variance_by_hand():
    nnunet, process = summarise(made(3))
    assert (nnunet.sampler, nnunet.evaluations, nnunet.mean) == ("nnU-Net", 0, pytest.approx(0.5))
    assert math.isnan(nnunet.variance)
    assert (process.mean, process.variance) == (pytest.approx(0.7), pytest.approx(0.01))  # (0.1^2 + 0 + 0.1^2) / 2
    assert (process.evaluations, process.seeds, process.cases) == (5, 3, 2)
    assert math.isnan(summarise(made(1))[1].variance)


def test_tables_have_every_case_and_point(tmp_path):
    found = made(3)
    summaries = summarise(found)
    write_tables(found, summaries, tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == 2 * (1 + 3)
    assert rows[-1] == {
        "sampler": "ddim", "start": "noise", "start_step": "1000", "steps": "5", "seed": "2", "case": "b", "dice": "0.9",
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "sweep_summary.csv").open()))
    assert [row["variance"] for row in rows] == ["", "0.01"] and rows[1]["mean_dice"] == "0.7"
    assert "(cases: 2, seeds: 3; nnU-Net: 0.5000)" in markdown(summaries)
    assert "| ddim from noise | 1000 | 0.7000 |" in markdown(summaries)


def test_finished_cases_are_read_back_and_other_settings_are_refused(tmp_path):
    found, settings = made(2), {"steps": [5], "seed": (0, 1)}
    write_case(tmp_path, "a", settings, found["a"])
    assert read_cases(tmp_path, ["a", "b"], settings) == {"a": found["a"]}
    with pytest.raises(ValueError, match=r"a.json was measured with steps \[5\], which is \[7\] now: .* --overwrite"):
        read_cases(tmp_path, ["a"], {**settings, "steps": [7]})
    (tmp_path / "cases" / "b.json").write_text("{")
    with pytest.raises(ValueError, match="b.json is damaged: .* --overwrite"):
        read_cases(tmp_path, ["b"], settings)


@pytest.fixture
def model(loaded):
    """A predictor whose denoiser is random, its two cases, and what loads the middle slices of one."""
    predictor, cases, load = loaded(None)
    for parameter in predictor.network.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    predictor.list_of_parameters = [predictor.network.state_dict()]

    def load_slices(name):
        case = load(name)
        middle = slice(case.truth.shape[0] // 2 - 1, case.truth.shape[0] // 2 + 1)
        return PreprocessedCase(name, case.image[:, middle], case.truth[middle])

    return predictor, cases, load_slices


@pytest.fixture
def runs(model, monkeypatch):
    """The settings of each prediction, and the patches that the networks evaluated in it."""
    predictor, made = model[0], []
    predict = predictor.predict_volume

    def counted(*given):
        prediction = predict(*given)
        made.append((predictor.network.settings, prediction.evaluations))
        return prediction

    monkeypatch.setattr(predictor, "predict_volume", counted)
    return made


@pytest.mark.nnunet
def test_dice_is_that_of_a_prediction_with_these_settings(model, runs):
    predictor, cases, load = model
    case, before = load(cases[0]), predictor.network.settings
    plan = points(before, ["ddim", "ddpm"], [1, 3], BOTH, [0, 7], 300)
    found = measure(predictor, case, plan.points)
    assert predictor.network.settings is before and set(found) == {NNUNET, *plan.points}
    tiles = runs[1][1].denoiser  # of one step
    assert [each.denoiser for _, each in runs] == [0, *(tiles * point.steps for point in plan.points)]
    assert runs[0][1].presegmentor > 0 == sum(each.presegmentor for _, each in runs[1:])
    for point in (NNUNET, *plan.points):
        own = {"presegmentation_weight": 1.0} if point is NNUNET else point.settings() | {"presegmentation_weight": 0.0}
        with predictor.network.overridden(**own, samples=1):
            logits = predictor.predict_volume(torch.from_numpy(case.image)).logits
        segmentation = labels.activate(logits[None], before.regions)[0].argmax(0).numpy()
        assert found[point] == pytest.approx(mean_dice(segmentation, case.truth, predictor.label_manager), abs=1e-6)
    assert len({round(found[point], 6) for point in plan.points if point.steps == 3}) > 4, "or this could not fail"


@pytest.mark.nnunet
def test_with_one_step_all_samplers_agree(model):
    predictor, cases, load = model
    plan = points(predictor.network.settings, list(SAMPLERS), [1], [PRESEGMENTATION], [3])
    found = measure(predictor, load(cases[0]), plan.points)
    dice = [found[point] for point in plan.points]
    assert len(dice) >= 2 and dice == pytest.approx([dice[0]] * len(dice), abs=1e-6)


@pytest.mark.nnunet
def test_finished_cases_are_not_measured_again(model, runs, tmp_path):
    predictor, cases, load = model
    plan = points(predictor.network.settings, ["ddim"], [1, 2], [PRESEGMENTATION], [0, 1])

    def interrupted(name):
        if name == cases[1]:
            raise KeyboardInterrupt
        return load(name)

    with pytest.raises(KeyboardInterrupt):
        sweep(predictor, cases, interrupted, plan.points, tmp_path)
    assert len(runs) == 1 + 4, "one case"
    first = sweep(predictor, cases, load, plan.points, tmp_path)
    assert len(runs) == 2 * (1 + 4) and list(first) == cases
    assert sweep(predictor, cases, load, plan.points, tmp_path) == first
    assert len(runs) == 2 * (1 + 4)
    with pytest.raises(ValueError, match=r"was measured with seed \[0, 1\], which is \[0\] now"):
        sweep(predictor, cases, load, [point for point in plan.points if point.seed == 0], tmp_path)
    predictor.list_of_parameters = [{key: value + 1 for key, value in predictor.list_of_parameters[0].items()}]
    with pytest.raises(ValueError, match="was measured with weights_sha256"):
        sweep(predictor, cases, load, plan.points, tmp_path)
    sweep(predictor, cases, load, plan.points, tmp_path, overwrite=True)
    assert len(runs) == 3 * (1 + 4) + 5


@pytest.mark.nnunet
def test_a_folder_that_cannot_be_made_is_named(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="nothing can be written to .*below"):
        sweep(*model, [], tmp_path / "file" / "below")


@pytest.mark.slow
def test_the_command_writes_tables_and_figure_and_continues(trained_2d):
    place, _ = trained_2d
    words = ["sweep", "-d", 4, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu", "--seeds", 2]
    words += ["--samplers", "ddpm", "ddim", "--steps", 1, 2]
    printed = place.run("nnunet_diffusion", *words).stdout
    model = place.results / "TinyDiffusionTrainer__Tiny__2d"
    folder = model / "fold_0" / "sweep"
    cases = sorted(json.loads((place.preprocessed / "splits_final.json").read_text())[0]["val"])
    assert sorted(path.stem for path in (folder / "cases").iterdir()) == cases
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    summary = list(csv.DictReader((folder / "sweep_summary.csv").open()))
    assert [row["sampler"] for row in summary] == ["nnU-Net", *["ddpm", "ddpm", "ddim", "ddim"] * 2]
    assert len(rows) == len(cases) * (1 + 2 * 2 * 2 * 2)
    dice = [float(row["dice"]) for row in rows if row["sampler"] == "nnU-Net"]
    assert float(summary[0]["mean_dice"]) == pytest.approx(np.mean(dice), abs=1e-6)
    assert (folder / "sweep.png").stat().st_size > 20_000 and str(folder) in printed
    again = place.run("nnunet_diffusion", *words).stdout
    assert "cases, about" in printed and "cases, about" not in again
    assert again.splitlines()[-3:] == printed.splitlines()[-3:]
    refused = place.run("nnunet_diffusion", *words, 5, check=False)
    assert refused.returncode == 2 and "was measured with steps [1, 2], which is [1, 2, 5] now" in refused.stderr
    refused = place.run("nnunet_diffusion", *words, "--start_step", 2000, check=False)
    assert refused.returncode == 2 and "start_step is 2000" in refused.stderr
