"""What nnU-Net's own predictor makes of the segmenter: no seams, rounding only, bounded logits, any dataset and plans."""

import json

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from torch import nn

from nnunet_diffusion.evaluation.seams import Jumps, border_jumps
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.training import DiffusionTrainer

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]


def larger_batch(plans):
    plans["configurations"]["2d"]["batch_size"] = 4


@pytest.fixture(scope="module")
def whole_volumes(hippocampus_data, workplace_maker, tmp_path_factory):
    """Ten real training cases with all of their slices."""
    return workplace_maker(hippocampus_data, tmp_path_factory.mktemp("whole"), configurations=["2d"])


@pytest.fixture(scope="module")
def trained(whole_volumes, tmp_path_factory):
    """A trainer whose two networks learned on real patches for some seconds; the denoiser is the averaged one."""
    torch.manual_seed(0)
    np.random.seed(0)
    with whole_volumes.in_process(tmp_path_factory.mktemp("results")) as place:
        stock = place.trainer(nnUNetTrainer, change=larger_batch)
        stock.initialize()
        loader = stock.get_dataloaders()[0]
        batches = [next(loader) for _ in range(50)]
        stock.network.train()
        for step in range(200):
            stock.train_step(batches[step % 50])
        trainer = place.trainer(DiffusionTrainer, change=larger_batch, learning_rate=3e-3, ema_decay=0.95)
        trainer.initialize()
        trainer.segmenter.presegmentor.load_state_dict(stock.network.state_dict())
        trainer.on_train_epoch_start()
        for step in range(150):
            batch = batches[step % 50]
            trainer.train_step({**batch, "target": batch["target"][0]})
        trainer.segmenter.denoiser = trainer.learners["denoiser"].average.module
        trainer.segmenter.eval()
        yield trainer


def cases(trainer, number, every):
    """Every so many slices of the first validation and training cases, preprocessed."""
    training, validation = trainer.do_split()
    for case in [*validation, *training][:number]:
        dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case])
        yield torch.from_numpy(dataset.load_case(case)[0][:])[:, every:-every:every]


def predict(trainer, network, image, **arguments):
    """Logits of nnU-Net's predictor at its defaults, and its tiles."""
    predictor = nnUNetPredictor(
        perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False, **arguments
    )
    managers = trainer.plans_manager, trainer.configuration_manager
    axes = trainer.inference_allowed_mirroring_axes or (0, 1)
    predictor.manual_initialization(network, *managers, None, trainer.dataset_json, "DiffusionTrainer", axes)
    patch = trainer.configuration_manager.patch_size
    padded = [max(size, least) for size, least in zip(image.shape[2:], patch, strict=True)]
    assert padded == list(image.shape[2:]), "a padded image moves the tiles"
    tiles = predictor._internal_get_sliding_window_slicers(image.shape[1:])
    return predictor.predict_sliding_window_return_logits(image).float(), tiles


class Offset(nn.Module):
    """A network whose answer is shifted differently each time: what a seam is."""

    def __init__(self, network):
        super().__init__()
        self.network, self.generator = network, torch.Generator().manual_seed(0)

    def forward(self, image):
        return self.network(image) + 2 * torch.randn(1, 3, 1, 1, generator=self.generator)


def test_measure_sees_seams_where_there_are_some(trained):
    image = next(cases(trained, 1, 10))
    hard = {"use_gaussian": False, "use_mirroring": False, "tile_step_size": 1}
    smooth, tiles = predict(trained, trained.segmenter.presegmentor, image, **hard)
    seams, _ = predict(trained, Offset(trained.segmenter.presegmentor), image, **hard)
    plain, shifted = (border_jumps(logits.softmax(0), tiles).ratio for logits in (smooth, seams))
    assert shifted > 1.5 * plain


def test_no_more_of_a_jump_across_tile_borders_than_nnunet(trained):
    """Jumps at tile borders, relative to those on the lines around: the denoiser's edges are sharper everywhere."""
    total = {"ours": Jumps(), "nnunet": Jumps()}
    for image in cases(trained, 4, 4):
        for name, network in (("ours", trained.segmenter), ("nnunet", trained.segmenter.presegmentor)):
            logits, tiles = predict(trained, network, image)
            assert len({tile[2:] for tile in map(str, tiles)}) > 1
            total[name] += border_jumps(logits.softmax(0), tiles)
    assert total["ours"].ratio <= 1.1 * total["nnunet"].ratio


def test_one_reverse_process_per_volume_has_no_more_of_a_jump_than_nnunet(trained):
    """As above, all of nnU-Net's weight off: what is measured is the denoiser's own result.

    After seconds of training the ratio over 22 planes is a chance one to a few percent: the bound is that of stock prediction.
    """
    predictor = DiffusionPredictor(device=torch.device("cpu"), allow_tqdm=False, presegmentation_weight=0.0)
    managers = trained.plans_manager, trained.configuration_manager
    network = trained.segmenter
    predictor.manual_initialization(network, *managers, None, trained.dataset_json, "DiffusionTrainer", (0, 1))
    total = {"ours": Jumps(), "nnunet": Jumps()}
    for image in cases(trained, 4, 4):
        nnunet, tiles = predict(trained, network.presegmentor, image)
        total["nnunet"] += border_jumps(nnunet.softmax(0), tiles)
        total["ours"] += border_jumps(predictor.predict_volume(image).logits.softmax(0), tiles)
    assert total["ours"].ratio <= 1.1 * total["nnunet"].ratio


