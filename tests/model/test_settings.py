"""Settings: read, write, defaults, refusals."""

import dataclasses
import json

import pytest

from nnunet_diffusion.diffusion.schedules import noise_schedule
from nnunet_diffusion.model.settings import (
    SECTIONS,
    DiffusionSettings,
    default_settings,
    inference_settings,
    path_of,
    settings_table,
    topology_of,
)


def test_hidiff_draws_states_and_no_estimates():
    # training validates with one step, whatever the plans draw
    assert DiffusionSettings(features_per_stage=(8, 16), draw="level", steps=1).draw == "level"
    hidiff = {"denoiser": "hidiff", "prediction_type": "flip", "timesteps": 10, "max_train_step": 10, "start_step": 10}
    found = DiffusionSettings(features_per_stage=(8, 16), draw="level", steps=2, starts={"truth": 1.0}, **hidiff)
    assert (found.draw, found.estimate_draw) == ("level", "no")


def configuration(**section):
    plans = {
        "batch_size": 12,
        "architecture": {
            "network_class_name": "PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [32, 64, 128],
                "conv_op": "torch.nn.modules.conv.Conv2d",
                "kernel_sizes": [[3, 3]] * 3,
                "strides": [[1, 1], [2, 2], [2, 2]],
            },
        },
    }
    if section:
        plans["diffusion"] = section
    return plans


def test_plans_without_section_get_the_defaults_and_survive_json():
    settings = DiffusionSettings.from_plans(configuration())
    assert settings == default_settings(configuration())
    assert settings.features_per_stage == (16, 32, 64)
    section = json.loads(json.dumps(settings.to_plans()))
    assert DiffusionSettings.from_plans(configuration(**section)) == settings


def test_partial_section_keeps_the_other_defaults():
    settings = DiffusionSettings.from_plans(configuration(start_step=50, steps=3, features_per_stage=[4, 8, 8]))
    assert settings == dataclasses.replace(
        default_settings(configuration()), start_step=50, steps=3, features_per_stage=(4, 8, 8)
    )


# written by version 2 of the layout, in which all keys stood side by side
VERSION_2 = {
    "features_per_stage": [16, 32, 64], "version": 2, "prediction_type": "x0", "schedule": "linear", "timesteps": 1000,
    "sdb_depth": 4, "attention_tokens": 1024, "attention_stages": [], "norm": "batch", "time_in_condition_flow": True,
    "condition_on_presegmentation": False, "regions": False, "max_train_step": 1000, "corruption_probability": 0.5,
    "presegmentation_start_probability": 0.0, "min_snr_gamma": 0.0, "presence_weight": 1.0, "location_weight": 1.0,
    "learning_rate": 0.001, "weight_decay": 0.01, "ema_decay": 0.999, "sampler": "ddim", "start_step": 100, "steps": 1,
    "eta": 0.0, "samples": 1, "presegmentation_weight": 0.5, "start_from": "presegmentor", "from_noise": False,
    "seed": 1234, "presegmentor_trainer": "", "presegmentor_architecture": {},
}  # fmt: skip


def test_earlier_versions_mean_the_same_today():
    assert DiffusionSettings.from_plans(configuration(**VERSION_2)) == default_settings(configuration())
    first = {key: value for key, value in VERSION_2.items() if key != "attention_stages"} | {"version": 1}
    assert DiffusionSettings.from_plans(configuration(**first)) == default_settings(configuration())
    changed = DiffusionSettings.from_plans(configuration(**{**VERSION_2, "presegmentor_trainer": "Mine", "steps": 7}))
    assert changed == dataclasses.replace(default_settings(configuration()), presegmentor_trainer="Mine", steps=7)
    assert changed.to_plans()["presegmentor"]["trainer"] == "Mine" and changed.to_plans()["version"] == 3


