"""How far a cross-validation is: its tasks and jobs in one file, markers, logs, and the table for the user."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from nnunet_diffusion.cluster.graph import Task
from nnunet_diffusion.files import read_dictionary
from nnunet_diffusion.jobs.locks import HeldLock

FILE, LOCK = "crossval.json", "crossval.lock"
LOG_LINES = 15
DONE, RUNNING, WAITING, FAILED, BLOCKED, TO_DO = "done", "running", "waiting", "failed", "not run", "to do"
EPOCH_SECONDS = re.compile(r"Epoch time: ([\d.]+) s")
EPOCH = re.compile(r"Epoch (\d+)\b")


class State:
    """What is known about a cross-validation in its folder.

    Attributes:
        folder: of the cross-validation.
        tasks: all of them, each behind what it needs.
        jobs: task -> number of its Slurm job, or `running.HERE`; only those that were started and have not ended well.
        lock: held by the call that submits, or that runs tasks on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks: list[Task] = []
        self.jobs: dict[str, str] = {}
        self.lock = HeldLock(folder / LOCK)

    def read(self) -> State:
        """Read the file, if there is one. Return this object.

        Raises:
            ValueError: the file is damaged. The message names it and the cure.
        """
        path = self.folder / FILE
        if path.is_file():
            cure = "remove it, and give the command of the cross-validation again"
            content = read_dictionary(path, cure, {"tasks": list, "jobs": dict})
            self.tasks = [Task.from_json(task) for task in content["tasks"]]
            self.jobs = content["jobs"]
        return self

    def write(self) -> None:
        """Replace the file as a whole; tasks that are done have no job."""
        self.jobs = {name: job for name, job in self.jobs.items() if not self.is_done(self.task(name))}
        content = {"tasks": [task.to_json() for task in self.tasks], "jobs": self.jobs}
        replace_text(self.folder / FILE, json.dumps(content, indent=2))

    def task(self, name: str) -> Task:
        """Return the task of a name; an empty one if this cross-validation no longer has it."""
        return next((task for task in self.tasks if task.name == name), Task(name, ()))

    def log(self, name: str) -> Path:
        """Return the file with all that a task prints."""
        return self.folder / "logs" / f"{name}.log"

    def marker(self, name: str) -> Path:
        """Return the file with the command of a task that ended well."""
        return self.folder / "done" / name

    def is_done(self, task: Task) -> bool:
        """Whether a task has ended well: its files exist, or it has none and the same command has ended well."""
        if task.proof:
            return all(Path(path).is_file() for path in task.proof)
        marker = self.marker(task.name)
        return marker.is_file() and marker.read_text(encoding="utf-8") == task.command

    def unfinished(self) -> list[Task]:
        """Return the tasks that are not done, or need one that is not."""
        found: dict[str, Task] = {}
        for task in self.tasks:
            if not self.is_done(task) or any(name in found for name in task.needs):
                found[task.name] = task
        return list(found.values())

    def states(self, live: Collection[str], running: Collection[str]) -> dict[str, str]:
        """Return the state of each task.

        Args:
            live: tasks whose jobs have not ended.
            running: those of them that run now.
        """
        unfinished = {task.name for task in self.unfinished()}
        states: dict[str, str] = {}
        for task in self.tasks:
            if task.name not in unfinished:
                states[task.name] = DONE
            elif task.name in live:
                states[task.name] = RUNNING if task.name in running else WAITING
            elif any(states[name] in (FAILED, BLOCKED) for name in task.needs):
                states[task.name] = BLOCKED
            else:
                states[task.name] = FAILED if task.name in self.jobs else TO_DO
        return states

    def table(self, states: dict[str, str]) -> str:
        """Return a table of all tasks: name, state, what each needs, and its command."""
        rows = [("task", "state", "needs", "command")]
        for task in self.tasks:
            state = states[task.name]
            if state == RUNNING and task.is_training and (epochs := EPOCH.findall(tail(self.log(task.name), 200))):
                state += f", epoch {epochs[-1]}"
            needs = task.needs[0] if len(task.needs) == 1 else f"{len(task.needs)} tasks" if task.needs else "-"
            rows.append((task.name, state, needs, task.command))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)

    def failures(self, states: dict[str, str]) -> str:
        """Return the name of each failed task with the last lines of its log; empty text if none failed."""
        parts = []
        for name, state in states.items():
            if state == FAILED:
                log = self.log(name)
                last = tail(log, LOG_LINES) or "there is no log: the job was cancelled or ended before it began"
                parts.append(f"{name} failed. The end of {log}:\n{last}")
        return "\n\n".join(parts)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file as a whole. (`write_aside` would import torch.)."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a text file; empty text if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 200 * lines, 0))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def training_hours(task: Task) -> float | None:
    """Estimate the hours of a training, without its validation, from the epochs that the logs of its model's folds tell.

    Args:
        task: a training. Its epochs are those of the trainer, or as many as a finished fold took; otherwise nothing is known.
    """
    fold = Path(task.proof[0]).parent
    seconds: list[float] = []
    epochs = task.epochs
    for folder in fold.parent.glob("fold_*"):
        logs = "".join(path.read_text(errors="replace") for path in folder.glob("training_log_*.txt"))
        found = [float(text) for text in EPOCH_SECONDS.findall(logs)]
        seconds += found
        if not task.epochs and (folder / Path(task.proof[0]).name).is_file():
            epochs = max(epochs, len(found))
    return statistics.median(seconds) * epochs / 3600 if seconds and epochs else None


def estimate(tasks: Sequence[Task]) -> str:
    """Return a sentence with the hours that trainings take, one after the other, and how many of them are unknown."""
    hours = [training_hours(task) for task in tasks if task.is_training]
    known = [each for each in hours if each is not None]
    if not hours:
        return "No training is left."
    total = f"{sum(known):.1f}" if sum(known) >= 0.05 else "less than 0.1"
    told = f"{len(known)} of {len(hours)} trainings: {total} hours one after the other, without validation"
    unknown = len(hours) - len(known)
    if not known:
        told = f"{len(hours)} trainings, hours unknown: no epoch of these models has been logged yet"
    elif unknown:
        told += f"; {unknown} unknown, because no epoch of their models has been logged yet"
    return f"{told}."
