"""The graph of a cross-validation, and what of it is left: pure functions of names and files."""

from pathlib import Path

import pytest

from nnunet_diffusion.cluster.graph import Request, Task, tasks_of
from nnunet_diffusion.cluster.state import BLOCKED, DONE, FAILED, RUNNING, TO_DO, WAITING, State, estimate

FIRST = {"HiDiffTrainer_5epochs": "nnUNetTrainer_5epochs", "DiffusionTrainer": "nnUNetTrainer"}


def request(tmp_path, **changes):
    usual = {
        "dataset": "Dataset004_Hippocampus", "configurations": ["2d"], "trainers": ["nnUNetTrainer", "DiffusionTrainer"],
        "plans": "P", "folds": [0, 1, 2, 3, 4], "device": "cuda", "gpus": 1, "npz": False, "results": tmp_path,
        "truth": Path("truth"), "output": Path("out"), "preparation": [],
        "first_network": lambda trainer, configuration: FIRST.get(trainer),
    }  # fmt: skip
    return Request(**{**usual, **changes})


def named(tasks):
    return {task.name: task for task in tasks}


def test_networks_that_others_start_from_come_first_and_once(tmp_path):
    tasks = tasks_of(
        request(tmp_path, trainers=["DiffusionTrainer", "nnUNetTrainer", "HiDiffTrainer_5epochs"], folds=[1])
    )
    assert [task.name for task in tasks] == [
        "nnUNetTrainer__2d__fold_1", "DiffusionTrainer__2d__fold_1", "nnUNetTrainer_5epochs__2d__fold_1",
        "HiDiffTrainer_5epochs__2d__fold_1", "find_best", "compare__nnUNetTrainer__2d", "compare__HiDiffTrainer_5epochs__2d",
    ]  # fmt: skip
    found = named(tasks)
    assert found["DiffusionTrainer__2d__fold_1"].needs == ("nnUNetTrainer__2d__fold_1",)
    assert set(found["find_best"].needs) == {name for name in found if "fold" in name} - {
        "nnUNetTrainer_5epochs__2d__fold_1"
    }
    for place, task in enumerate(tasks):
        assert set(task.needs) <= {before.name for before in tasks[:place]}


def test_commands(tmp_path):
    found = named(tasks_of(request(tmp_path, gpus=2, npz=True)))
    assert found["DiffusionTrainer__2d__fold_3"].command == (
        "nnunet_diffusion train 4 2d 3 -tr DiffusionTrainer -p P -device cuda --c -num_gpus 2 --npz"
    )
    assert found["find_best"].command == (
        "nnUNetv2_find_best_configuration Dataset004_Hippocampus -p P -c 2d -tr nnUNetTrainer DiffusionTrainer -f 0 1 2 3 4"
    )
    folds = "crossval_results_folds_0_1_2_3_4"
    both = [tmp_path / f"{name}__P__2d" / folds for name in ("nnUNetTrainer", "DiffusionTrainer")]
    assert found["compare__DiffusionTrainer__2d"].command == (
        f"nnunet_diffusion evaluate -p {both[0]} -p {both[1]} -g truth -o out/compare__DiffusionTrainer__2d"
    )
    few = named(tasks_of(request(tmp_path, trainers=["nnUNetTrainer"], folds=[0])))
    assert few["find_best"].words[-1] == "--disable_ensembling"
    assert few["evaluate__nnUNetTrainer__2d"].words[-1] == "--chill"


def test_preparation_goes_before_all_trainings(tmp_path):
    tasks = tasks_of(request(tmp_path, preparation=[["fingerprint"], ["plan"]], folds=[0]))
    assert [task.needs for task in tasks[:4]] == [
        (), ("prepare_1",), ("prepare_2",), ("prepare_2", "nnUNetTrainer__2d__fold_0"),
    ]  # fmt: skip


def test_the_second_stage_of_a_cascade_needs_all_folds_of_the_first(tmp_path):
    found = named(
        tasks_of(request(tmp_path, trainers=["DiffusionTrainer"], configurations=["3d_cascade_fullres"], folds=[0]))
    )
    low = {f"nnUNetTrainer__3d_lowres__fold_{fold}" for fold in range(5)}
    first = "nnUNetTrainer__3d_cascade_fullres__fold_0"
    assert set(found["DiffusionTrainer__3d_cascade_fullres__fold_0"].needs) == {*low, first}
    assert set(found[first].needs) == low


@pytest.fixture
def state(tmp_path):
    """Of two folds of one trainer, in a file that was written and read."""
    found = State(tmp_path / "crossval")
    found.folder.mkdir()
    found.tasks = tasks_of(request(tmp_path, trainers=["nnUNetTrainer"], folds=[0, 1]))
    found.write()
    return State(found.folder).read()


def finish(task):
    for path in map(Path, task.proof):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_states_follow_from_files_markers_and_jobs(state):
    zero, one, best, last = state.tasks
    finish(zero)
    assert state.states((), ()) == {zero.name: DONE, one.name: TO_DO, best.name: TO_DO, last.name: TO_DO}
    state.jobs = {zero.name: "7", one.name: "8", best.name: "9", last.name: "10"}
    assert state.states({one.name, best.name}, {one.name})[best.name] == WAITING
    assert state.states({one.name, best.name}, {one.name})[one.name] == RUNNING
    state.log(one.name).parent.mkdir()
    state.log(one.name).write_text("first\n" + "more\n" * 100 + "the cause\n")
    states = state.states((), ())
    assert [states[task.name] for task in state.tasks] == [DONE, FAILED, BLOCKED, BLOCKED]
    told = state.failures(states)
    assert told.startswith(f"{one.name} failed. The end of") and told.endswith("the cause") and "first" not in told
    state.write()
    assert zero.name not in State(state.folder).read().jobs
    assert "failed" in state.table(states)


def test_what_needs_an_unfinished_task_is_unfinished_too(state):
    for task in state.tasks:
        finish(task)
        state.marker(task.name).parent.mkdir(exist_ok=True)
        state.marker(task.name).write_text(task.command)
    assert state.unfinished() == []
    Path(state.tasks[1].proof[0]).unlink()
    assert state.unfinished() == state.tasks[1:]
    state.marker("find_best").write_text("another command")
    finish(state.tasks[1])
    assert state.unfinished() == state.tasks[2:]


def test_a_damaged_file_is_named_with_the_cure(state):
    (state.folder / "crossval.json").write_text("{")
    with pytest.raises(ValueError, match=r"crossval.json is damaged.*remove it"):
        State(state.folder).read()


def test_hours_are_those_of_logged_epochs_or_unknown(tmp_path):
    proof = tuple(
        str(tmp_path / "model" / "fold_0" / name) for name in ("checkpoint_final.pth", "validation/summary.json")
    )
    task = Task("one", ("train",), (), proof, epochs=10)
    assert "hours unknown" in estimate([task])
    other = tmp_path / "model" / "fold_1"
    other.mkdir(parents=True)
    (other / "training_log_1.txt").write_text("Epoch time: 300.0 s\nEpoch time: 400.0 s\nEpoch time: 360.0 s\n")
    unknown = Task("two", ("train",), (), proof)
    assert (
        estimate([task, Task("no", ("x",))]) == "1 of 1 trainings: 1.0 hours one after the other, without validation."
    )
    assert "1 unknown" in estimate([task, unknown])
    (other / "checkpoint_final.pth").touch()
    assert estimate([unknown]).startswith("1 of 1 trainings: 0.3 hours")
    assert estimate([]) == "No training is left."