def test_each_setting_stands_in_the_section_of_its_owner():
    section = default_settings(configuration()).to_plans()
    assert list(section) == ["version", *SECTIONS]
    assert set(section["inference"]) == set(inference_settings()) >= {"start_step", "steps", "samples", "seed"}
    assert sum(len(section[owner]) for owner in SECTIONS) == len(dataclasses.fields(DiffusionSettings))
    partial = configuration(inference={"start_step": 50, "steps": 3}, network={"features_per_stage": [4, 8, 8]})
    assert DiffusionSettings.from_plans(partial) == dataclasses.replace(
        default_settings(configuration()), start_step=50, steps=3, features_per_stage=(4, 8, 8)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v"])
def test_prediction_types_without_bounded_targets_train_on_the_truth_by_default(prediction_type):
    assert DiffusionSettings.from_plans(configuration(prediction_type=prediction_type)).starts == {"truth": 1}
    with pytest.raises(ValueError, match=f"{prediction_type}.*training.starts"):
        DiffusionSettings.from_plans(
            configuration(prediction_type=prediction_type, starts={"truth": 0.5, "corrupted": 0.5})
        )


@pytest.mark.parametrize("sections", [True, False])
def test_shares_of_earlier_versions_are_read_as_starts(sections):
    def read(process=None, **shares):
        process = {"prediction_type": process} if process else {}
        section = {"process": process, "training": shares} if sections else {**process, **shares}
        return DiffusionSettings.from_plans(configuration(**section)).starts

    shares = {"truth": 0.2, "corrupted": 0.3, "presegmentation": 0.5}
    assert read(corruption_probability=0.3, presegmentation_start_probability=0.5) == shares
    assert read(presegmentation_start_probability=0.25) == {"truth": 0.25, "corrupted": 0.5, "presegmentation": 0.25}
    assert read(process="v", presegmentation_start_probability=0.0) == {"truth": 1}
    with pytest.raises(ValueError, match=r"corruption_probability 0.3 beside .*starts"):
        read(corruption_probability=0.3, starts={"truth": 1.0})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"start_stepp": 3}, ["start_stepp", "start_step"]),
        ({"start_step": 2000}, ["start_step", "2000", "timesteps", "1000"]),
        ({"start_step": 10, "steps": 11}, ["steps", "11", "start_step", "10"]),
        ({"max_train_step": 1001}, ["max_train_step", "1001", "timesteps"]),
        ({"max_train_step": 50}, ["start_step", "100", "max_train_step", "50"]),
        ({"sampler": "euler"}, ["sampler", "euler", "ddim", "unipc"]),
        ({"prediction_type": "mu"}, ["prediction_type", "mu", "epsilon"]),
        ({"schedule": "quadratic"}, ["schedule", "quadratic", "linear", "cosine"]),
        ({"steps": 2.0}, ["steps", "int", "2.0"]),
        ({"steps": True}, ["steps", "int", "True"]),
        ({"time_in_condition_flow": 1}, ["time_in_condition_flow", "bool"]),
        ({"eta": 1.5}, ["eta", "1.5", "<= 1"]),
        ({"eta": float("nan")}, ["eta", "nan"]),
        ({"features_per_stage": [16, 0, 2]}, ["features_per_stage", "[16, 0, 2]"]),
        ({"features_per_stage": 16}, ["features_per_stage", "16"]),
        ({"from_noise": True}, ["from_noise", "start_step", "1000"]),
        ({"corruption_probability": 0.7, "presegmentation_start_probability": 0.5}, ["0.7", "0.5", "at most 1"]),
        ({"corruption_probability": "x"}, ["corruption_probability 'x'", "0 to 1"]),
        ({"condition_on_presegmentation": True}, ["condition_on_presegmentation", "truth", "0.5"]),
        ({"starts": {"truth": 0.5}}, ["diffusion.training.starts", "sum 1", "0.5"]),
        ({"starts": {"truth": 0.5, "noise": 0.5}}, ["diffusion.training.starts", "recycled", "noise"]),
        ({"starts": {"truth": 1.5, "corrupted": -0.5}}, ["diffusion.training.starts", "-0.5"]),
        ({"starts": {"recycled": 1}}, ["recycled starts only", "another kind"]),
        ({"presegmentation_start_probability": 0.7}, ["0.7", "at most 1", "corruption_probability 0.5"]),
        ({"starts": ["truth"]}, ["diffusion.training.starts", "['truth']"]),
        ({"starts": {"truth": "all"}}, ["diffusion.training.starts", "all"]),
        ({"version": 4}, ["version", "4", "install a newer one"]),
        ({"version": 4, "of_the_future": 1}, ["version", "4", "install a newer one"]),
        ({"inference": {"start_stepp": 3}}, ["diffusion.inference.start_stepp", "inference.start_step"]),
        ({"training": {"steps": 3}}, ["Unknown key diffusion.training.steps", "Known: inference.steps"]),
        ({"inference": {}, "steps": 3}, ["Unknown key diffusion.steps", "Known: inference.steps"]),
        ({"inference": {"steps": 2.0}}, ["diffusion.inference.steps", "int"]),
        ({"inference": 5}, ["diffusion.inference must be a dictionary", "5"]),
        ({"presegmentor": {"architecture": {"a": 1}}}, ["diffusion.presegmentor.architecture", "network_class_name"]),
        ({"version": 1, "attention_stages": [1]}, ["attention_stages", "version 1", "version 2"]),
        ({"attention_stages": [3]}, ["attention_stages", "[3]", "1 to 2"]),
        ({"attention_stages": [2, 1]}, ["attention_stages", "[2, 1]", "ascending"]),
        ({"seed": -1}, ["seed", "-1", ">= 0"]),
    ],
)
def test_bad_settings_are_refused_by_key_value_and_choices(section, words):
    with pytest.raises(ValueError) as error:
        DiffusionSettings.from_plans(configuration(**section))
    for word in words:
        assert word in str(error.value)


