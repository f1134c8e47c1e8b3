"""Prediction of many cases. Other processes prepare and write cases; a case that fails does not stop the others."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from numpy.typing import NDArray

from nnunet_diffusion.inference.memory import free_bytes
from nnunet_diffusion.inference.output import Managers, PredictedCase, write_case
from nnunet_diffusion.inference.presegmentation import (
    Presegmentation,
    find_presegmentation,
    read_label_map,
    read_presegmentation,
)
from nnunet_diffusion.inference.reading import check_size, constant_channels, expected_bytes, read_images
from nnunet_diffusion.inference.staging import staging_folders

LARGE_BYTES = 2**30  # larger results are written by this process, because sending them to another copies them twice
SMALL_BYTES = 2**26  # if the image files of two cases are smaller in total, no process is started for them
WORKERS = 3  # number of processes that prepare, and of processes that write, as in nnU-Net's command
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case.

    Attributes:
        name: name of the case.
        images: one file per channel.
        target: output file without its ending; None to return the result.
        previous_stage: segmentation file of the cascade's previous stage.
        presegmentation: folder of pre-segmentations to start from.
    """

    name: str
    images: Sequence[str]
    target: str | None = None
    previous_stage: str | None = None
    presegmentation: str | None = None


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case on the network's grid.

    Attributes:
        data: (C, *volume), float32.
        properties: image properties, as returned by nnU-Net's preprocessor.
        presegmentation: pre-segmentation to start from; None to use the embedded nnU-Net's.
        notes: warnings for the user.
    """

    data: NDArray
    properties: dict[str, Any]
    presegmentation: Presegmentation | None
    notes: Sequence[str] = ()


class FailedCases(RuntimeError):
    """Some cases could not be predicted, or some images were left out. All others are finished.

    Attributes:
        failures: name of each case that failed -> why.
        left_out: each file whose name does not follow nnU-Net's convention -> why it is left out.
    """

    def __init__(self, failures: Mapping[str, str], number: int, left_out: Mapping[str, str] | None = None) -> None:
        self.failures, self.left_out = dict(failures), dict(left_out or {})
        parts = []
        if self.failures:
            parts.append(f"{len(failures)} of {number} cases failed, the others are finished:\n{_listed(failures)}")
        if self.left_out:
            parts.append(f"These images were left out:\n{_listed(self.left_out)}")
        super().__init__("\n".join(parts))


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())


def prepare_case(case: CaseFiles, managers: Managers, limit: float | None = None) -> PreparedCase:
    """Read and preprocess a case as nnU-Net does, including its pre-segmentation.

    Args:
        case: its files.
        managers: of the model.
        limit: main memory that the case may use, in bytes; None for the free memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: channels are missing, or a file cannot be read, holds NaN, or does not match its image. The message
            names the file.
        MemoryError: the image does not fit into memory, before or after resampling.
    """
    plans_manager, configuration_manager, dataset_json = managers
    if case.previous_stage is not None and not Path(case.previous_stage).is_file():
        raise FileNotFoundError(f"{case.previous_stage} is missing")
    image, properties = read_images(case.images, plans_manager.image_reader_writer_class(), limit)
    check_image(", ".join(case.images), case.name, image, properties["spacing"], managers, limit)
    notes = constant_channels(case.images, image)
    label_manager, previous = plans_manager.get_label_manager(dataset_json), None
    if case.previous_stage is not None:
        found = read_label_map(
            "segmentation of the previous stage",
            *(Path(case.previous_stage), properties, image.shape[1:], plans_manager, label_manager),
        )
        previous = found.astype(np.float32)
    data, moved, properties = configuration_manager.preprocessor_class(verbose=False).run_case_npy(
        image, previous, properties, plans_manager, configuration_manager, dataset_json
    )
    if previous is not None:
        data = np.vstack((data, convert_labelmap_to_one_hot(moved[0], label_manager.foreground_labels, data.dtype)))
    given = None
    if case.presegmentation is not None:
        ending = dataset_json["file_ending"]
        own_name = Path(case.images[0]).name.removesuffix(f"_0000{ending}")  # the output may have another name
        source = find_presegmentation(Path(case.presegmentation), own_name, ending)
        given = read_presegmentation(
            source, properties, data.shape[1:], plans_manager, configuration_manager, label_manager
        )
    return PreparedCase(np.ascontiguousarray(data, dtype=np.float32), properties, given, notes)


def check_image(
    names: str, case: str, image: NDArray, spacing: Sequence[float], managers: Managers, limit: float | None = None
) -> None:
    """Check that a model can segment an image.

    Args:
        names: of its files, for messages.
        case: name of the case, for messages.
        image: (C, *image).
        spacing: in mm, per axis of the image.
        managers: of the model.
        limit: main memory that the case may use, in bytes; None for the free memory.

    Raises:
        ValueError: the image has another number of channels or axes than the model needs, is empty, or has a wrong spacing.
        MemoryError: it does not fit into memory after resampling.
    """
    plans_manager, configuration_manager, dataset_json = managers
    channels = len(dataset_json.get("channel_names") or dataset_json["modality"])
    if len(image) != channels:  # a colour image has three channels in one file
        raise ValueError(
            f"{names} has {len(image)} channels, the model needs {channels}, as its training images "
            f"({case}_0000{dataset_json['file_ending']} and so on)"
            + ("; remove the transparency, its fourth channel" if (len(image), channels) == (4, 3) else "")
        )
    if image[0].size == 0 or not image.any():
        raise ValueError(f"{names} is empty: every voxel is 0")
    heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    check_size(names, image, spacing, plans_manager, configuration_manager, heads, limit)


def worker_numbers(cases: Sequence[CaseFiles], cores: int) -> tuple[int, int]:
    """Return the number of processes that prepare and of those that write, together at most `cores`.

    Both are 0 with one core, for a single case and for two small ones: starting a process would take longer than it saves.
    """
    sizes = (os.path.getsize(path) for case in cases for path in case.images if os.path.isfile(path))
    if cores < 2 or len(cases) < 2 or (len(cases) == 2 and sum(sizes) < SMALL_BYTES):
        return 0, 0
    each = min(WORKERS, cores // 2, len(cases) - 1)
    return each, each


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker() -> None:
    """Ignore Ctrl-C and SIGTERM, which the parent handles by waiting for running work. Exit if the parent is killed."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _Workers(ProcessPoolExecutor):
    """Newly started processes that ignore Ctrl-C and SIGTERM, because both signals reach the whole process group."""

    def __init__(self, number: int) -> None:
        super().__init__(number, multiprocessing.get_context("spawn"), _begin_worker)

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        if not hasattr(signal, "pthread_sigmask"):
            return super().submit(fn, *args, **kwargs)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # a process started here inherits the mask
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True, eq=False)
class Job:
    """A task submitted to other processes.

    Attributes:
        future: future result of the task.
        again: repeats the task in a process of its own and returns the result.
    """

    future: Future
    again: Callable[[], Any]

    def result(self) -> Any:
        """Wait for the result. Raise the task's exception, or MemoryError if its process is killed again when it runs alone."""
        try:
            return self.future.result()
        except BrokenProcessPool:  # the pool loses all its tasks and does not say whose process was killed
            return self.again()


