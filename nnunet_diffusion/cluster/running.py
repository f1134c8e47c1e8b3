"""Running tasks: a task as a process of its own, several on this machine, or all of them by Slurm."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.cluster.graph import Task
from nnunet_diffusion.cluster.state import LOG_LINES, State, replace_text, tail
from nnunet_diffusion.jobs.signals import EXIT_TERMINATED

HERE, ENDED = "here", "ended"  # in State.jobs, instead of a Slurm job: runs on this machine, failed there
END_SECONDS = 30.0  # for a task to end after SIGTERM; a training takes about five
SLURM_SECONDS = 300.0  # for Slurm to end a job whose training it has sent SIGTERM; a site's grace time is in it
POLL_SECONDS = 0.5
TIMEOUTS = 100  # how often Slurm's time limit may end one training, which then continues
CARRIED = ("nnUNet_", "PYTHONPATH", "MATPLOTLIBRC")  # variables whose names begin so reach the job in any case


def own_command(words: Sequence[str]) -> list[str]:
    """Return the words with the path of a command of this Python environment, which need not be on PATH."""
    beside = Path(sys.executable).parent / words[0]
    return [str(beside) if beside.is_file() else words[0], *words[1:]]


class Run:
    """A task as what submitit pickles and calls in a job. Called again after a preemption, the training continues.

    Args:
        task: to run.
        state: of its cross-validation.
    """

    def __init__(self, task: Task, state: State) -> None:
        self.name, self.words, self.command = task.name, task.words, task.command
        self.log, self.marker = state.log(task.name), state.marker(task.name)
        self.environment = {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}
        self.child = 0

    def start(self, **variables: str) -> int:
        """Start the command, which appends to the log. Return its process number.

        Slurm sends the signal of a preemption to all processes of a job. The command and its workers ignore it, because a
        process that is started inherits which signals are ignored; `checkpoint` then ends them by SIGTERM.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {self.command}\n".encode())
            log.flush()
            process = subprocess.Popen(
                own_command(self.words),
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_preemption,
            )
        process.returncode = 0  # waited for below by its number, also inside a signal handler, which Popen.wait cannot
        self.child = process.pid
        return process.pid

    def code(self, wait: bool = True) -> int | None:
        """Return the command's exit code, negative for a signal; None while it runs, unless it is waited for."""
        found, status = os.waitpid(self.child, 0 if wait else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None

    def ended_well(self, code: int) -> bool:
        """Return whether the command succeeded; if so, leave the marker."""
        if code == 0:
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.marker, self.command)
        return code == 0

    def end(self) -> None:
        """Send the command SIGTERM, wait until it has ended, and kill it if it does not within `END_SECONDS`."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended by itself
            os.kill(self.child, signal.SIGTERM)
            until = time.monotonic() + END_SECONDS
            while self.code(wait=False) is None:
                if time.monotonic() > until:
                    os.kill(self.child, signal.SIGKILL)
                time.sleep(0.1)

    def __call__(self) -> None:
        """Run the task as a Slurm job.

        Raises:
            RuntimeError: the command failed. The message has the last lines of its log.
        """
        self.start()
        code = self.code()
        if code in (EXIT_TERMINATED, -signal.SIGTERM):
            # Slurm's own SIGTERM: a preemption, whose signal or requeueing follows, a cancelled job, or a time limit
            time.sleep(SLURM_SECONDS)
        if not self.ended_well(code or 0):
            raise RuntimeError(f"{self.name} ended with exit code {code}:\n{tail(self.log, LOG_LINES)}")

    def checkpoint(self) -> Any:
        """End the command, whose last epoch is on disk, and return what Slurm is to run again; called by submitit."""
        from submitit.helpers import DelayedSubmission

        self.end()
        self.child = 0
        return DelayedSubmission(self)


def _ignore_preemption() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def run_here(state: State, tasks: Sequence[Task], at_once: int, gpus: int, devices: Sequence[str]) -> list[str]:
    """Run tasks on this machine, each once what it needs is done. Return the names of those that failed.

    Args:
        state: of the cross-validation, whose lock this process holds.
        tasks: unfinished ones, each behind what it needs.
        at_once: how many run at a time.
        gpus: GPUs of each training.
        devices: GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; none: that variable is left as it is.
    """
    waiting = {task.name: task for task in tasks}
    running: dict[str, tuple[Run, int]] = {}
    failed: list[str] = []
    free = list(range(at_once))
    try:
        while waiting or running:
            for task in [task for task in waiting.values() if not {*task.needs} & (waiting.keys() | running.keys())]:
                if {*task.needs} & {*failed}:
                    failed.append(waiting.pop(task.name).name)
                elif free:
                    slot = free.pop(0)
                    chosen = [devices[(slot * gpus + place) % len(devices)] for place in range(gpus) if devices]
                    run = Run(waiting.pop(task.name), state)
                    run.start(**({"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if chosen else {}))
                    running[task.name] = run, slot
                    print(f"{task.name} begins: {task.command}", flush=True)
                    state.jobs[task.name] = HERE
                    state.write()
            time.sleep(POLL_SECONDS)
            for name, (run, slot) in list(running.items()):
                code = run.code(wait=False)
                if code is not None:
                    del running[name]
                    free.append(slot)
                    if not run.ended_well(code):
                        failed.append(name)
                        state.jobs[name] = ENDED
                    print(f"{name} {'is done' if code == 0 else f'failed with exit code {code}'}.", flush=True)
                    state.write()
    finally:
        for run, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.child, signal.SIGTERM)  # all at once, before the wait for each
        for run, _ in running.values():
            run.end()
    return failed


def submit(state: State, tasks: Sequence[Task], live: Collection[str], slurm: Mapping[str, Any], gpus: int) -> None:
    """Submit tasks to Slurm, which runs each once what it needs has ended well.

    Args:
        state: of the cross-validation, whose lock this process holds.
        tasks: unfinished ones without a live job, each behind what it needs.
        live: tasks whose jobs have not ended.
        slurm: submitit's parameters of all jobs; `additional_parameters` are options of sbatch.
        gpus: GPUs of each training; the other tasks get none.

    Raises:
        RuntimeError: sbatch refused a job.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(folder=state.folder / "slurm", max_num_timeout=TIMEOUTS)
    queued = {name: state.jobs[name] for name in live}
    for task in tasks:
        before = [queued[name] for name in task.needs if name in queued]
        more = {**slurm.get("additional_parameters", {}), "requeue": True, "kill-on-invalid-dep": "yes"}
        # a fresh set for each job: update_parameters would keep those of the job before
        executor.parameters = {}
        executor.update_parameters(
            **{key: value for key, value in slurm.items() if key != "additional_parameters"},
            job_name=task.name,
            additional_parameters=more,
            **({"dependency": ":".join(["afterok", *before])} if before else {}),
            **({"gpus_per_node": gpus} if gpus and task.is_training else {}),
        )
        try:
            job = executor.submit(Run(task, state))
        except (FailedJobError, FailedSubmissionError) as error:
            raise RuntimeError(f"Slurm refused {task.name}: {error}") from error
        queued[task.name] = state.jobs[task.name] = job.job_id
        state.write()


def jobs_in_slurm(state: State) -> dict[str, str]:
    """Return the user's jobs that Slurm still has: number -> state; empty if the tasks have none, or without Slurm.

    Raises:
        RuntimeError: Slurm does not answer.
    """
    if not {*state.jobs.values()} - {HERE, ENDED} or shutil.which("squeue") is None:
        return {}
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%i|%T"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"squeue, which lists Slurm's jobs, failed: {done.stderr.strip()}")
    return dict(line.split("|") for line in done.stdout.split())


def live_jobs(state: State) -> tuple[set[str], set[str]]:
    """Return the tasks whose jobs have not ended, and those of them that run now."""
    here = {name for name, job in state.jobs.items() if job == HERE}
    if here:
        free = state.lock.acquire()
        state.lock.release()
        here = set() if free else here
    slurm = jobs_in_slurm(state)
    live = {name for name, job in state.jobs.items() if job in slurm}
    return live | here, {name for name in live if slurm[state.jobs[name]] in ("RUNNING", "COMPLETING")} | here
