"""Model folders that would run code when they are loaded, and others that are not whole."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.install import install
from nnunet_diffusion.inference.loading import read_model, refuse_foreign_classes

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {"conv_op": "torch.nn.modules.conv.Conv2d", "dropout_op": None},
    "_kw_requires_import": ["conv_op", "dropout_op"],
}
NAME = "checkpoint_final.pth"


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def checkpoint(**more):
    weights = {"weight": torch.ones(2)}
    return {
        "network_weights": weights,
        "diffusion": {},
        "init_args": {"configuration": "2d"},
        "trainer_name": "T",
        **more,
    }


def plans(**architecture):
    return {"configurations": {"2d": {"architecture": {**ARCHITECTURE, **architecture}}}}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "Dataset001_A" / "DiffusionTrainer__nnUNetPlans__2d"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans()))
    (folder / "dataset.json").write_text('{"labels": {}, "file_ending": ".nii.gz"}')
    torch.save(checkpoint(), folder / "fold_0" / NAME)
    return folder


def test_model_is_read(model):
    found = read_model(model, None, NAME, trust=False)
    assert (found.configuration, found.folds, found.trainer_name) == ("2d", ["0"], "T")
    assert torch.equal(found.weights[0]["weight"], torch.ones(2))


def test_pickle_bomb_does_not_go_off(model, tmp_path):
    trace = str(tmp_path / "exploded")
    torch.save(checkpoint(more=Bomb(trace)), model / "fold_0" / NAME)
    with pytest.raises(ValueError, match=f"{NAME} holds more than tensors"):
        read_model(model, [0], NAME, trust=False)
    assert not os.path.exists(trace)
    with (model / "fold_0" / NAME).open("wb") as file:  # not torch's format
        pickle.dump(checkpoint(more=Bomb(trace)), file)
    with pytest.raises(ValueError, match="damaged"):
        read_model(model, [0], NAME, trust=False)
    assert not os.path.exists(trace)


def test_checkpoint_with_an_unknown_global_is_refused_unless_trusted(model):
    torch.save(checkpoint(more=CommandError), model / "fold_0" / NAME)
    with pytest.raises(ValueError, match="CommandError"):
        read_model(model, [0], NAME, trust=False)
    assert read_model(model, [0], NAME, trust=True).folds == ["0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"network_class_name": "os.system"},
        {"network_class_name": "subprocess.Popen"},
        {"network_class_name": "torch.nn.modules.module.os.system"},
        {"network_class_name": "nnunetv2.run.run_training.os.remove"},
        {"network_class_name": ["torch.nn.Conv2d"]},
        {"arch_kwargs": {"conv_op": "builtins.eval"}},
        {"arch_kwargs": {"conv_op": "torch.hub.load"}},
    ],
)
def test_plans_that_name_anything_but_network_classes_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"plans\.json names .*trust_checkpoint"):
        refuse_foreign_classes(plans(**changes), tmp_path / "plans.json", trust=False)
    refuse_foreign_classes(plans(**changes), tmp_path / "plans.json", trust=True)


def test_nothing_outside_the_allowed_packages_is_imported_to_judge_it(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'imported')!r})\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="evil_module"):
        refuse_foreign_classes(plans(network_class_name="evil_module.Net"), tmp_path / "plans.json", trust=False)
    assert not (tmp_path / "imported").exists()


def test_presegmentors_own_architecture_is_judged_too(tmp_path):
    content = plans()
    content["configurations"]["2d"]["diffusion"] = {"presegmentor_architecture": {"network_class_name": "os.system"}}
    with pytest.raises(ValueError, match="os.system"):
        refuse_foreign_classes(content, tmp_path / "plans.json", trust=False)


def test_what_is_missing_is_named(model):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint_final.pth of fold 1, 2; .*one: 0"):
        read_model(model, [0, 1, 2], NAME, trust=False)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        read_model(model / "other", [0], NAME, trust=False)
    (model / "plans.json").write_text("{")
    with pytest.raises(ValueError, match=r"plans\.json is damaged"):
        read_model(model, [0], NAME, trust=False)
    (model / "plans.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"plans\.json is missing"):
        read_model(model, [0], NAME, trust=False)


def test_stock_model_is_refused_with_the_right_command(model):
    stock = checkpoint()
    del stock["diffusion"]
    torch.save(stock, model / "fold_0" / NAME)
    with pytest.raises(ValueError, match="nnUNetv2_predict"):
        read_model(model, [0], NAME, trust=False)


def zipped(model, path, *, extra=None, whole=False):
    with zipfile.ZipFile(path, "w") as content:
        for file in (model.parent if whole else model).rglob("*"):
            if file.is_file():
                content.write(file, file.relative_to(model.parents[1]))
        if extra:
            content.writestr(extra, "x")
    return path


def test_zip_is_installed_once(model, tmp_path):
    path = zipped(model, tmp_path / "model.zip")
    (installed,) = install(path, tmp_path / "results")
    assert read_model(installed, [0], NAME, trust=False).folds == ["0"]
    with pytest.raises(CommandError, match="there already"):
        install(path, tmp_path / "results")


def test_what_nnunet_exports_beside_the_models_is_installed_too(model, tmp_path, capsys):
    (model.parent / "inference_information.json").write_text("{}")
    ensemble = model.parent / "ensembles" / "ensemble___a___b___0"
    ensemble.mkdir(parents=True)
    (ensemble / "postprocessing.pkl").write_bytes(b"steps")
    results = tmp_path / "results"
    kept = results / model.parent.name / "inference_information.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    install(zipped(model, tmp_path / "model.zip", whole=True), results)
    place = results / ensemble.relative_to(model.parents[1]) / "postprocessing.pkl"
    assert place.read_bytes() == b"steps"
    assert kept.read_text() == "mine" and f"{kept} is there already" in capsys.readouterr().out


def test_files_of_models_that_are_there_already_are_not_added_to(model, tmp_path):
    name = f"{model.parent.name}/DiffusionTrainer__mine__2d/fold_1/checkpoint_final.pth"
    with pytest.raises(CommandError, match="belongs to no model with plans in it"):
        install(zipped(model, tmp_path / "model.zip", extra=name), tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize("trust", [False, True])
def test_model_of_nnunets_own_is_refused_with_its_command(model, tmp_path, trust):
    stock = checkpoint()
    del stock["diffusion"]
    torch.save(stock, model / "fold_0" / NAME)
    with pytest.raises(CommandError, match="nnUNetv2_install_pretrained_model_from_zip installs it"):
        install(zipped(model, tmp_path / "model.zip"), tmp_path / "results", trust=trust)


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "Dataset001_A/../../x", "..\\x", "C:\\x"])
def test_zip_with_names_outside_its_folder_is_refused(model, tmp_path, name):
    path = zipped(model, tmp_path / "model.zip", extra=name)
    with pytest.raises(CommandError, match="outside"):
        install(path, tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def test_zip_with_a_bomb_or_foreign_plans_is_not_installed(model, tmp_path):
    trace = str(tmp_path / "exploded")
    torch.save(checkpoint(more=Bomb(trace)), model / "fold_0" / NAME)
    with pytest.raises(CommandError, match="more than tensors"):
        install(zipped(model, tmp_path / "a.zip"), tmp_path / "results")
    torch.save(checkpoint(), model / "fold_0" / NAME)
    (model / "plans.json").write_text(json.dumps(plans(network_class_name="os.system")))
    with pytest.raises(CommandError, match="os.system"):
        install(zipped(model, tmp_path / "b.zip"), tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())
    assert not os.path.exists(trace)


def test_other_files_are_no_model(tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    with pytest.raises(CommandError, match="no zip file"):
        install(tmp_path / "a.zip", tmp_path / "results")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as content:
        content.writestr("readme.txt", "x")
    with pytest.raises(CommandError, match="holds no model"):
        install(tmp_path / "b.zip", tmp_path / "results")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("plans.json", "{}", "'configurations' is missing"),
        ("plans.json", '{"configurations": {"2d": "text"}}', "configuration '2d' is text"),
        ("dataset.json", "{}", "'labels' is missing"),
    ],
)
def test_damaged_descriptions_are_named_and_not_installed(model, tmp_path, file, content, reason):
    (model / file).write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_model(model, None, NAME, trust=False)
    with pytest.raises(CommandError, match=reason):
        install(zipped(model, tmp_path / "a.zip"), tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def test_checkpoint_without_what_nnunet_saves_is_refused(model):
    damaged = checkpoint()
    del damaged["init_args"]
    torch.save(damaged, model / "fold_0" / NAME)
    with pytest.raises(ValueError, match="no checkpoint of nnU-Net's: it has no 'init_args'"):
        read_model(model, None, NAME, trust=False)


def test_damaged_zip_and_results_that_are_no_folder_are_named(model, tmp_path):
    path = zipped(model, tmp_path / "a.zip")
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="is no folder and cannot be made"):
        install(path, tmp_path / "file")
    content = bytearray(path.read_bytes())
    place = content.index(b"network_class_name")
    content[place : place + 4] = b"xxxx"
    path.write_bytes(content)
    with pytest.raises(CommandError, match="is damaged"):
        install(path, tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())
