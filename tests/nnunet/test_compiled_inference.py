"""`nnUNet_compile=t` in prediction: both networks are compiled, the segmentation stays the same."""

import functools

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch._dynamo.utils import counters

from nnunet_diffusion.inference import DiffusionPredictor

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
NETWORKS = 3  # pre-segmentor, condition flow, denoising side


@pytest.mark.parametrize("predictor_class", [nnUNetPredictor, DiffusionPredictor])
def test_compiled_inference_gives_the_same(trained_2d, monkeypatch, predictor_class):
    place, _ = trained_2d
    image, properties = SimpleITKIO().read_images([str(sorted((place.raw / "imagesTs").iterdir())[0])])
    # the graphs are torch.compile's; "eager" computes them by torch's own operators, without minutes of C++
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found, graphs = {}, {}
    with place.in_process(place.root / "results"):
        for choice in ("f", "t"):
            monkeypatch.setenv("nnUNet_compile", choice)
            torch._dynamo.reset()
            counters.clear()
            predictor = predictor_class(
                perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
            )
            folder = place.results / "TinyDiffusionTrainer__Tiny__2d"
            predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
            found[choice] = predictor.predict_single_npy_array(image[:, :4], properties | {"spacing": [1.0, 1.0, 1.0]})
            graphs[choice] = counters["stats"]["unique_graphs"]
    assert graphs == {"f": 0, "t": NETWORKS}
    assert np.array_equal(found["f"], found["t"])