def test_section_of_another_type_is_refused():
    with pytest.raises(ValueError, match="must be a dictionary"):
        DiffusionSettings.from_plans({**configuration(), "diffusion": [1]})


def test_integer_is_read_as_float_where_a_float_is_meant():
    assert DiffusionSettings.from_plans(configuration(learning_rate=1)).learning_rate == 1.0


def test_architecture_without_topology_is_refused_by_name():
    broken = configuration()
    del broken["architecture"]["arch_kwargs"]["strides"]
    with pytest.raises(NotImplementedError, match="PlainConvUNet has no strides"):
        topology_of(broken)


def test_table_names_every_setting():
    table = settings_table()
    for entry in dataclasses.fields(DiffusionSettings):
        section, key = path_of(entry.name).split(".")
        assert f"| `{section}` | `{key}` |" in table


def test_start_may_be_stated_as_a_signal_to_noise_ratio_in_any_schedule():
    for process in ({}, {"schedule": "cosine"}, {"signal_scale": 0.1}, {"timesteps": 200}):
        training = {"max_train_step": process.get("timesteps", 1000)}
        section = {"process": process, "inference": {"start_snr": 0.6}, "training": training}
        settings = DiffusionSettings.from_plans({**configuration(), "diffusion": section})
        schedule = noise_schedule(settings.schedule, settings.timesteps, settings.signal_scale)
        nearest = schedule.snr[settings.start_step - 1].item()
        assert nearest == pytest.approx(0.6, rel=0.05)
        assert DiffusionSettings.from_plans({**configuration(), "diffusion": settings.to_plans()}) == settings


@pytest.mark.parametrize(
    ("inference", "words"),
    [
        ({"start_snr": -1}, "start_snr is -1"),
        ({"start_snr": None}, "start_snr.*None"),
        ({"start_snr": "low"}, "start_snr.*'low'"),
        ({"start_snr": 1, "start_step": 9}, "keep one"),
    ],
)
def test_wrong_signal_to_noise_ratios_are_refused(inference, words):
    with pytest.raises(ValueError, match=words):
        DiffusionSettings.from_plans({**configuration(), "diffusion": {"inference": inference}})


