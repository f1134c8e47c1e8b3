"""A task as a job: its log, its exit codes, and how it ends; several on this machine, in their order."""

import os
import pickle
import re
import signal
import sys
import threading
import time

import pytest

from nnunet_diffusion.cluster import running
from nnunet_diffusion.cluster.graph import Task
from nnunet_diffusion.cluster.running import ENDED, Run, run_here
from nnunet_diffusion.cluster.state import State

# as a training: ends with 143 on SIGTERM, and its worker, which inherits ignored signals, with it
TRAINING = """
import os, signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(*_):
    worker.kill(); worker.wait(); print("state kept", flush=True); os._exit(143)
signal.signal(signal.SIGTERM, end)
print("number", worker.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def state(tmp_path):
    return State(tmp_path)


def script(state, text, name="task", needs=()):
    task = Task(name, (sys.executable, "-c", text), needs)
    state.tasks.append(task)
    return task


def wait_for(state, line):
    """Wait until the log has a line that matches, and return the match; the first line is the command."""
    end = time.monotonic() + 20
    while not (found := re.search(f"^{line}$", state.log("task").read_text(), re.MULTILINE)):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_success_leaves_log_and_marker(state):
    task = script(state, "import os; print('out', os.environ['nnUNet_x'])")
    os.environ["nnUNet_x"] = "reached"  # noqa: SIM112 - nnU-Net's names
    try:
        job = pickle.loads(pickle.dumps(Run(task, state)))
    finally:
        del os.environ["nnUNet_x"]  # noqa: SIM112
    job()
    assert "out reached" in state.log("task").read_text() and task.command in state.log("task").read_text()
    assert state.is_done(task)


def test_failure_names_code_and_last_lines(state):
    task = script(state, "import sys; print('the cause', file=sys.stderr); sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"task ended with exit code 3:\n(.*\n)*the cause"):
        Run(task, state)()
    assert not state.is_done(task)


def test_checkpoint_ends_the_command_although_it_ignores_the_signal_of_the_preemption(state):
    """Inside a signal handler of the main thread that waits for the command, as submitit calls it."""
    job, handed = Run(script(state, TRAINING), state), []

    class Requeued(Exception):
        pass

    def preempted(*_):
        handed.append(job.checkpoint())
        raise Requeued

    def preempt():
        while not job.child:
            time.sleep(0.02)
        worker = int(wait_for(state, r"number (\d+)")[1])
        for pid in (worker, job.child):  # Slurm sends it to all
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.3)
        os.kill(worker, 0)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, preempted)
    thread = threading.Thread(target=preempt)
    thread.start()
    try:
        with pytest.raises(Requeued):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
        thread.join()
    assert state.log("task").read_text().endswith("state kept\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(wait_for(state, r"number (\d+)")[1]), 0)
    assert handed[0].function is job and job.child == 0


def test_a_command_that_does_not_end_is_killed(state, monkeypatch):
    monkeypatch.setattr(running, "END_SECONDS", 0.2)
    text = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    job = Run(script(state, text), state)
    job.start()
    wait_for(state, "on")
    began = time.monotonic()
    job.end()
    assert time.monotonic() - began < 10


def test_here_tasks_run_in_their_order_and_not_behind_a_failed_one(state):
    good = script(state, "pass", "good")
    bad = script(state, "raise SystemExit(5)", "bad")
    after_good = script(
        state, f"import os; assert os.path.exists({str(state.marker('good'))!r})", "after_good", ("good",)
    )
    after_bad = script(state, "pass", "after_bad", ("bad",))
    last = script(state, "pass", "last", ("after_bad",))
    assert sorted(run_here(state, state.tasks, 2, 1, [])) == ["after_bad", "bad", "last"]
    assert [state.is_done(task) for task in (good, bad, after_good, after_bad, last)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert State(state.folder).read().jobs == {"bad": ENDED}


def test_here_each_training_has_its_own_gpus(state):
    text = "import os, time; print('gpus', os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(1)"
    for name in ("a", "b"):
        script(state, text, name)
    run_here(state, state.tasks, 2, 2, ["4", "5", "6", "7"])
    assert sorted(state.log(name).read_text().split()[-1] for name in ("a", "b")) == ["4,5", "6,7"]