class Workers:
    """Processes for one kind of task; all are replaced if the system kills one."""

    def __init__(self, number: int) -> None:
        """Create the pool; processes start with the first task. With 0, tasks run immediately in this process."""
        self._number = number
        self._pool = _Workers(number) if number else None

    def submit(self, function: Callable, *arguments: Any) -> Job:
        """Submit `function(*arguments)`."""
        if self._pool is None:
            return done_here(function, *arguments)
        try:
            future = self._pool.submit(function, *arguments)
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = _Workers(self._number)
            future = self._pool.submit(function, *arguments)
        return Job(future, partial(done_alone, function, *arguments))

    def shutdown(self, cancel: bool) -> None:
        """Wait for running tasks, and for queued ones unless they are cancelled."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=cancel)


def done_here(function: Callable, *arguments: Any) -> Job:
    """Run a task immediately, in this process."""
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return Job(future, future.result)


def done_alone(function: Callable, *arguments: Any) -> Any:
    """Run a task in a process of its own.

    Raises:
        MemoryError: the process was killed.
    """
    with _Workers(1) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError(
                "the process that worked on this case was killed, most often for lack of memory or of space in /dev/shm: "
                "crop the image, or take a machine with more memory"
            ) from error


@contextmanager
def workers(number: int) -> Iterator[Workers]:
    """Provide `number` new processes (0 for none) in a `with` block; an error in the block cancels queued tasks."""
    pool = Workers(number)
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel=True)
        raise
    pool.shutdown(cancel=False)


def _prepared_ahead(
    readers: Workers, ahead: int, cases: Sequence[CaseFiles], managers: Managers, limit: float
) -> Iterator[Job]:
    """Yield the preparation of each case in order. Up to `ahead` further cases are prepared meanwhile if memory allows."""
    begun: deque[tuple[Job, int]] = deque()
    following = 0

    @cache
    def needed(place: int) -> int:
        return expected_bytes(cases[place].images, managers) if ahead else 0

    def begin() -> None:
        nonlocal following
        job = readers.submit(prepare_case, cases[following], managers, limit)
        begun.append((job, needed(following)))
        following += 1

    def begin_next(taken: int) -> None:
        while following < len(cases) and len(begun) < ahead:
            if taken + sum(each for _, each in begun) + needed(following) > limit:
                break
            begin()

    if needed(0) < LARGE_BYTES:
        following = 1
        begin_next(needed(0))
        yield done_here(prepare_case, cases[0], managers, limit)  # while the other processes start
    while begun or following < len(cases):
        if not begun:
            begin()
        job, taken = begun.popleft()
        begin_next(taken)
        yield job


def run_cases(
    cases: Sequence[CaseFiles],
    predict: Callable[[CaseFiles, PreparedCase], PredictedCase],
    managers: Managers,
    save_probabilities: bool,
    preparing: int,
    writing: int,
    on_case: Callable[[str, str], object],
) -> list[Any]:
    """Predict all cases; the network runs in this process.

    Args:
        cases: cases to predict, at least one.
        predict: runs the network on a prepared case.
        managers: of the model.
        save_probabilities: as in `write_case`.
        preparing: number of processes that read and preprocess; 0: this process does it.
        writing: number of processes that resample and write; 0: this process does it.
        on_case: called with the name of each case and its error message, empty if it succeeded.

    Returns:
        The results of `write_case`, in the order of the cases.

    Raises:
        FailedCases: some cases failed; the others are finished.
        OSError: an output folder cannot be written to.
    """
    results: list[Any] = [None] * len(cases)
    failures: dict[str, str] = {}
    names = [case.name for case in cases]
    written: dict[Future, tuple[int, Job]] = {}

    def failed(index: int, error: Exception) -> None:
        name = names[index]
        if names.count(name) > 1:  # outputs of one name in several folders
            name = cases[index].target or f"{name}, number {index}"
        failures[name] = reason_of(error)
        on_case(name, failures[name])

    def collect(limit: int) -> None:
        while len(written) > limit:
            for future in wait(written, return_when=FIRST_COMPLETED).done:
                index, job = written.pop(future)
                try:
                    results[index] = job.result()
                    on_case(cases[index].name, "")
                except Exception as error:
                    failed(index, error)

    limit = free_bytes(torch.device("cpu"))  # before any case uses memory
    outputs = [Path(case.target).parent for case in cases if case.target is not None]
    try:
        # the staging folders are the outermost context: they are removed when no process writes into them any more
        with staging_folders(outputs) as stages, workers(preparing) as readers, workers(writing) as writers:
            for index, prepared in enumerate(_prepared_ahead(readers, preparing, cases, managers, limit)):
                try:
                    predicted = predict(cases[index], prepared.result())
                except Exception as error:
                    failed(index, error)
                    continue
                collect(writing)
                submit = writers.submit if predicted.logits.nbytes < LARGE_BYTES else done_here
                job = submit(write_case, predicted, managers, save_probabilities, stages)
                written[job.future] = index, job
                del predicted, job
            collect(0)
    except (KeyboardInterrupt, SystemExit):  # running writes have finished by now
        for future, (index, _) in written.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                on_case(names[index], "")
        raise
    if failures:
        raise FailedCases(failures, len(cases))
    return results


def run_each(
    function: Callable, arguments: Mapping[str, Sequence[Any]], processes: int, on_case: Callable[[str], object]
) -> dict[str, str]:
    """Call a function once for each case, in other processes. A case that fails does not stop the others.

    Args:
        function: what is called.
        arguments: name of each case -> its arguments.
        processes: number of further processes; 0 for none.
        on_case: called with the name of each case when it has ended.

    Returns:
        name of each case that failed -> why.
    """
    failures: dict[str, str] = {}
    running: dict[Future, tuple[str, Job]] = {}

    def collect(limit: int) -> None:
        while len(running) > limit:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, job = running.pop(future)
                try:
                    job.result()
                except Exception as error:
                    failures[name] = reason_of(error)
                on_case(name)

    with workers(processes) as pool:
        for name, each in arguments.items():
            job = pool.submit(function, *each)
            running[job.future] = name, job
            collect(processes)
        collect(0)
    return failures


def fitting_processes(needed: Sequence[float]) -> int:
    """Return the number of processes whose cases fit into the free memory together: at most one per core, 0 for one case.

    Args:
        needed: memory of each case in bytes.
    """
    fit = int(free_bytes(torch.device("cpu")) // max([*needed, 1]))
    number = min(available_cores(), len(needed), fit)
    return number if number > 1 else 0


def reason_of(error: Exception) -> str:
    """Return an exception's message for the user, with the type's name unless the message is one for users."""
    if str(error) and isinstance(error, (ValueError, OSError, RuntimeError, MemoryError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
