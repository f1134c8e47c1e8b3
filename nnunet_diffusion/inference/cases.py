"""Many cases: prepared and written by other processes while the network works; a bad one does not stop the rest."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from numpy.typing import NDArray

from nnunet_diffusion.inference.lasting_pool import LastingPool
from nnunet_diffusion.inference.memory import free_bytes
from nnunet_diffusion.inference.output import Managers, PredictedCase, write_case
from nnunet_diffusion.inference.presegmentation import (
    Presegmentation,
    find_presegmentation,
    read_label_map,
    read_presegmentation,
)
from nnunet_diffusion.inference.reading import check_size, constant_channels, expected_bytes, read_images

LARGE_BYTES = 2**30  # what is larger is written by this process: it would have to be copied twice to another


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case.

    Attributes:
        name: of the case.
        images: one file per channel.
        target: output file without its ending; None to return the result.
        previous_stage: segmentation of the cascade's previous stage.
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
        properties: of the image, as nnU-Net's preprocessor gives them.
        presegmentation: to start from; None for the embedded nnU-Net's.
        notes: warnings for the user.
    """

    data: NDArray
    properties: dict[str, Any]
    presegmentation: Presegmentation | None
    notes: Sequence[str] = ()


class FailedCases(RuntimeError):
    """Some cases could not be predicted, all others are finished.

    Attributes:
        failures: name of each such case -> why.
    """

    def __init__(self, failures: dict[str, str], number: int) -> None:
        self.failures = failures
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{len(failures)} of {number} cases failed, the others are finished:\n{listed}")


def prepare_case(case: CaseFiles, managers: Managers, limit: float | None = None) -> PreparedCase:
    """Read and preprocess a case as nnU-Net does, with what else the reverse process needs.

    Args:
        case: its files.
        managers: of the model.
        limit: main memory that the case may take, in bytes; None for what is free.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: channels are missing, a file cannot be read, holds NaN, or does not fit its image; names the file.
        MemoryError: the image does not fit into memory, as it is or resampled.
    """
    plans_manager, configuration_manager, dataset_json = managers
    channels = len(dataset_json.get("channel_names") or dataset_json["modality"])
    if case.previous_stage is not None and not Path(case.previous_stage).is_file():
        raise FileNotFoundError(f"{case.previous_stage} is missing")
    names = ", ".join(case.images)
    image, properties = read_images(case.images, plans_manager.image_reader_writer_class(), limit)
    if len(image) != channels:  # a colour image has three in one file
        raise ValueError(
            f"{names} has {len(image)} channels, the model needs {channels}, as its training images "
            f"({case.name}_0000{dataset_json['file_ending']} and so on)"
            + ("; remove the transparency, its fourth channel" if (len(image), channels) == (4, 3) else "")
        )
    if image[0].size == 0 or not image.any():
        raise ValueError(f"{names} is empty: every voxel is 0")
    heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    check_size(names, image, properties["spacing"], plans_manager, configuration_manager, heads, limit)
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
        own_name = Path(case.images[0]).name.removesuffix(f"_0000{ending}")  # the output may have another
        source = find_presegmentation(Path(case.presegmentation), own_name, ending)
        given = read_presegmentation(
            source, properties, data.shape[1:], plans_manager, configuration_manager, label_manager
        )
    return PreparedCase(np.ascontiguousarray(data, dtype=np.float32), properties, given, notes)


class _Inline(Executor):
    """Executor that does its work at once, in this process."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, which lets running work end; end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _processes(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _begin_worker)


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """Executor of so many fresh processes, 0 for none; what has not begun is dropped when the block is left by an error."""
    if number == 0:
        yield _Inline()
        return
    pool = LastingPool(_processes, number)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _prepared_ahead(
    readers: Executor, ahead: int, cases: Sequence[CaseFiles], managers: Managers, limit: float
) -> Iterator[Future]:
    """Yield the preparation of each case in order, so many of the next ones begun already if they fit into memory together."""
    begun: deque[tuple[Future, int]] = deque()
    current = 0  # of the case that the network has, or that is being written
    for case in cases:
        needed = expected_bytes(case.images, managers) if ahead else 0
        while begun and (len(begun) > ahead or current + sum(each for _, each in begun) + needed > limit):
            prepared, current = begun.popleft()
            yield prepared
        begun.append((readers.submit(prepare_case, case, managers, limit), needed))
    while begun:
        yield begun.popleft()[0]


def run_cases(
    cases: Sequence[CaseFiles],
    predict: Callable[[CaseFiles, PreparedCase], PredictedCase],
    managers: Managers,
    save_probabilities: bool,
    preparing: int,
    writing: int,
    on_case: Callable[[str, str], object],
) -> list[Any]:
    """Predict all cases; the network works in this process.

    Args:
        cases: to predict.
        predict: what the network does.
        managers: of the model.
        save_probabilities: as `write_case`.
        preparing: processes that read and preprocess; 0 for this one.
        writing: processes that resample and write; 0 for this one.
        on_case: called with the name of each case and how it ended: empty for well.

    Returns:
        What `write_case` returns, in the order of the cases.

    Raises:
        FailedCases: some cases failed, also those whose process was killed; the others are finished.
    """
    results: list[Any] = [None] * len(cases)
    failures: dict[str, str] = {}
    names = [case.name for case in cases]
    written: dict[Future, int] = {}

    def failed(index: int, error: Exception) -> None:
        name = names[index]
        if names.count(name) > 1:  # outputs of one name in several folders
            name = cases[index].target or f"{name}, number {index}"
        failures[name] = f"{type(error).__name__}: {error}"
        on_case(name, failures[name])

    def collect(limit: int) -> None:
        while len(written) > limit:
            for future in wait(written, return_when=FIRST_COMPLETED).done:
                index = written.pop(future)
                try:
                    results[index] = future.result()
                    on_case(cases[index].name, "")
                except Exception as error:
                    failed(index, error)

    limit = free_bytes(torch.device("cpu"))  # now that no case takes any
    with workers(preparing) as readers, workers(writing) as writers:
        for index, prepared in enumerate(_prepared_ahead(readers, preparing, cases, managers, limit)):
            try:
                predicted = predict(cases[index], prepared.result())
            except Exception as error:
                failed(index, error)
                continue
            collect(writing)
            executor = writers if predicted.logits.nbytes < LARGE_BYTES else _Inline()
            written[executor.submit(write_case, predicted, managers, save_probabilities)] = index
            del predicted
        collect(0)
    if failures:
        raise FailedCases(failures, len(cases))
    return results
