"""Folders of unfinished files: removed when their run is dead, never under a living one, wherever that runs."""

import subprocess
import sys
import time

import pytest

from nnunet_diffusion.inference.staging import UNFINISHED, remove_abandoned, staging_folders

RUN = """
import pathlib, sys, time
from nnunet_diffusion.inference.staging import staging_folders
with staging_folders([pathlib.Path(sys.argv[1])]) as stages:
    (next(iter(stages.values())) / "case.nii.gz").write_bytes(b"half")
    print("made", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path):
    """Another run that is writing into the folder."""
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    yield process
    process.kill()
    process.wait()


def unfinished(folder):
    return sorted(path.name for path in folder.glob(f"{UNFINISHED}*"))


def test_a_living_runs_folder_stays_and_a_killed_ones_goes(run, tmp_path):
    before = unfinished(tmp_path)
    assert len(before) == 2  # with its lock
    remove_abandoned(tmp_path)
    with staging_folders([tmp_path]) as stages:
        assert len(unfinished(tmp_path)) == 4
        assert list(stages[tmp_path].iterdir()) == []
    assert unfinished(tmp_path) == before
    assert len(list((tmp_path / before[0]).iterdir())) == 1
    run.kill()
    run.wait()
    remove_abandoned(tmp_path)
    assert unfinished(tmp_path) == []


def test_a_folder_without_a_lock_is_abandoned_whatever_its_name_and_age(tmp_path):
    for name in ("1_here_x", "abc"):
        (tmp_path / f"{UNFINISHED}{name}").mkdir()
        (tmp_path / f"{UNFINISHED}{name}" / "case.nii.gz").touch()
    (tmp_path / f"{UNFINISHED}lost.lock").touch()
    (tmp_path / "case.nii.gz").touch()
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["case.nii.gz"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging_folders([tmp_path / "a", tmp_path / "b"]) as stages:
        assert len(stages) == 2
        raise KeyboardInterrupt
    assert [list((tmp_path / name).iterdir()) for name in "ab"] == [[], []]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out is a file: give a folder"), staging_folders([tmp_path / "out"]):
        pass


def test_many_runs_begin_at_once(tmp_path):
    """Each looks for abandoned folders while others make theirs, and takes none of them."""
    words = [sys.executable, "-c", RUN.replace("600", "2"), str(tmp_path)]
    runs = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for each in runs:
        assert each.stdout.readline() == "made\n"
    held = [path for path in tmp_path.glob(f"{UNFINISHED}*") if path.is_dir()]
    assert all(len(list(path.iterdir())) == 1 for path in held)
    begin = time.monotonic()
    assert [each.wait() for each in runs] == [0] * 4
    assert time.monotonic() - begin < 60
    assert unfinished(tmp_path) == []
