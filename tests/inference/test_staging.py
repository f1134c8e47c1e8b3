"""Folders for unfinished files: removed once their run is dead, never under a living one, wherever that runs."""

import subprocess
import sys

import pytest

from nnunet_diffusion.inference.staging import UNFINISHED, remove_abandoned, staging_folders

RUN = """
import sys, time
from pathlib import Path
from nnunet_diffusion.inference.staging import staging_folders
with staging_folders([Path(sys.argv[1])]) as stages:
    (stages[Path(sys.argv[1])] / "case.nii.gz").write_text("half")
    print("staged", flush=True)
    time.sleep(60)
    assert (stages[Path(sys.argv[1])] / "case.nii.gz").exists()
"""


def test_only_what_dead_runs_left_is_removed(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "staged\n"
        (tmp_path / f"{UNFINISHED}123_somewhere_else").mkdir()  # of an earlier version: nobody holds its lock
        with staging_folders([tmp_path]) as stages:
            (living,) = tmp_path.glob(f"{UNFINISHED}*/case.nii.gz")
            assert stages[tmp_path] != living.parent
            assert not (tmp_path / f"{UNFINISHED}123_somewhere_else").exists()
        assert living.read_text() == "half"
    finally:
        job.kill()
        job.wait()
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match=f"{tmp_path / 'file'} is a file: give a folder"),
        staging_folders([tmp_path / "file"]),
    ):
        pass


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging_folders([tmp_path / "a", tmp_path / "b"]) as stages:
        assert len(stages) == 2
        raise KeyboardInterrupt
    assert [list((tmp_path / name).iterdir()) for name in "ab"] == [[], []]


def test_runs_that_begin_at_once_leave_each_other_alone(tmp_path):
    """Each looks for abandoned folders while the others make theirs."""
    words = [sys.executable, "-c", RUN.replace("sleep(60)", "sleep(2)"), str(tmp_path)]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [job.communicate()[0] for job in jobs] == ["staged\n"] * 4
    assert [job.returncode for job in jobs] == [0] * 4
    assert not list(tmp_path.iterdir())
