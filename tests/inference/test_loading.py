"""Model folders that would run code when they are loaded, and others that are not whole."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.install import ASIDE, install, remove_abandoned
from nnunet_diffusion.inference.loading import read_model

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {"conv_op": "torch.nn.modules.conv.Conv2d", "dropout_op": None},
    "_kw_requires_import": ["conv_op", "dropout_op"],
}
HUB = {
    "network_class_name": "torch.hub.load",
    "arch_kwargs": {"repo_or_dir": "/some/folder", "model": "net", "source": "local"},
    "_kw_requires_import": [],
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
    [{"network_class_name": "os.system"}, {"arch_kwargs": {"conv_op": "torch.hub.load"}, "_kw_requires_import": []}],
)
def test_plans_that_name_anything_but_network_classes_are_refused(model, changes):
    (model / "plans.json").write_text(json.dumps(plans(**changes)))
    with pytest.raises(ValueError, match=r"plans\.json names .*trust_checkpoint"):
        read_model(model, None, NAME, trust=False)
    assert read_model(model, None, NAME, trust=True).plans == plans(**changes)


def test_plans_inside_a_checkpoint_are_judged_too(model):
    inside = {"configuration": "2d", "plans": plans()}
    inside["plans"]["configurations"]["2d"]["diffusion"] = {"presegmentor_architecture": HUB}
    torch.save(checkpoint(init_args=inside), model / "fold_0" / NAME)
    with pytest.raises(ValueError, match=rf"{NAME} names 'torch.hub.load' as network_class_name.*PACKAGE"):
        read_model(model, None, NAME, trust=False)


def test_what_is_missing_is_named(model):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint_final.pth of fold 1, 2\. Folds that have one: 0"):
        read_model(model, [0, 1, 2], NAME, trust=False)
    with pytest.raises(FileNotFoundError, match="model folder .* does not exist"):
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
    with pytest.raises(CommandError, match="exists already"):
        install(path, tmp_path / "results")


def test_what_nnunet_exports_beside_the_models_is_installed_too(model, tmp_path, capsys):
    (model.parent / "inference_information.json").write_text("{}")
    ensemble = model.parent / "ensembles" / "ensemble___a___b___0"
    ensemble.mkdir(parents=True)
    (ensemble / "postprocessing.pkl").write_bytes(pickle.dumps(([], [])))
    results = tmp_path / "results"
    kept = results / model.parent.name / "inference_information.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    install(zipped(model, tmp_path / "model.zip", whole=True), results)
    place = results / ensemble.relative_to(model.parents[1]) / "postprocessing.pkl"
    assert place.read_bytes() == pickle.dumps(([], []))
    assert kept.read_text() == "mine" and f"{kept} exists already" in capsys.readouterr().out


def test_files_of_models_that_are_there_already_are_not_added_to(model, tmp_path):
    name = f"{model.parent.name}/DiffusionTrainer__mine__2d/fold_1/checkpoint_final.pth"
    with pytest.raises(CommandError, match="neither in a model folder with plans nor"):
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
    with pytest.raises(CommandError, match="not a zip file"):
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
    with pytest.raises(ValueError, match="not a checkpoint of nnU-Net: it has no 'init_args'"):
        read_model(model, None, NAME, trust=False)


def test_damaged_zip_and_results_that_are_no_folder_are_named(model, tmp_path):
    path = zipped(model, tmp_path / "a.zip")
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="cannot be created or written"):
        install(path, tmp_path / "file")
    content = bytearray(path.read_bytes())
    place = content.index(b"network_class_name")
    content[place : place + 4] = b"xxxx"
    path.write_bytes(content)
    with pytest.raises(CommandError, match="is damaged"):
        install(path, tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def rewritten(path, target, **changes):
    """Copy a zip file entry by entry; `changes` may alter the entries' fields."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.infolist():
            copy.writestr(entry.filename, source.read(entry), **changes)
    return target


def assert_refused(path, results, reason):
    with pytest.raises(CommandError, match=reason) as error:
        install(path, results)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not list(results.iterdir())


def test_zip_that_grows_out_of_proportion_is_not_unpacked(model, tmp_path):
    with (model / "fold_0" / "huge.bin").open("wb") as file:
        file.truncate(150_000_000)
    path = rewritten(zipped(model, tmp_path / "a.zip"), tmp_path / "bomb.zip", compress_type=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    assert_refused(path, tmp_path / "results", "would expand to 150 MB, more than 10 times its size")


@pytest.mark.parametrize(
    ("bit", "field", "reason"), [(1, "flag_bits", "is encrypted"), (97, "compress_type", "compressed in a way")]
)
def test_encrypted_and_unknown_compression_are_named(model, tmp_path, bit, field, reason):
    path = zipped(model, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    # offsets of the fields in the headers of an entry and of its line in the directory (PKWARE's APPNOTE 4.3.7 and 4.3.12)
    local, central = {"flag_bits": (6, 8), "compress_type": (8, 10)}[field]
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        for found in re.finditer(re.escape(signature), bytes(content)):
            content[found.start() + offset] = bit
    path.write_bytes(content)
    assert_refused(path, tmp_path / "results", reason)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"configurations": ' + "1" * 5000 + "}", '{"configurations": {"2d": {"architecture": 1}}}']
)
def test_malformed_plans_in_a_zip_are_named(model, tmp_path, text):
    (model / "plans.json").write_text(text)
    assert_refused(zipped(model, tmp_path / "a.zip"), tmp_path / "results", r"plans\.json")


def test_pickle_beside_a_model_may_be_nnunets_postprocessing_only(model, tmp_path):
    from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

    folder = model / "crossval_results_folds_0"
    folder.mkdir()
    steps = [remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": (1, 2)}]
    (folder / "postprocessing.pkl").write_bytes(pickle.dumps(steps))
    (installed,) = install(zipped(model, tmp_path / "good.zip"), tmp_path / "good")
    assert (installed / folder.name / "postprocessing.pkl").is_file()
    trace = str(tmp_path / "exploded")
    (folder / "postprocessing.pkl").write_bytes(pickle.dumps(([Bomb(trace)], [{}])))
    path = zipped(model, tmp_path / "bad.zip")
    assert_refused(path, tmp_path / "results", r"postprocessing\.pkl.*mkdir.*could run code")
    assert install(path, tmp_path / "results", trust=True)
    assert not os.path.exists(trace)


HELD = """
import sys, time
from pathlib import Path
from nnunet_diffusion.cli import install
install._check_model = lambda *_: (print("unpacked", flush=True), time.sleep(60))
install.install(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGKILL])
def test_killed_installation_leaves_nothing_behind(model, tmp_path, which):
    results = tmp_path / "results"
    words = [sys.executable, "-c", HELD, str(zipped(model, tmp_path / "a.zip")), str(results)]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "unpacked\n"
    remove_abandoned(results)  # it lives: another installation leaves its files alone
    assert any(path.is_dir() for path in results.glob(f"{ASIDE}*"))
    job.send_signal(which)
    assert job.wait() == (143 if which == signal.SIGTERM else -signal.SIGKILL)
    if which == signal.SIGKILL:  # nobody could tidy up: the next installation does
        install(zipped(model, tmp_path / "b.zip"), results)
        assert [path.name for path in results.iterdir()] == [model.parent.name]
    else:
        assert not list(results.iterdir())