def test_reduced_precision_changes_no_more_than_rounding_explains(trained):
    """As stock prediction on a GPU does by autocast.

    Each of L layers rounds inputs, weights and outputs, so independent errors of relative size u (unit roundoff) add up to
    sqrt(3 L) u; softmax at most halves the difference of two logits. Rounding is eight times finer in float16 (u = 2^-11)
    than in bfloat16 (2^-8), and what is not rounding, for example other noise, would not shrink by that.
    """
    np.random.seed(0)
    image = next(trained.get_dataloaders()[0])["data"]
    network = trained.segmenter
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in network.modules())
    error = {}
    with torch.no_grad():
        exact = network(image)
        scale = (exact - exact.mean(1, keepdim=True)).pow(2).mean().sqrt().item()
        for dtype, roundoff in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            with torch.autocast("cpu", dtype=dtype):
                rounded = network(image)
            assert rounded.dtype == torch.float32
            assert rounded.abs().max() < 15
            error[dtype] = (rounded.softmax(1) - exact.softmax(1)).pow(2).mean().sqrt().item()
            assert 0 < error[dtype] < (3 * layers) ** 0.5 * roundoff * scale / 2
            assert (rounded.argmax(1) != exact.argmax(1)).float().mean() < 0.01
    assert 4 < error[torch.bfloat16] / error[torch.float16] < 16


class Loud(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *arguments):
        output = self.network(*arguments)
        return (output[0] if isinstance(output, (list, tuple)) else output) * 1e4


def test_logits_stay_bounded_in_the_predictors_float16_sums_however_large_the_networks_output(trained):
    image, network = next(cases(trained, 1, 12)), trained.segmenter
    forward = network.denoiser.forward
    presegmentor = network.presegmentor
    try:
        network.presegmentor = Loud(presegmentor)
        network.denoiser.forward = lambda *arguments: forward(*arguments) * 1e4
        logits, _ = predict(trained, network, image)
    finally:
        network.presegmentor = presegmentor
        del network.denoiser.forward
    assert torch.isfinite(logits).all()
    assert logits.abs().max() < 15


@pytest.mark.parametrize("base", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_nnunets_own_plans_build_and_run(hippocampus, tmp_path, monkeypatch, base, configuration):
    with hippocampus.in_process(tmp_path / "results"):
        if base == "nnUNetResEncUNetMPlans":
            monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # the planner takes it for its number of threads
            _, name = plan_experiment_dataset(4, nnUNetPlannerResEncM)
            assert name == base
        plans = PlansManager(str(hippocampus.preprocessed / f"{base}.json"))
        chosen = plans.get_configuration(configuration)
        network = DiffusionTrainer.build_network_architecture(plans, chosen, 1, 3, enable_deep_supervision=False)
        inner = "ResidualEncoderUNet" if "ResEnc" in base else "PlainConvUNet"
        assert type(network.presegmentor).__name__ == inner
        image = torch.randn(1, 1, *chosen.patch_size)
        logits = network.eval()(image)
        assert logits.shape == (1, 3, *chosen.patch_size)
        assert torch.isfinite(logits).all()


# several channels, several classes


def make_image(number, size=(40, 48), filled=True):
    """Two channels and a label map: class 1 is bright in the first channel, 2 in the second, 3 in both."""
    random = np.random.default_rng(number)
    labels = np.zeros(size, np.uint8)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for label in (1, 2, 3) if filled else ():
        row, column = (random.integers(length // 4, 3 * length // 4) for length in size)
        labels[(rows - row) ** 2 + (columns - column) ** 2 < (size[0] // 7) ** 2] = label
    channels = [np.isin(labels, shown) * 120 + random.normal(60, 10, size) for shown in ((1, 3), (2, 3))]
    return [channel.clip(0, 255).astype(np.uint8) for channel in channels], labels


@pytest.fixture
def several(workplace_type, tmp_path):
    """Ten training images, one of them small and one without foreground, and three such test images; planned."""
    place = workplace_type(tmp_path, "Dataset011_Several")
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (place.raw / folder).mkdir(parents=True)
    odd = {0: {"size": (20, 24)}, 1: {"filled": False}}
    for kind, numbers in (("Tr", range(10)), ("Ts", range(100, 103))):
        for number in numbers:
            channels, labels = make_image(number, **odd.get(number % 100, {}))
            for index, channel in enumerate(channels):
                Image.fromarray(channel).save(place.raw / f"images{kind}" / f"case_{number:03d}_{index:04d}.png")
            if kind == "Tr":
                Image.fromarray(labels).save(place.raw / "labelsTr" / f"case_{number:03d}.png")
    description = {
        "channel_names": {"0": "one", "1": "two"},
        "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
        "numTraining": 10,
        "file_ending": ".png",
    }
    with place.planned_in_process(tmp_path / "results", "2d", [32, 32], **description):
        yield place


def test_two_channels_and_four_classes_with_a_small_and_an_empty_image(several, tmp_path):
    """What nnUNetv2_plan_and_preprocess, nnUNetv2_train and nnUNetv2_predict do, in this process."""
    run_training("11", "2d", 0, "TinyDiffusionTrainer", "Tiny", device=torch.device("cpu"))
    folder = tmp_path / "results" / "Dataset011_Several" / "TinyDiffusionTrainer__Tiny__2d"
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    out = tmp_path / "out"
    out.mkdir()
    predictor.predict_from_files_sequential(str(several.raw / "imagesTs"), str(out), save_probabilities=True)
    for number, size in ((100, (20, 24)), (101, (40, 48)), (102, (40, 48))):
        found = np.array(Image.open(out / f"case_{number}.png"))
        assert found.shape == size
        probabilities = np.load(out / f"case_{number}.npz")["probabilities"]
        assert probabilities.shape == (4, 1, *size)
        assert np.allclose(probabilities.sum(0), 1, atol=1e-3)
        assert np.array_equal(probabilities.argmax(0)[0], found)
    summary = json.loads((folder / "fold_0" / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2", "3"}
