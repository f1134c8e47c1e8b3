"""`nnunet_diffusion doctor` in good and in broken environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from nnunet_diffusion.cli import doctor
from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.train import check_trainer
from nnunet_diffusion.cli.trainers_directory import VARIABLE, trainers_directory

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def good(tmp_path):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    return {name: str(tmp_path / name) for name in FOLDERS} | {VARIABLE: str(trainers_directory())}


def levels(findings) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def call(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    others = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    words = [sys.executable, "-m", "nnunet_diffusion.cli.main", "doctor"]
    return subprocess.run(words, env=others | variables, capture_output=True, text=True)


@pytest.mark.nnunet
def test_good_environment_is_ready(good):
    done = call(good)
    assert done.returncode == 0, done.stdout
    assert "FAIL" not in done.stdout and done.stdout.endswith("ready\n")
    assert "DiffusionTrainer found by nnU-Net" in done.stdout


@pytest.mark.nnunet
def test_bare_environment_fails_with_cures():
    done = call({})
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == [*FOLDERS, VARIABLE, "trainer"]
    assert done.stdout.splitlines()[-1] == "5 problems found"
    for name, line in zip(FOLDERS, failed, strict=False):
        assert f"export {name}=" in line
    assert all(doctor.SET_TRAINERS in line for line in failed[3:])
    assert "Traceback" not in done.stdout + done.stderr


def test_lines_are_aligned_and_name_the_cure():
    lines = [str(doctor.Finding("a", doctor.OK, "seen")), str(doctor.Finding("b", doctor.FAIL, "seen", "cure"))]
    assert [line.index("seen") for line in lines] == [28, 28]
    assert lines[1].endswith("seen; cure")


def test_folders(good, tmp_path):
    assert set(levels(doctor.check_folders(good)).values()) == {doctor.OK}
    broken = good | {"nnUNet_raw": str(tmp_path / "nowhere")}
    broken.pop("nnUNet_results")
    findings = {finding.name: finding for finding in doctor.check_folders(broken)}
    assert findings["nnUNet_raw"].level == doctor.FAIL and "mkdir -p" in findings["nnUNet_raw"].cure
    assert findings["nnUNet_raw"].seen.endswith("nowhere is not a folder")
    assert findings["nnUNet_results"].level == doctor.FAIL


def test_read_only_folder(good, monkeypatch):
    monkeypatch.setattr(doctor, "is_writable", lambda folder: False)
    raw, *others = doctor.check_folders(good)
    assert raw.level == doctor.WARN and "cannot be written" in raw.seen
    assert len(others) == 2
    assert all(finding.level == doctor.FAIL and "chmod u+w" in finding.cure for finding in others)


@pytest.mark.parametrize(("capability", "level"), [((7, 5), "WARN"), ((8, 0), "OK"), ((12, 0), "OK")])
def test_bfloat16_that_a_gpu_only_emulates_is_not_what_training_uses(monkeypatch, capability, level):
    cuda = pytest.importorskip("torch").cuda
    card = SimpleNamespace(name="card", total_memory=16e9)
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: capability)
    assert levels(doctor.check_device())["bfloat16"] == level


def test_search_path(good, tmp_path):
    def finding(value: str) -> doctor.Finding:
        return next(iter(doctor.check_search_path({VARIABLE: value})))

    assert finding(good[VARIABLE]).level == doctor.OK
    assert finding(os.pathsep.join([str(tmp_path), good[VARIABLE]])).level == doctor.OK
    assert finding("").cure == doctor.SET_TRAINERS
    assert finding(str(tmp_path)).level == doctor.FAIL
    missing = finding(os.pathsep.join([good[VARIABLE], "/nowhere"]))
    assert missing.level == doctor.WARN and "/nowhere" in missing.seen


@pytest.mark.parametrize(
    ("nnunet", "torch", "level"),
    [("2.8.0", "2.10.0", "OK"), ("2.8.1", "2.14.1+cpu", "OK"), ("2.7.9", "2.11.0", "FAIL"), ("2.8.0", "2.9.1", "FAIL")]
    + [("2.8.0", "2.5.1", "FAIL"), ("3.0", "3.0", "OK"), (None, "2.11.0", "FAIL")],
)
def test_versions(monkeypatch, nnunet, torch, level):
    def version(package: str) -> str:
        found = {"nnunetv2": nnunet, "torch": torch}[package]
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(doctor, "version", version)
    findings = list(doctor.check_versions())
    assert (doctor.FAIL in levels(findings).values()) == (level == "FAIL")
    assert all("pip install" in finding.cure for finding in findings if finding.level == doctor.FAIL)


def test_torchvision_of_another_build(monkeypatch):
    """A CPU build of torch beside torchvision for CUDA lacks the compiled operators."""
    torchvision = pytest.importorskip("torchvision")

    def nms(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    (finding,) = doctor.check_torchvision()
    assert finding.level == doctor.FAIL
    assert "torchvision::nms does not exist" in finding.seen and "pip install" in finding.cure


@pytest.mark.nnunet
def test_trainer_file_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "Broken.py").write_text("import nonexistent_package_of_the_user\n")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path), str(trainers_directory())]))
    (finding,) = doctor.check_trainer()
    assert finding.level == doctor.FAIL and "nonexistent_package_of_the_user" in finding.seen
    (tmp_path / "Broken.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (finding,) = doctor.check_trainer()
    assert finding.level == doctor.FAIL and "torchvision::nms" in finding.seen and VARIABLE in finding.cure
    with pytest.raises(CommandError, match="stopped with RuntimeError: operator torchvision::nms"):
        check_trainer("DiffusionTrainer")


def test_small_shared_memory(monkeypatch):
    usage = shutil.disk_usage("/")._replace(total=64 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    (finding,) = doctor.check_shared_memory()
    assert finding.level in (doctor.WARN, doctor.OK)
    if os.path.isdir("/dev/shm"):
        assert "--shm-size" in finding.cure


def test_a_check_that_breaks_is_a_finding(good, monkeypatch):
    def broken():
        raise OSError("libcudart.so: cannot open shared object file\nmore")
        yield

    monkeypatch.setattr(doctor, "check_torchvision", broken)
    monkeypatch.setattr(doctor, "check_trainer", lambda: iter(()))
    findings = {finding.name: finding for finding in doctor.examine(good)}
    assert findings["torchvision"].level == doctor.FAIL
    assert "libcudart.so" in findings["torchvision"].seen and "more" not in findings["torchvision"].seen
    assert "/dev/shm" in findings, "the checks after it still run"