def test_a_ratio_beyond_the_training_is_refused_in_the_users_own_terms():
    section = {"inference": {"start_snr": 0.01}, "training": {"max_train_step": 200}}
    with pytest.raises(ValueError, match=r"start_snr is 0.01, which is T' = \d+, more than .*max_train_step \(200\)"):
        DiffusionSettings.from_plans({**configuration(), "diffusion": section})


def test_removed_settings_are_read_from_their_own_section_only():
    for old in ({"training": {"min_snr_gamma": 5.0}}, {"version": 2, "min_snr_gamma": 5.0}):
        assert DiffusionSettings.from_plans({**configuration(), "diffusion": old}) == default_settings(configuration())
    with pytest.raises(ValueError, match="Unknown key diffusion.process.min_snr_gamma"):
        DiffusionSettings.from_plans({**configuration(), "diffusion": {"process": {"min_snr_gamma": 5.0}}})


def test_hidiff_has_defaults_of_its_own_that_survive_json():
    settings = DiffusionSettings.from_plans(configuration(network={"denoiser": "hidiff"}))
    assert settings == default_settings(configuration(), denoiser="hidiff")
    assert (settings.timesteps, settings.start_step, settings.prediction_type) == (10, 10, "flip")
    assert settings.starts == {"truth": 1.0} and settings.collaboration_weight > 0
    assert settings.noise_schedule.timesteps == 10 and float(settings.noise_schedule.alpha_bar[-1]) == 0
    assert settings.learning_networks == ("denoiser", "presegmentor")
    section = json.loads(json.dumps(settings.to_plans()))
    assert DiffusionSettings.from_plans(configuration(**section)) == settings


@pytest.mark.parametrize(
    ("kind", "section", "words"),
    [
        (ValueError, {"process": {"prediction_type": "x0"}}, "prediction_type is 'x0' .*denoiser 'hidiff': 'flip' is"),
        (ValueError, {"process": {"signal_scale": 0.1}}, r"signal_scale is 0\.1, but must be 1\.0 with HiDiff"),
        (ValueError, {"training": {"starts": {"corrupted": 1}}}, "starts is .*must be .*truth.* with HiDiff"),
        (ValueError, {"inference": {"from_noise": True}}, "from_noise is True, but must be False with HiDiff"),
        (ValueError, {"inference": {"sampler": "unipc"}}, "'unipc' is for Gaussian processes: .*'ddim' or 'ddpm'"),
        (
            ValueError,
            {"inference": {"start_step": 5}},
            "start_step is 5, but must be 10 with HiDiff: a draw of nnU-Net's",
        ),
        (ValueError, {"inference": {"start_snr": 1}}, "start_snr is 1, but HiDiff always starts after all noising"),
        (ValueError, {"process": {"timesteps": 20}}, "start_step is 10, but must be 20 with HiDiff"),
        (ValueError, {"inference": {"start_step": 11}}, r"start_step is 11, more than .*timesteps \(10\)"),
        (ValueError, {"training": {"collaboration_weight": -1}}, "collaboration_weight is -1"),
        (ValueError, {"network": {"condition_on_presegmentation": True}}, "denoiser 'hidiff'"),
        (NotImplementedError, {"presegmentor": {"start_from": "previous_stage"}}, "not supported with HiDiff"),
    ],
)
def test_what_hidiff_cannot_have_is_refused_in_one_sentence(kind, section, words):
    network = {"denoiser": "hidiff", **section.get("network", {})}
    with pytest.raises(kind, match=words):
        DiffusionSettings.from_plans(configuration(**{**section, "network": network}))


def test_other_denoisers_cannot_predict_a_flip():
    with pytest.raises(ValueError, match="prediction_type is 'flip' .*'pgdiffseg': 'flip' is what 'hidiff' predicts"):
        DiffusionSettings.from_plans(configuration(process={"prediction_type": "flip"}))
