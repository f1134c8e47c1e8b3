"""Files that several jobs write, and folders that are not there or cannot be written."""

import tempfile
import threading

import pytest

from nnunet_diffusion.training import checks
from nnunet_diffusion.training.checks import explained, read_shared_json, refuse_unusable_folders


def test_a_file_that_another_job_is_writing_is_read_once_it_is_whole(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text('{"configurations": {')
    timer = threading.Timer(0.3, path.write_text, ['{"configurations": {}}'])
    timer.start()
    assert read_shared_json(path) == {"configurations": {}}
    timer.join()


def test_a_damaged_file_is_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "PATIENCE_SECONDS", 0.2)
    path = tmp_path / "plans.json"
    path.write_text("")
    with pytest.raises(ValueError, match=r"plans.json is damaged .* Remove it"):
        read_shared_json(path)


def test_results_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file" / "results"))
    with pytest.raises(OSError, match=r"nnUNet_results is .*file/results, which cannot be written \(Not a directory"):
        refuse_unusable_folders()


def test_read_only_results_folder_is_named(tmp_path, monkeypatch):
    def read_only(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)  # root may write into folders that are read-only
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    with pytest.raises(OSError, match=r"results, which cannot be written \(Permission denied\): make it writable"):
        refuse_unusable_folders()


def test_only_errors_that_come_from_loading_are_explained(tmp_path):
    gone = explained(OSError("blosc2"), tmp_path / "nnUNetPlans_2d", 3)
    assert "nnUNetPlans_2d is missing" in str(gone)
    assert "from epoch 3 on" in str(gone)
    dead = RuntimeError("One or more background workers are no longer alive. Exiting.")
    assert "nnUNet_n_proc_DA" in str(explained(dead, tmp_path, 0))
    writing = RuntimeError("Some background workers are no longer alive")
    assert "nnUNet_def_n_proc" in str(explained(writing, tmp_path, 0))
    assert explained(RuntimeError("CUDA out of memory"), tmp_path, 0) is None
