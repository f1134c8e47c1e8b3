"""Checkpoints: what is damaged, foreign or dangerous is refused by name, and a failed write costs nothing."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training.checkpoints import read_checkpoint, remove_what_killed_jobs_left, write_checkpoint

pytestmark = pytest.mark.nnunet
CHECKPOINT = {"network_weights": {"layer.weight": torch.arange(1000.0)}, "logging": {"dice": [np.float32(0.5), 0.25]}}


class Foreign:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_written_is_read_again_with_the_numpy_scalars_of_the_curves(tmp_path):
    write_checkpoint(CHECKPOINT, tmp_path / "a.pth")
    found = read_checkpoint(str(tmp_path / "a.pth"))
    assert torch.equal(found["network_weights"]["layer.weight"], CHECKPOINT["network_weights"]["layer.weight"])
    assert found["logging"] == CHECKPOINT["logging"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])  # of numpy 1 and 2
def test_what_another_numpy_wrote_is_read(tmp_path, package):
    write_checkpoint(CHECKPOINT, tmp_path / "here.pth")
    here = f"{np.float32(0).__reduce__()[0].__module__}\n".encode()
    with zipfile.ZipFile(tmp_path / "here.pth") as source, zipfile.ZipFile(tmp_path / "there.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert here in content
                content = content.replace(here, f"{package}.multiarray\n".encode())
            target.writestr(name, content)
    assert read_checkpoint(tmp_path / "there.pth")["logging"] == CHECKPOINT["logging"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth.*Train first"):
        read_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize("damage", ["empty", "half", "last bytes", "zeros", "text"])
def test_damaged_file_is_named_with_its_size_and_the_cure(tmp_path, damage):
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint(CHECKPOINT, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "last bytes": whole[:-10],
            "zeros": bytes(len(whole)),
            "text": b"<html>404: not found</html>",
        }[damage]
    )
    with pytest.raises(
        ValueError, match=rf"checkpoint_latest\.pth \({path.stat().st_size} bytes\) is truncated.*Remove"
    ):
        read_checkpoint(path)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    made = tmp_path / "made_by_the_file"
    torch.save({**CHECKPOINT, "init_args": Foreign(made)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "a.pth")
    assert not made.exists()
    with (tmp_path / "b.pth").open("wb") as file:
        pickle.dump(Foreign(made), file)
    with pytest.raises(ValueError, match=r"b\.pth"):
        read_checkpoint(tmp_path / "b.pth")
    assert not made.exists()


def test_something_else_saved_by_torch_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no 'network_weights'"):
        read_checkpoint(tmp_path / "a.pth")


def saved_then_broken_off(folder, monkeypatch, error):
    """Write a checkpoint, have the next write end by `error` half way; return the checkpoint's path and bytes."""
    path = folder / "checkpoint_latest.pth"
    write_checkpoint(CHECKPOINT, path)
    before = path.read_bytes()

    def half(checkpoint, file):
        with open(file, "wb") as opened:
            opened.write(before[:100])
        raise error

    monkeypatch.setattr(torch, "save", half)
    return path, before


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # torch's own writer raises the latter on a full disk
def test_failed_write_leaves_the_previous_file_whole_and_nothing_else(tmp_path, monkeypatch, kind):
    path, before = saved_then_broken_off(tmp_path, monkeypatch, kind("No space left on device"))
    with pytest.raises(OSError, match=r"checkpoint_latest\.pth: No space left.*is kept.*--c"):
        write_checkpoint(CHECKPOINT, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_job_killed_while_writing_left_is_removed_once_it_is_old(tmp_path):
    names = (".checkpoint_latest.pth.77.tmp", ".checkpoint_best.pth.78.tmp", "checkpoint_latest.pth")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / names[1]).touch()
    gone = tmp_path / ".checkpoint_latest.pth.79.tmp"  # to another rank, between being listed and being looked at
    gone.symlink_to(tmp_path / "nowhere")
    remove_what_killed_jobs_left(tmp_path)
    gone.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_trainer_writes_its_checkpoint_that_way(workplace, tmp_path, monkeypatch):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()

    def half(checkpoint, file):
        with open(file, "wb") as opened:
            opened.write(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="is kept"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def nnunet_checkpoint(workplace, tmp_path):
    trainer = workplace.trainer(nnUNetTrainer)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    return tmp_path / "checkpoint_final.pth"


def test_checkpoint_of_nnunet_is_refused_by_the_diffusion_trainer(workplace, nnunet_checkpoint):
    trainer = workplace.trainer(DiffusionTrainer)
    with pytest.raises(ValueError, match=r"checkpoint_final\.pth is a checkpoint of nnUNetTrainer.*plans_name"):
        trainer.load_checkpoint(str(nnunet_checkpoint))
    with pytest.raises(ValueError, match="given dictionary is a checkpoint of nnUNetTrainer"):
        trainer.load_checkpoint(read_checkpoint(nnunet_checkpoint))


def test_checkpoint_of_another_width_is_refused_with_the_tensor_and_both_shapes(workplace, tmp_path):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "a.pth"))
    weights = read_checkpoint(tmp_path / "a.pth")["network_weights"]
    wider = workplace.trainer(DiffusionTrainer, features_per_stage=[16, 16, 16])
    wider.initialize()
    before = {key: value.clone() for key, value in wider.network.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"first denoiser\.\S+ \(shape \(64, 32\).*\(128, 64\).*plans\.json that was written"
    ):
        wider.network.load_state_dict(weights)  # as nnU-Net's predictor does
    assert all(torch.equal(value, before[key]) for key, value in wider.network.state_dict().items())
    with pytest.raises(ValueError, match=r"1 of \d+ tensors differ, first (\S+) \(shape none"):
        trainer.network.load_state_dict(dict(list(weights.items())[1:]))


