"""nnU-Net with averaged weights: what is averaged, saved and resumed, and that it can be the pre-segmentor."""

import pytest
import torch

from nnunet_diffusion.training import nnUNetTrainerEMA
from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.nnunet


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (2, 1, 32, 32), generator=generator).float()
    scaled = [target, target[:, :, ::2, ::2]]
    return {"data": torch.randn(2, 1, 32, 32, generator=generator), "target": scaled, "keys": ["a", "b"]}


def started(place):
    torch.manual_seed(0)
    trainer = place.trainer(nnUNetTrainerEMA)
    trainer.initialize()
    trainer.on_train_epoch_start()
    return trainer


def copy_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_average_equals_the_hand_computed_one(workplace):
    trainer = started(workplace)
    weights = []
    for seed in range(4):
        trainer.train_step(batch(seed))
        weights.append(copy_of(trainer.network))
    expected = weights[0]
    for step, current in enumerate(weights[1:], start=1):
        decay = (1 + step) / (10 + step)
        expected = {key: decay * value + (1 - decay) * current[key] for key, value in expected.items()}
    for key, value in trainer.average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_checkpoint_has_the_average_for_inference_and_resuming_goes_on_exactly(workplace, tmp_path):
    trainer = started(workplace)
    for seed in range(3):
        trainer.train_step(batch(seed))
    raw, averaged = copy_of(trainer.network), copy_of(trainer.average.module)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    saved = read_checkpoint(tmp_path / "checkpoint.pth")["network_weights"]
    assert all(torch.equal(saved[key], averaged[key]) for key in averaged)
    assert any(not torch.equal(saved[key], raw[key]) for key in raw)
    assert all(torch.equal(value, raw[key]) for key, value in trainer.network.state_dict().items()), "left as they were"

    resumed = started(workplace)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    for each in (trainer, resumed):
        each.train_step(batch(7))
    for ours, theirs in ((trainer.network, resumed.network), (trainer.average.module, resumed.average.module)):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key


def test_validation_is_by_the_average(workplace, monkeypatch):
    trainer = started(workplace)
    for seed in range(3):
        trainer.train_step(batch(seed))
    averaged, raw, seen = copy_of(trainer.average.module), copy_of(trainer.network), []
    trainer.network.register_forward_hook(lambda module, *_: seen.append(copy_of(module)))
    with torch.no_grad():
        trainer.validation_step(batch(5))
    assert all(torch.equal(seen[0][key], averaged[key]) for key in averaged)
    assert all(torch.equal(value, raw[key]) for key, value in trainer.network.state_dict().items())


@pytest.mark.slow
def test_it_is_trained_first_where_the_plans_name_it_and_embedded_with_its_average(hippocampus, tmp_path):
    place = hippocampus
    place.write_plans("Averaged", "2d", patch=[32, 32], version=3, presegmentor={"trainer": "TinynnUNetTrainerEMA"})
    words = [4, "2d", 0, "-tr", "TinyDiffusionTrainer", "-p", "Averaged", "-device", "cpu"]
    log = place.run("nnUNetv2_train", *words, nnUNet_results=str(tmp_path)).stdout
    assert "TinynnUNetTrainerEMA of fold 0 is not trained yet" in log
    first, ours = (
        read_checkpoint(tmp_path / place.dataset / f"{name}__Averaged__2d" / "fold_0" / "checkpoint_final.pth")
        for name in ("TinynnUNetTrainerEMA", "TinyDiffusionTrainer")
    )
    assert first["averaged_steps"] == 4
    for key, value in first["network_weights"].items():
        assert torch.equal(ours["network_weights"][f"presegmentor.{key}"], value)
    assert any(not torch.equal(first["raw_weights"][key], value) for key, value in first["network_weights"].items())
