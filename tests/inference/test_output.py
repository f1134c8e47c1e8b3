"""Files of a case: there as a whole or not at all, and gone as a whole."""

import os

import pytest

from nnunet_diffusion.inference import output
from nnunet_diffusion.inference.output import PredictedCase, remove_case, write_case

FILES = (
    "a.nii.gz",
    "a.npz",
    "a.pkl",
    "reports/a.json",
    "samples/fold_0_sample_0/a.nii.gz",
    "samples/fold_0_sample_1/a.nii.gz",
    "uncertainty/a.json",
    "uncertainty/a_agreement.nii.gz",
    "uncertainty/a_entropy.nii.gz",
)


def made(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_files_of_a_case_are_removed_and_none_of_another(tmp_path):
    others = ["ab.nii.gz", "reports/ab.json", "samples/fold_0_sample_0/ab.nii.gz", "plans.json"]
    others += ["uncertainty/a_entropy.json", "uncertainty/a_entropy_entropy.nii.gz"]  # of a case of that name
    made(tmp_path, [*FILES, *others])
    remove_case(tmp_path / "a", ".nii.gz")
    assert files_in(tmp_path) == sorted(others)
    assert not (tmp_path / "samples" / "fold_0_sample_1").exists()
    remove_case(tmp_path / "a", ".nii.gz")  # nothing is there


@pytest.fixture
def writing(tmp_path, monkeypatch):
    """Writes the case `a` whose files are made without nnU-Net."""
    stage = tmp_path / ".stage"
    stage.mkdir()
    monkeypatch.setattr(output, "_write_all", lambda case, folder, *_: made(folder, FILES))
    case = PredictedCase("a", str(tmp_path / "a"), None, None, {})
    return lambda: write_case(case, (None, None, {"file_ending": ".nii.gz"}), False, {tmp_path: stage})


def test_case_is_renamed_into_place_its_segmentation_last_and_on_the_disk(tmp_path, monkeypatch, writing):
    events, replace, sync = [], os.replace, os.fsync

    def renamed(source, target):
        events.append(os.path.relpath(target, tmp_path))
        replace(source, target)

    def synced(descriptor):
        events.append(f"sync {os.path.relpath(os.readlink(f'/proc/self/fd/{descriptor}'), tmp_path)}")
        sync(descriptor)

    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    writing()
    assert files_in(tmp_path) == sorted(FILES)
    names = [event for event in events if not event.startswith("sync")]
    assert sorted(names) == sorted(FILES) and names[-1] == "a.nii.gz"
    assert {f"sync .stage/a/{name}" for name in FILES} <= set(events[: len(FILES)])
    assert events[-1] == "sync ." and "sync reports" in events


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_case_whose_writing_ends_in_between_has_no_file(tmp_path, monkeypatch, writing, error):
    replace, left = os.replace, [3]

    def renamed(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    made(tmp_path, ["a.nii.gz"])  # of a run before
    with pytest.raises((KeyboardInterrupt, OSError)) as raised:
        writing()
    assert files_in(tmp_path) == []
    if isinstance(error, OSError):
        assert f"{tmp_path / 'a.nii.gz'} could not be written (No space left on device)" in str(raised.value)