def test_plans_changed_since_are_refused_on_resuming_with_the_tensor_and_both_shapes(workplace, tmp_path):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "a.pth"))

    def wider(plans):
        plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [12, 12, 24]

    with pytest.raises(ValueError, match=r"presegmentor\.\S+ \(shape \(8,.*\(12,"):
        workplace.trainer(DiffusionTrainer, change=wider).load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("plans", "dataset_name"), "Dataset001_Brain", "a.pth is of dataset Dataset001_Brain, this.*Dataset004"),
        (
            ("configuration",),
            "3d_fullres",
            "a.pth is of configuration 3d_fullres, this training is of configuration 2d",
        ),
        (("fold",), 3, "a.pth is of fold 3, this training is of fold 0"),
    ],
)
def test_checkpoint_of_another_training_is_refused_by_what_differs(workplace, tmp_path, place, value, message):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "a.pth"))
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    section = checkpoint["init_args"]
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        workplace.trainer(DiffusionTrainer).load_checkpoint(tmp_path / "a.pth")


def test_checkpoint_is_accepted_as_text_path_and_dictionary(workplace, tmp_path):
    trainer = workplace.trainer(DiffusionTrainer, seed=5)
    trainer.initialize()
    path = tmp_path / "a.pth"
    trainer.save_checkpoint(str(path))
    for source in (str(path), path, read_checkpoint(path)):
        loaded = workplace.trainer(DiffusionTrainer)
        loaded.load_checkpoint(source)
        assert loaded.settings.seed == 5
        theirs = trainer.network.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in loaded.network.state_dict().items())


def test_disabled_checkpointing_writes_nothing(workplace, tmp_path):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "a.pth"))
    assert not (tmp_path / "a.pth").exists()


@pytest.fixture
def hub(tmp_path):
    """An architecture that runs a stranger's code when it is built; yields it and checks that the code has not run."""
    (tmp_path / "repository").mkdir()
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\ndef net(**_): pass\n"
    (tmp_path / "repository" / "hubconf.py").write_text(code)
    keywords = {"repo_or_dir": str(tmp_path / "repository"), "model": "net", "source": "local"}
    yield {"network_class_name": "torch.hub.load", "arch_kwargs": keywords, "_kw_requires_import": []}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["presegmentor", "before version 3", "architecture"])
def test_code_in_the_plans_of_a_checkpoint_does_not_run_on_resuming(workplace, tmp_path, hub, place):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "a.pth"))
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    section = checkpoint["init_args"]["plans"]["configurations"]["2d"]
    if place == "architecture":
        section["architecture"] = hub
    elif place == "presegmentor":
        section["diffusion"]["presegmentor"]["architecture"] = hub
    else:
        section["diffusion"] = {"presegmentor_architecture": hub}
    torch.save(checkpoint, tmp_path / "a.pth")
    for source, name in ((tmp_path / "a.pth", "a.pth"), (checkpoint, "The given dictionary")):
        with pytest.raises(ValueError, match=f"{name} names 'torch.hub.load' as network_class_name"):
            workplace.trainer(DiffusionTrainer).load_checkpoint(source)


def test_code_in_the_plans_of_a_training_does_not_run(workplace, hub):
    def change(plans):
        plans["configurations"]["2d"]["architecture"] = hub

    with pytest.raises(ValueError, match=r"Tiny\.json names 'torch.hub.load'"):
        workplace.trainer(DiffusionTrainer, change=change)


PICKLES = {
    "arguments are missing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "unknown instruction": b"\x80\x02}q\x00(X\x01\x00\x00\x00ak\x01u.",
    "cut off": b"\x80\x02}",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_malformed_pickles_are_one_sentence(tmp_path, kind):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": PICKLES[kind], "version": b"3", "byteorder": b"little"}.items():
            archive.writestr(f"a/{name}", content)
    with pytest.raises(ValueError, match=r"^Checkpoint .*a\.pth .*[.]$") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_compressed_checkpoint_is_not_unpacked(tmp_path):
    torch.save({"network_weights": {"a": torch.zeros(10_000_000)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as copy:
        for entry in source.infolist():
            copy.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pth").stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=r"b\.pth is not read: it holds compressed records"):
        read_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("version", "safe"), [("2.5.1", False), ("2.9.1+cu128", False), ("2.10.0", True), ("3.0", True)]
)
def test_torch_that_checkpoints_can_break_reads_none(tmp_path, monkeypatch, version, safe):
    torch.save({"network_weights": {}}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        assert read_checkpoint(tmp_path / "a.pth") == {"network_weights": {}}
        return
    with pytest.raises(ValueError, match=rf"a\.pth is not read: torch {re.escape(version)}.*torch>=2.10"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_write_that_a_signal_ends_leaves_nothing(tmp_path, monkeypatch, stop):
    path, before = saved_then_broken_off(tmp_path, monkeypatch, stop())
    with pytest.raises(stop):
        write_checkpoint(CHECKPOINT, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def renamed(source, target):
        events.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_checkpoint(CHECKPOINT, tmp_path / "a.pth")
    (first, aside), *rest = events
    assert first == "sync" and aside.name.startswith(".a.pth") and aside.parent == tmp_path
    assert rest == [("rename", tmp_path / "a.pth"), ("sync", tmp_path)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_network_that_is_not_finite_replaces_no_good_checkpoint(workplace, tmp_path, value):
    trainer = workplace.trainer(DiffusionTrainer)
    trainer.initialize()
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()
    with torch.no_grad():
        next(trainer.learners["denoiser"].average.module.parameters()).view(-1)[0] = value
    with pytest.raises(
        FloatingPointError, match=r"checkpoint_latest.pth was not written: the network's denoiser\..*kept"
    ):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.pth")) == [path]
