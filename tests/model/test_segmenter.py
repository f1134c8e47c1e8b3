"""The segmenter around small networks whose answer is known."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nnunet_diffusion.model.segmenter
from nnunet_diffusion.diffusion.samplers import sample, timestep_grid
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

SETTINGS = DiffusionSettings(
    features_per_stage=(8, 8, 16), prediction_type="logits", start_step=300, steps=3, presegmentation_weight=0.0
)


def cross_entropy(logits, target):
    return nn.functional.cross_entropy(logits, target[:, 0].long())


def pgdiffseg(settings=SETTINGS, classes=3, dimension=2):
    return PGDiffSeg(
        1 + classes * settings.condition_on_presegmentation,
        classes,
        classes,
        settings.features_per_stage,
        [1, 2, 2],
        [3, 3, 3],
        nn.Conv2d if dimension == 2 else nn.Conv3d,
        presence_classes=classes - 1,
        location_classes=classes - 1,
        sdb_depth=2,
        attention_tokens=64,
        norm="instance",
        time_in_condition_flow=settings.time_in_condition_flow,
    )


def segmenter(settings=SETTINGS, classes=3, dimension=2):
    torch.manual_seed(0)
    conv = nn.Conv2d if dimension == 2 else nn.Conv3d
    return DiffusionSegmenter(conv(1, classes, 3, padding=1), pgdiffseg(settings, classes, dimension), settings).eval()


class KnownDenoiser(nn.Module):
    """Predicts logits from the noisy state by a given function; counts its calls."""

    def __init__(self, classes, answer):
        super().__init__()
        self.state_channels, self.answer = classes, answer
        self.encoded, self.evaluated = [], []

    def encode(self, image, timestep):
        self.encoded.append(int(timestep[0]))
        return self

    def repeat_interleave(self, samples):
        return self

    def forward(self, noisy, timestep, condition):
        self.evaluated.append((int(timestep[0]), len(noisy)))
        return self.answer(noisy)


def known(answer, settings=SETTINGS, presegmentor=None):
    return DiffusionSegmenter(presegmentor or nn.Conv2d(1, 3, 1), KnownDenoiser(3, answer), settings).eval()


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
    logits = labels.labels_to_state(truth, 3) * 20
    for start_step, steps in ((1, 1), (300, 1), (300, 7), (1000, 20)):
        settings = dataclasses.replace(SETTINGS, start_step=start_step, steps=steps)
        assert torch.equal(known(lambda _: logits, settings)(torch.randn(1, 1, 8, 8)).argmax(1), truth[:, 0])


def test_identity_denoiser_without_noise_level_returns_the_presegmentation():
    settings = dataclasses.replace(SETTINGS, start_step=1, steps=1, prediction_type="x0", corruption_probability=0.0)
    network = known(lambda noisy: noisy, settings)
    image = torch.randn(1, 1, 8, 8)
    clear = network.presegment(image).topk(2, dim=1).values
    clear = (clear[:, 0] - clear[:, 1]) > 0.1  # one noising step has a standard deviation of 0.01
    assert torch.equal(network(image).argmax(1)[clear], network.presegment(image).argmax(1)[clear])


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
    monkeypatch.setattr(nnunet_diffusion.model.segmenter, "SAMPLES_AT_ONCE", 5)
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
    members = labels.state_to_probabilities(states[-1]).view(2, 3, 3, 16, 16)
    torch.testing.assert_close(mean, members.mean(1))
    assert (members[:, 0] - members[:, 1]).abs().max() > 1e-4


def test_presegmentation_weight_mixes_the_start_in():
    image = torch.randn(1, 1, 16, 16)
    network = segmenter()
    result, start = network.sample(image), network.presegment(image)
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
            torch.testing.assert_close(network.sample(staged), (alone + network.presegment(staged)) / 2)


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
            one, two = (
                labels.state_to_probabilities(labels.labels_to_state(torch.full((1, 1, 16, 16), k), 3)) for k in (0, 2)
            )
            difference.append((network.sample(image, one) - network.sample(image, two)).abs().max().item())
    assert difference[0] < 0.1 * difference[1]


def test_training_returns_finite_terms_and_touches_every_trainable_parameter():
    for kind in ("logits", "x0", "epsilon", "v"):
        truth_only = kind in ("epsilon", "v")
        network = segmenter(
            dataclasses.replace(SETTINGS, prediction_type=kind, corruption_probability=0.5 * (not truth_only))
        )
        network.train()
        image, target = torch.randn(4, 1, 16, 16), torch.randint(0, 3, (4, 1, 16, 16))
        terms = network(image, target, cross_entropy, torch.Generator().manual_seed(0))
        assert set(terms) == {"denoising", "presence", "location"}
        sum(terms.values()).backward()
        assert not network.presegmentor.training
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == name.startswith("denoiser."), name


def with_prediction(network, prediction, noise, timestep):
    """Let the denoiser's answer in training be `prediction(noisy)`, for known noise; returns what it saw."""
    seen = []

    def evaluate(denoiser, noisy, image, t):
        seen.append(noisy)
        foreground = 3 if network.settings.regions else 2
        return prediction(noisy), torch.zeros(2, foreground), torch.zeros(2, foreground, 4, 4)

    network._evaluate = evaluate
    network._training_noise = lambda clean, generator: (timestep, noise)
    return seen


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("kind", ["x0", "epsilon", "v"])
def test_training_loss_is_the_weighted_square_of_the_distance_from_the_target(kind, gamma):
    target, noise = torch.randint(0, 3, (2, 1, 8, 8)), torch.randn(2, 3, 8, 8)
    settings = dataclasses.replace(SETTINGS, prediction_type=kind, min_snr_gamma=gamma, corruption_probability=0.0)
    network, timestep = known(None, settings), torch.tensor([20, 700])
    clean = labels.labels_to_state(target, 3)
    alpha_bar = network.process.schedule.alpha_bar[timestep].float()
    signal, spread = (root.sqrt().view(2, 1, 1, 1) for root in (alpha_bar, 1 - alpha_bar))
    wanted = {"x0": clean, "epsilon": noise, "v": signal * noise - spread * clean}[kind]
    distance = torch.tensor([0.3, 0.5]).view(2, 1, 1, 1)
    seen = with_prediction(network, lambda _: wanted + distance, noise, timestep)
    loss = network(torch.randn(2, 1, 8, 8), target, None, torch.Generator())["denoising"]
    assert torch.allclose(seen[0], signal * clean + spread * noise, atol=1e-5)
    # Hang et al. 2023: the same loss on x_0, whatever is predicted
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=gamma) / {"x0": 1, "epsilon": snr, "v": snr + 1}[kind] if gamma else torch.ones(2)
    assert loss.item() == pytest.approx(float((weight * distance.flatten() ** 2).mean()), rel=1e-3)


