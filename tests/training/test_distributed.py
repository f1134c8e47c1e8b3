"""Distributed training: the real train step on two ranks, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("one_rank.py")
JOB = Path(__file__).with_name("distributed_job.py")


@pytest.fixture(scope="module", params=["logits", "x0", "flip"])
def results(request, hippocampus, tmp_path_factory):
    """What two ranks and one process with the whole batch made of the same weights, batch and noise."""
    folder = tmp_path_factory.mktemp("ranks")
    plans = json.loads((hippocampus.preprocessed / "Tiny.json").read_text())
    hidiff = request.param == "flip"
    section = {"prediction_type": request.param, "starts": {"truth": 1.0}, "norm": "instance"}
    if hidiff:
        # so that the refiner's step, whose size hardly depends on the gradient, does not change the segmentor's turn
        section |= {"denoiser": "hidiff", "learning_rate": 1e-9}
    plans["configurations"]["2d"]["diffusion"] = section
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text((hippocampus.preprocessed / "dataset.json").read_text())
    torch.manual_seed(5)
    given = {
        "data": torch.randn(2, 1, 32, 32),
        "target": torch.randint(0, 3, (2, 1, 32, 32)).float(),
        "timestep": torch.tensor([2, 8] if hidiff else [120, 640]),
        "noise": torch.rand(2, 3, 32, 32) if hidiff else torch.randn(2, 3, 32, 32),
    }
    torch.save(given, folder / "given.pt")
    variables = hippocampus.variables(nnUNet_results=str(folder / "results"))
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), rank, str(folder)], env=variables)
        for rank in ("0", "1", "alone")
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in ("0", "1", "alone")]


def test_gradients_are_those_of_one_process_with_the_whole_batch(results):
    first, second, alone = results
    assert first["wrapped"] == "DistributedDataParallel" and alone["wrapped"] == "NoneType"
    largest = max(gradient.abs().max() for gradient in alone["gradients"].values())
    for name, expected in alone["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        assert torch.allclose(first["gradients"][name], expected, rtol=1e-3, atol=1e-5 * largest), name


def test_average_and_presegmentor_are_equal_on_all_ranks(results):
    first, second, _ = results
    for part in ("average", "presegmentor"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name


def test_ranks_draw_different_noise(results):
    first, second, alone = results
    assert first["seed"] == alone["seed"] != second["seed"]


def test_whole_job_on_two_ranks(hippocampus, tmp_path):
    """Pre-segmentor and denoiser from nothing to validation; the validation cases are shared out, all are measured."""
    variables = hippocampus.variables(nnUNet_results=str(tmp_path / "results"))
    logs = [tmp_path / f"{rank}.txt" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(rank), str(tmp_path)],
            env=variables,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=500) for process in ranks]
    told = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(text[-3000:] for text in told)
    model = tmp_path / "results" / hippocampus.dataset
    first, ours = (model / f"{name}__Tiny__2d" / "fold_0" for name in ("TinynnUNetTrainer", "TinyDiffusionTrainer"))
    validation = json.loads((hippocampus.preprocessed / "splits_final.json").read_text())[0]["val"]
    for folder in (first, ours):
        summary = json.loads((folder / "validation" / "summary.json").read_text())
        measured = {Path(case["prediction_file"]).name.removesuffix(".nii.gz") for case in summary["metric_per_case"]}
        assert measured == set(validation)
    for text in told:
        assert text.count("predicting ") == 2 * len(validation) // 2  # half of the cases, by each network
    trained, presegmentor = (read_checkpoint(folder / "checkpoint_final.pth") for folder in (ours, first))
    assert len(trained["logging"]["denoising_loss"]) == 2
    assert np.isfinite(trained["logging"]["denoising_loss"]).all()
    for key, value in presegmentor["network_weights"].items():
        assert torch.equal(trained["network_weights"][f"presegmentor.{key}"], value)
