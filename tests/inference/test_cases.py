"""Processes that die, networks that fail: one clear message, and no error taken for another."""

import multiprocessing
import os
import signal
import time

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from torch import nn

from nnunet_diffusion.inference import DiffusionPredictor, cases
from nnunet_diffusion.inference.cases import (
    SMALL_BYTES,
    CaseFiles,
    FailedCases,
    Workers,
    _prepared_ahead,
    reason_of,
    run_cases,
    worker_numbers,
    workers,
)
from nnunet_diffusion.inference.output import PredictedCase
from nnunet_diffusion.inference.reading import expected_bytes
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings


class Deadly(str):
    """Kills the process that receives it, as the system does when memory is short."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_killed_process_costs_its_case_only(number, managers_of):
    missing = [CaseFiles(name, [name], previous_stage=f"{name}.nii") for name in "acde"]
    listed = [missing[0], CaseFiles("b", [Deadly()]), *missing[1:]]
    with pytest.raises(FailedCases) as error:
        run_cases(listed, None, managers_of(), False, number, 0, lambda *_: None)
    failures = error.value.failures
    assert failures.keys() == set("abcde")
    assert "was killed, most often for lack of memory" in failures.pop("b")
    assert failures == {name: f"{name}.nii is missing" for name in "acde"}


def test_a_killed_process_does_not_take_what_another_was_doing_with_it():
    pool = Workers(2)
    try:
        slow, deadly = pool.submit(time.sleep, 2), pool.submit(Deadly().__reduce__()[0], 1)
        with pytest.raises(MemoryError, match="killed"):
            deadly.result()
        assert slow.result() is None  # done once more
        assert pool.submit(abs, -3).result() == 3
    finally:
        pool.shutdown(cancel=True)


def image(folder, name, spacing=(1, 1, 1)):
    path = folder / f"{name}_0000.nii.gz"
    voxels = np.random.default_rng(0).random((6, 7, 8)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*spacing, 1])), path)
    return [str(path)]


def first_class(case, prepared):
    """A network that finds the first class everywhere."""
    logits = np.zeros((3, *prepared.data.shape[1:]), np.float32)
    logits[1] = 1
    return PredictedCase(case.name, case.target, logits, None, prepared.properties)


@pytest.mark.nnunet
def test_case_that_would_be_resampled_to_more_than_any_memory_costs_itself_only(tmp_path, managers_of):
    spacings = {"a": (1, 1, 1), "b": (1000, 1000, 1000), "c": (1, 1, 1)}
    listed = [CaseFiles(name, image(tmp_path, name, edge), str(tmp_path / name)) for name, edge in spacings.items()]
    with pytest.raises(FailedCases, match="1 of 3 cases failed") as failed:
        run_cases(listed, first_class, managers_of(), False, 0, 0, lambda *_: None)
    assert "b_0000.nii.gz, resampled from 1000 x 1000 x 1000 mm" in failed.value.failures["b"]
    assert "would have 8000 x 7000 x 6000 voxels and need" in failed.value.failures["b"]
    for name in "ac":
        assert (SimpleITKIO().read_seg(str(tmp_path / f"{name}.nii.gz"))[0] == 1).all()


class Recorder:
    """Takes work and never does it."""

    def __init__(self):
        self.begun = []

    def submit(self, function, case, *arguments):
        self.begun.append(case.name)


@pytest.mark.nnunet
@pytest.mark.parametrize(
    ("room", "begun"),
    [
        (100, [3, 4, 5, 5, 5, 5]),
        (3.5, [2, 3, 4, 5, 5, 5]),  # beside the one that the network has
        (2.5, [1, 2, 3, 4, 5, 5]),
        (0.5, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_only_as_many_cases_are_prepared_ahead_as_fit_into_memory_together(
    tmp_path, managers_of, monkeypatch, room, begun
):
    managers, readers = managers_of(), Recorder()
    listed = [CaseFiles(name, image(tmp_path, name)) for name in "abcdef"]
    one = expected_bytes(listed[0].images, managers)
    assert one > 6 * 7 * 8 * 4
    assert [len(readers.begun) for _ in _prepared_ahead(readers, 3, listed, managers, room * one)] == begun
    assert readers.begun == list("bcdef")  # the first one is prepared here
    monkeypatch.setattr(cases, "LARGE_BYTES", one)
    readers = Recorder()
    assert len(list(_prepared_ahead(readers, 3, listed, managers, room * one))) == 6
    assert readers.begun == list("abcdef")  # but not where that could end the run


@pytest.mark.slow
def test_a_worker_is_deaf_to_signals_of_its_group_from_its_start_on():
    with workers(1) as pool:
        future = pool.submit(time.sleep, 0)
        (worker,) = multiprocessing.active_children()
        for _ in range(20):  # it imports for longer than that
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker.pid, number)
            time.sleep(0.05)
        assert future.result() is None
        os.kill(worker.pid, signal.SIGTERM)
        assert pool.submit(os.getpid).result() == worker.pid


def test_no_process_for_small_work_and_never_more_than_cores(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"0" * 100)

    def numbers(cases, cores):
        return worker_numbers([CaseFiles(str(number), [str(image)]) for number in range(cases)], cores)

    assert [numbers(cases, 16) for cases in (1, 2, 3, 4, 40)] == [(0, 0), (0, 0), (2, 2), (3, 3), (3, 3)]
    assert [numbers(40, cores) for cores in (1, 2, 3, 4, 5, 6)] == [(0, 0), (1, 1), (1, 1), (2, 2), (2, 2), (3, 3)]
    os.truncate(image, SMALL_BYTES)
    assert numbers(2, 16) == (1, 1)


def test_reasons_are_for_the_user():
    assert reason_of(ValueError("a.png has 4 channels")) == "a.png has 4 channels"
    assert reason_of(KeyError("spacing")) == "KeyError: 'spacing'"  # written for nobody
    assert reason_of(MemoryError()) == "MemoryError: "


class Failing(nn.Module):
    """A presegmentor that fails as a wrong shape would."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, image):
        self.calls += 1
        raise self.error


def predictor_with(error):
    network = DiffusionSegmenter(Failing(error), nn.Identity(), DiffusionSettings(features_per_stage=(8, 8)))
    predictor = DiffusionPredictor(
        device=torch.device("cpu"), use_mirroring=False, use_gaussian=False, allow_tqdm=False
    )
    predictor.network, predictor.perform_everything_on_device = network, True
    predictor.label_manager = type("Labels", (), {"num_segmentation_heads": 2})
    predictor.configuration_manager = type("Configuration", (), {"patch_size": [4, 4], "batch_size": 1})
    return predictor, VolumeRun(predictor, torch.zeros(1, 1, 4, 4)).presegment


def test_only_lack_of_memory_is_tried_again_on_the_cpu():
    predictor, presegment = predictor_with(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        presegment()
    assert predictor.network.presegmentor.calls == 1
    predictor, presegment = predictor_with(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        presegment()
    assert predictor.network.presegmentor.calls == 2
