"""Files that several jobs write."""

import threading

import pytest

from nnunet_diffusion.training import checks
from nnunet_diffusion.training.checks import read_shared_json


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