def test_training_draws_the_timesteps_it_is_asked_for():
    network = segmenter(dataclasses.replace(SETTINGS, max_train_step=300))
    timestep, noise = network._training_noise(torch.zeros(2000, 3, 1, 1), torch.Generator().manual_seed(0))
    assert timestep.min() < 5 and 294 < timestep.max() < 300
    assert noise.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_start_from_the_presegmentation_and_change_neither_loss_nor_gradient(regions):
    settings = dataclasses.replace(SETTINGS, prediction_type="x0", corruption_probability=0.0, regions=regions)
    network, timestep = known(None, settings), torch.tensor([50, 300])
    image = torch.randn(2, 1, 8, 8)
    if regions:  # masks as nnU-Net's loader gives them, the last one marks what is ignored
        target = torch.randint(0, 2, (2, 4, 8, 8)).float()
        ignored = target[:, 3:] = (torch.rand(2, 1, 8, 8) < 0.3).float()
        ignored = ignored.bool()
    else:
        target = torch.randint(0, 4, (2, 1, 8, 8))
        ignored = target == 3
    network.ignore_label = 3
    prediction = torch.randn(2, 3, 8, 8, requires_grad=True)
    seen = with_prediction(network, lambda _: prediction, torch.zeros(2, 3, 8, 8), timestep)
    loss = network(image, target, None, torch.Generator())["denoising"]
    (gradient,) = torch.autograd.grad(loss, prediction)
    ignored = ignored.expand(2, 3, 8, 8)
    assert ignored.any() and gradient[ignored].abs().max() == 0 and gradient[~ignored].abs().min() > 0
    signal = network.process.schedule.alpha_bar[timestep].float().sqrt().view(2, 1, 1, 1)
    expected = signal * labels.probabilities_to_state(network.presegment(image))
    assert torch.allclose(seen[0][ignored], expected[ignored], atol=1e-6)
    with torch.no_grad():
        prediction[ignored] += 7
    assert network(image, target, None, torch.Generator())["denoising"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_starts_are_truth_corrupted_or_presegmentation_in_the_asked_shares():
    settings = dataclasses.replace(SETTINGS, corruption_probability=0.5, presegmentation_start_probability=0.3)
    network = segmenter(settings)
    image, clean = torch.randn(400, 1, 8, 8), labels.labels_to_state(torch.randint(0, 3, (400, 1, 8, 8)), 3)
    start = network._training_start(clean, image, torch.Generator().manual_seed(0))
    truth = (start == clean).flatten(1).all(1).float().mean()
    own = labels.probabilities_to_state(network.presegment(image))
    preseg = torch.isclose(start, own).flatten(1).all(1).float().mean()
    assert truth.item() == pytest.approx(0.2, abs=0.08)
    assert preseg.item() == pytest.approx(0.3, abs=0.08)


def test_conditioning_on_the_presegmentation_reaches_the_condition_flow():
    settings = dataclasses.replace(SETTINGS, condition_on_presegmentation=True, corruption_probability=1.0)
    network, image = segmenter(settings), torch.randn(1, 1, 16, 16)
    assert network.denoiser.image_channels == 4
    assert network(image).shape == (1, 3, 16, 16)
    network.train()
    terms = network(image, torch.randint(0, 3, (1, 1, 16, 16)), cross_entropy, torch.Generator())
    assert torch.isfinite(sum(terms.values()))


def test_logits_need_a_segmentation_loss():
    with pytest.raises(ValueError, match="segmentation_loss"):
        segmenter()(torch.randn(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))


def test_overfits_one_batch_from_noise():
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.randn(4, 1, 4, 4), size=(16, 16), mode="bilinear")
    target = (image > 0.3).long() + (image > 0.8).long()
    network = segmenter().train()
    optimizer = torch.optim.AdamW(network.denoiser.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        sum(network(image, target, cross_entropy, generator).values()).backward()
        optimizer.step()
    network.eval()
    with network.overridden(start_step=1000, steps=5, from_noise=True):
        found = network(image).argmax(1)
    for label in (1, 2):
        mine, truth = found == label, target[:, 0] == label
        assert 2 * (mine & truth).sum() / (mine.sum() + truth.sum()) > 0.95


def test_small_errors_of_epsilon_do_not_spoil_a_process_from_pure_noise():
    """Near T the cosine schedule divides them by 5e-5: without clamping every voxel would end in one class."""
    process = segmenter(
        dataclasses.replace(SETTINGS, prediction_type="epsilon", schedule="cosine", corruption_probability=0.0)
    ).process
    share = 0.8  # of +1; the rest is -1
    prior = 0.5 * math.log(share / (1 - share))

    def predict(noisy, timestep):
        alpha_bar = process.schedule.exact(timestep, noisy.ndim).to(noisy)
        signal, variance = alpha_bar.sqrt(), 1 - alpha_bar
        expected = torch.tanh(signal * noisy / variance + prior)
        return (noisy - signal * expected) / variance.sqrt() + 0.02

    noise = torch.randn((1, 1, 100, 100), generator=torch.Generator().manual_seed(0))
    result = sample("ddim", predict, noise, 1000, 10, process)
    assert (result > 0).float().mean() == pytest.approx(share, abs=0.1)


def test_training_without_a_generator_draws_new_noise_each_time():
    network, image, target = segmenter(), torch.randn(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    found = [network(image, target, cross_entropy)["denoising"].item() for _ in range(3)]
    assert len(set(found)) == 3
    torch.manual_seed(5)
    one = network(image, target, cross_entropy)["denoising"].item()
    torch.manual_seed(5)
    assert network(image, target, cross_entropy)["denoising"].item() == one
