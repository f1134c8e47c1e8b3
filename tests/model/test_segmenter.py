"""The segmenter around small networks whose answer is known."""

import dataclasses
import math

import pytest
import torch
from small_segmenters import SETTINGS, clean_state, known, pgdiffseg, probabilities_of, segmenter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nnunet_diffusion.model.segmenter
from nnunet_diffusion.diffusion.samplers import sample, timestep_grid
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.segmenter import DiffusionSegmenter


@pytest.mark.parametrize("dimension", [2, 3])
def test_segmenting_twice_gives_the_same_bounded_logits_in_a_fresh_tensor(dimension):
    network, image = segmenter(dimension=dimension), torch.randn(2, 1, *(13, 16, 9)[:dimension])
    first = network(image)
    kept = first.clone()
    first += 1  # nnU-Net adds mirrored outputs in place
    second = network(image)
    assert torch.equal(second, kept)
    assert second.shape == (2, 3, *image.shape[2:])
    assert second.dtype == torch.float32
    assert second.abs().max() < 15


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_seed_decides_and_the_cached_noise_is_the_same_as_fresh_noise(sampler):
    settings = dataclasses.replace(SETTINGS, sampler=sampler)
    image, other = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16)
    fresh = segmenter(settings)(image)
    used = segmenter(settings)
    used(other)
    assert torch.equal(used(image), fresh)
    assert not torch.equal(segmenter(dataclasses.replace(settings, seed=2))(image), fresh)


def test_perfect_denoiser_gives_the_truth_from_any_start():
    truth = torch.randint(0, 3, (1, 1, 8, 8))
    logits = clean_state(truth, 3) * 20
    for start_step, steps in ((1, 1), (300, 1), (300, 7), (1000, 20)):
        settings = dataclasses.replace(SETTINGS, start_step=start_step, steps=steps)
        assert torch.equal(known(lambda _: logits, settings)(torch.randn(1, 1, 8, 8)).argmax(1), truth[:, 0])


def test_identity_denoiser_without_noise_level_returns_the_presegmentation():
    settings = dataclasses.replace(SETTINGS, start_step=1, steps=1, prediction_type="x0", starts={"truth": 1.0})
    network = known(lambda noisy: noisy, settings)
    image = torch.randn(1, 1, 8, 8)
    clear = network.presegment(image).probabilities.topk(2, dim=1).values
    clear = (clear[:, 0] - clear[:, 1]) > 0.1  # one noising step has a standard deviation of 0.01
    assert torch.equal(network(image).argmax(1)[clear], network.presegment(image).probabilities.argmax(1)[clear])


