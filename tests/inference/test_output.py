"""Files of a case: there as a whole or not at all, on the disk before they have their names, removed together."""

import os
import shutil
from pathlib import Path

import pytest

from nnunet_diffusion.inference import output
from nnunet_diffusion.inference.output import PredictedCase, remove_case, write_case

MANAGERS = (None, None, {"file_ending": ".nii.gz"})
FILES = ("a.npz", "a.pkl", "reports/a.json", "samples/one/a.nii.gz", "a.nii.gz")


def write_all(folder, names=FILES):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes case `a`, with files of no content in the place of nnU-Net's."""
    stage = tmp_path / "stage"
    stage.mkdir()
    monkeypatch.setattr(output, "_write_all", lambda case, folder, *_: write_all(folder))
    case = PredictedCase("a", str(tmp_path / "out" / "a"), None, None, {})

    def write():
        write_case(case, MANAGERS, True, {tmp_path / "out": stage})

    (tmp_path / "out").mkdir()
    yield write, tmp_path / "out"
    assert list(stage.iterdir()) == []


def test_every_file_is_on_the_disk_before_it_has_its_name_and_the_mask_is_last(written, monkeypatch):
    write, folder = written
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("disk", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(("name", Path(new).name)), replace(old, new)))
    write()
    assert files_in(folder) == sorted(FILES)
    named = [name for kind, name in events if kind == "name"]
    assert sorted(named) == sorted(Path(name).name for name in FILES)
    for name in set(named):
        assert events.index(("disk", name)) < events.index(("name", name))
    mask = len(events) - 1 - events[::-1].index(("name", "a.nii.gz"))
    assert max(index for index, (kind, _) in enumerate(events) if kind == "name") == mask
    assert {name for kind, name in events[:mask] if kind == "disk"} >= {"reports", "one", "out"}
    assert events[mask + 1 :] == [("disk", "out")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", range(len(FILES)))
def test_a_case_that_is_not_whole_has_no_file(written, monkeypatch, error, number):
    write, folder = written
    write_all(folder, ("b.nii.gz", "samples/one/b.nii.gz"))
    kept, calls, replace = files_in(folder), [], os.replace

    def failing(old, new):
        calls.append(new)
        if len(calls) > number:
            raise error
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    text = "a.nii.gz could not be written .No space left on device.: .*--continue_prediction"
    with pytest.raises(type(error), match=text if isinstance(error, OSError) else None):
        write()
    assert files_in(folder) == kept


def test_all_files_of_a_case_go_and_none_of_another(tmp_path):
    write_all(tmp_path, (*FILES, "samples/two/a.nii.gz", "aa.nii.gz", "samples/one/aa.nii.gz", "reports/aa.json"))
    remove_case(tmp_path / "a", ".nii.gz")
    assert files_in(tmp_path) == ["aa.nii.gz", "reports/aa.json", "samples/one/aa.nii.gz"]
    assert not (tmp_path / "samples" / "two").exists()
    remove_case(tmp_path / "aa", ".nii.gz")
    assert not (tmp_path / "samples").exists()
    shutil.rmtree(tmp_path / "reports")
    remove_case(tmp_path / "aa", ".nii.gz")  # of a folder without any of them