class Casts(TorchDispatchMode):
    """Counts conversions of tensors of some shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # in inference mode they come as `to`
        name = function.overloadpacket
        if name in (torch.ops.aten._to_copy, torch.ops.aten.to) and args[0].shape in self.shapes:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autocast_converts_weights_once_not_at_each_patch(mode):
    """Each conversion of a weight is one more kernel that waits to be launched."""
    presegmentor = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1))
    network = DiffusionSegmenter(presegmentor, pgdiffseg(), dataclasses.replace(SETTINGS, steps=1))
    assert not any(parameter.requires_grad for parameter in presegmentor.parameters())
    network.eval()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for again in (False, True, True):
            with Casts({convolution.weight.shape for convolution in convolutions}) as casts:
                network.sample(torch.randn(1, 1, 17, 19))
            assert casts.count == (0 if again else len(convolutions))
    network.train()
    assert not any(parameter.requires_grad for parameter in presegmentor.parameters())


def test_network_calls_are_counted_and_the_condition_is_shared_by_all_samples():
    settings = dataclasses.replace(SETTINGS, steps=4, samples=5)
    network = known(lambda noisy: noisy, settings)
    network(torch.randn(1, 1, 8, 8))
    assert network.evaluations == 20
    assert len(network.denoiser.encoded) == 4
    # no more than four at once: the number of samples is the user's, the memory is not
    wanted = [(timestep, size) for timestep in timestep_grid(300, 4) for size in (4, 1)]
    assert network.denoiser.evaluated == wanted


def test_samples_that_take_turns_are_those_that_come_at_once(monkeypatch):
    network, image = segmenter(dataclasses.replace(SETTINGS, steps=2, samples=5)), torch.randn(2, 1, 16, 16)
    in_turn = network.sample(image)
    monkeypatch.setattr(nnunet_diffusion.model.segmenter, "SAMPLES_PER_CALL", 5)
    torch.testing.assert_close(network.sample(image), in_turn)


def test_condition_flow_without_time_is_evaluated_once():
    settings = dataclasses.replace(SETTINGS, steps=4, time_in_condition_flow=False)
    network = known(lambda noisy: noisy, settings)
    network(torch.randn(1, 1, 8, 8))
    assert len(network.denoiser.encoded) == 1


def test_mean_over_samples_equals_separate_samples():
    network, image = segmenter(dataclasses.replace(SETTINGS, samples=3)), torch.randn(2, 1, 16, 16)
    states = []
    mean = network.sample(image, on_step=lambda timestep, noisy, clean: states.append(clean))
    members = probabilities_of(states[-1]).view(2, 3, 3, 16, 16)
    torch.testing.assert_close(mean, members.mean(1))
    assert (members[:, 0] - members[:, 1]).abs().max() > 1e-4


def test_presegmentation_weight_mixes_the_start_in():
    image = torch.randn(1, 1, 16, 16)
    network = segmenter()
    result, start = network.sample(image), network.presegment(image).probabilities
    with network.overridden(presegmentation_weight=0.25):
        torch.testing.assert_close(network.sample(image), 0.75 * result + 0.25 * start)
    assert network.settings.presegmentation_weight == 0


def test_given_start_is_not_mixed_in_and_the_presegmentor_is_evaluated_once():
    image, given = torch.randn(1, 1, 16, 16), labels.foreground_to_probabilities(torch.zeros(1, 2, 16, 16))
    network, calls = segmenter(), []
    network.presegmentor.register_forward_hook(lambda *_: calls.append(1))
    alone = network.sample(image, presegmentation=given)
    assert not calls
    with network.overridden(presegmentation_weight=0.5):
        assert torch.equal(network.sample(image, presegmentation=given), alone)
        network.sample(image)
    assert len(calls) == 1


def test_with_the_previous_stage_as_start_the_member_is_the_presegmentor():
    image = torch.randn(1, 1, 16, 16)
    network, mask = segmenter(), torch.rand(1, 2, 16, 16).round() / 2
    network.presegmentor = nn.Conv2d(3, 3, 1)
    network.denoiser.image_channels, network.denoiser.image_dense = 3, nn.Conv2d(3, 8, 1)
    network.denoiser.prior.block[0] = nn.Conv2d(3, 8, 3, padding=1)
    staged = torch.cat((image, mask), 1)
    with network.overridden(start_from="previous_stage"):
        alone = network.sample(staged)
        with network.overridden(presegmentation_weight=0.5):
            torch.testing.assert_close(network.sample(staged), (alone + network.presegment(staged).probabilities) / 2)


def test_given_presegmentation_replaces_the_own_and_pure_noise_needs_none():
    class Forbidden(nn.Module):
        def forward(self, image):
            raise AssertionError("the pre-segmentor was called")

    image, given = torch.randn(1, 1, 8, 8), torch.full((1, 3, 8, 8), 1 / 3)
    settings = dataclasses.replace(SETTINGS, start_step=1000, from_noise=True)
    known(lambda noisy: noisy, settings, Forbidden())(image)
    known(lambda noisy: noisy, SETTINGS, Forbidden()).sample(image, presegmentation=given)


def test_near_total_noise_forgets_the_presegmentation():
    image = torch.randn(1, 1, 16, 16)
    late, early = {"start_step": 1000, "steps": 2}, {"start_step": 100, "steps": 2}
    difference = []
    for changes in (late, early):
        with segmenter().overridden(**changes) as network:
            one, two = (probabilities_of(clean_state(torch.full((1, 1, 16, 16), k), 3)) for k in (0, 2))
            difference.append((network.sample(image, one) - network.sample(image, two)).abs().max().item())
    assert difference[0] < 0.1 * difference[1]


def test_small_errors_of_epsilon_do_not_spoil_a_process_from_pure_noise():
    """Near T the cosine schedule divides them by 5e-5: without clamping every voxel would end in one class."""
    network = segmenter(
        dataclasses.replace(SETTINGS, prediction_type="epsilon", schedule="cosine", starts={"truth": 1.0})
    )
    process = network.process
    share = 0.8  # of +1; the rest is -1
    prior = 0.5 * math.log(share / (1 - share))

    def estimate(noisy, timestep):
        alpha_bar = process.schedule.exact(timestep, noisy.ndim).to(noisy)
        signal, variance = alpha_bar.sqrt(), 1 - alpha_bar
        expected = torch.tanh(signal * noisy / variance + prior)
        epsilon = (noisy - signal * expected) / variance.sqrt() + 0.02
        return network.prediction.to_clean(epsilon, noisy, timestep, process)

    noise = torch.randn((1, 1, 100, 100), generator=torch.Generator().manual_seed(0))
    result = sample("ddim", estimate, noise, 1000, 10, process)
    assert (result > 0).float().mean() == pytest.approx(share, abs=0.1)
