"""The terms of the training loss, around small networks whose answer is known."""

import dataclasses

import numpy as np
import pytest
import torch
from small_segmenters import SETTINGS, clean_state, cross_entropy, known, segmenter, terms_of

from nnunet_diffusion.model.objective import DenoisingObjective, PGDiffSegObjective
from nnunet_diffusion.model.out_of_fold import OutOfFold


def test_training_returns_finite_terms_and_touches_every_trainable_parameter():
    for kind in ("logits", "x0", "epsilon", "v"):
        truth_only = kind in ("epsilon", "v")
        network = segmenter(
            dataclasses.replace(
                SETTINGS, prediction_type=kind, starts={"truth": 1} if truth_only else {"truth": 0.5, "corrupted": 0.5}
            )
        )
        network.train()
        image, target = torch.randn(4, 1, 16, 16), torch.randint(0, 3, (4, 1, 16, 16))
        terms = terms_of(network, image, target, cross_entropy, torch.Generator().manual_seed(0))
        assert set(terms) == {"denoising", "presence", "location"}
        sum(terms.values()).backward()
        assert not network.presegmentor.training
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == name.startswith("denoiser."), name


def with_prediction(monkeypatch, network, prediction, noise, timestep):
    """Let the denoiser's answer in training be `prediction(noisy)`, for known noise; returns what it saw."""
    seen = []

    def evaluate(denoiser, noisy, image, t, features):
        seen.append(noisy)
        foreground = 3 if network.settings.regions else 2
        return prediction(noisy), torch.zeros(2, foreground), torch.zeros(2, foreground, 4, 4)

    monkeypatch.setattr(PGDiffSegObjective, "evaluations", {"denoiser": evaluate})
    monkeypatch.setattr(PGDiffSegObjective, "draw_noise", lambda *_: (timestep, noise))
    return seen


@pytest.mark.parametrize("kind", ["x0", "epsilon", "v"])
def test_training_loss_is_the_square_of_the_distance_from_the_target(kind, monkeypatch):
    target, noise = torch.randint(0, 3, (2, 1, 8, 8)), torch.randn(2, 3, 8, 8)
    settings = dataclasses.replace(SETTINGS, prediction_type=kind, starts={"truth": 1.0})
    network, timestep = known(None, settings), torch.tensor([20, 700])
    clean = clean_state(target, 3)
    alpha_bar = network.process.schedule.alpha_bar[timestep].float()
    signal, spread = (root.sqrt().view(2, 1, 1, 1) for root in (alpha_bar, 1 - alpha_bar))
    wanted = {"x0": clean, "epsilon": noise, "v": signal * noise - spread * clean}[kind]
    distance = torch.tensor([0.3, 0.5]).view(2, 1, 1, 1)
    seen = with_prediction(monkeypatch, network, lambda _: wanted + distance, noise, timestep)
    loss = terms_of(network, torch.randn(2, 1, 8, 8), target, None, torch.Generator())["denoising"]
    assert torch.allclose(seen[0], signal * clean + spread * noise, atol=1e-5)
    assert loss.item() == pytest.approx(float((distance.flatten() ** 2).mean()), rel=1e-3)


def test_training_draws_the_timesteps_it_is_asked_for():
    network = segmenter(dataclasses.replace(SETTINGS, max_train_step=300))
    timestep, noise = PGDiffSegObjective(network).draw_noise(
        torch.zeros(2000, 3, 1, 1), torch.Generator().manual_seed(0)
    )
    assert timestep.min() < 5 and 294 < timestep.max() < 300
    assert noise.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("regions", [False, True])
def test_ignored_voxels_start_from_the_presegmentation_and_change_neither_loss_nor_gradient(regions, monkeypatch):
    settings = dataclasses.replace(SETTINGS, prediction_type="x0", starts={"truth": 1.0}, regions=regions)
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
    seen = with_prediction(monkeypatch, network, lambda _: prediction, torch.zeros(2, 3, 8, 8), timestep)
    loss = terms_of(network, image, target, None, torch.Generator())["denoising"]
    (gradient,) = torch.autograd.grad(loss, prediction)
    ignored = ignored.expand(2, 3, 8, 8)
    assert ignored.any() and gradient[ignored].abs().max() == 0 and gradient[~ignored].abs().min() > 0
    signal = network.process.schedule.alpha_bar[timestep].float().sqrt().view(2, 1, 1, 1)
    expected = signal * (2 * network.presegment(image).probabilities - 1)
    assert torch.allclose(seen[0][ignored], expected[ignored], atol=1e-6)
    with torch.no_grad():
        prediction[ignored] += 7
    assert terms_of(network, image, target, None, torch.Generator())["denoising"].item() == pytest.approx(
        loss.item(), rel=1e-6
    )


def test_starts_are_truth_corrupted_or_presegmentation_in_the_asked_shares():
    settings = dataclasses.replace(SETTINGS, starts={"truth": 0.2, "corrupted": 0.5, "presegmentation": 0.3})
    network = segmenter(settings)
    image, clean = torch.randn(400, 1, 8, 8), clean_state(torch.randint(0, 3, (400, 1, 8, 8)), 3)
    start = PGDiffSegObjective(network).start(clean, image, torch.Generator().manual_seed(0))
    truth = (start == clean).flatten(1).all(1).float().mean()
    own = 2 * network.presegment(image).probabilities - 1
    preseg = torch.isclose(start, own).flatten(1).all(1).float().mean()
    assert truth.item() == pytest.approx(0.2, abs=0.08)
    assert preseg.item() == pytest.approx(0.3, abs=0.08)


def test_starts_out_of_fold_come_from_the_network_that_was_not_trained_on_the_case():
    settings = dataclasses.replace(SETTINGS, starts={"truth": 0.4, "out_of_fold": 0.6})
    objective = PGDiffSegObjective(segmenter(settings))
    image, clean = torch.randn(300, 1, 8, 8), clean_state(torch.randint(0, 3, (300, 1, 8, 8)), 3)
    cases = np.array([f"case{number % 4}" for number in range(300)])  # as nnU-Net's loader names them
    networks = [always(1), always(2)]
    objective.out_of_fold = OutOfFold(networks, {"case0": 0, "case1": 0, "case2": 1, "case3": 1}, regions=False)
    start = objective.start(clean, image, torch.Generator().manual_seed(0), cases)
    theirs = (start != clean).flatten(1).any(1)
    assert theirs.float().mean().item() == pytest.approx(0.6, abs=0.08)
    for number in theirs.nonzero()[:, 0].tolist():
        wanted = 1 if cases[number] in ("case0", "case1") else 2
        assert (start[number].argmax(0) == wanted).all()
    with pytest.raises(ValueError, match="not trained on case unknown"):
        objective.out_of_fold(image[:1], ["unknown"])
    objective.out_of_fold = None
    with pytest.raises(ValueError, match="share of out_of_fold, but the objective has no such networks"):
        objective.start(clean, image, torch.Generator().manual_seed(0), cases)


def always(label):
    """A network that finds one class everywhere."""
    network = torch.nn.Conv2d(1, 3, 1)
    network.weight.data.zero_()
    network.bias.data.copy_(20 * torch.nn.functional.one_hot(torch.tensor(label), 3))
    return network


def test_recycled_starts_are_the_denoisers_own_estimates_in_the_last_epochs():
    settings = dataclasses.replace(SETTINGS, starts={"truth": 0.5, "recycled": 0.5})
    logits = 20 * torch.nn.functional.one_hot(torch.tensor(2), 3).view(1, 3, 1, 1)
    network = known(lambda noisy: logits.expand(noisy.shape).float(), settings)
    objective = DenoisingObjective(network)
    objective.evaluations = {
        "denoiser": lambda denoiser, noisy, image, t, features: (seen.append(t), denoiser.answer(noisy))[1:]
    }
    image, clean = torch.randn(300, 1, 8, 8), clean_state(torch.zeros(300, 1, 8, 8), 3)
    timestep, seen = torch.arange(300) * 3, []
    objective.begin_epoch(recycling=False)
    assert torch.equal(objective.recycled(clean, image, image, timestep, torch.Generator().manual_seed(0)), clean)
    objective.begin_epoch(recycling=True)
    network.train()
    start = objective.recycled(clean, image, image, timestep, torch.Generator().manual_seed(0))
    assert network.denoiser.training
    own = (start.argmax(1) == 2).all((1, 2))
    assert own.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(start[~own], clean[~own])
    # from a noisier state than the one it begins
    assert (seen[0] >= timestep[own]).all() and seen[0].max() < settings.max_train_step
    assert (seen[0] - timestep[own]).float().mean() > 100


def test_the_condition_flow_sees_what_the_process_began_with_also_when_its_state_is_recycled(monkeypatch):
    starts = {"presegmentation": 0.5, "recycled": 0.5}
    settings = dataclasses.replace(SETTINGS, condition_on_presegmentation=True, starts=starts)
    network = segmenter(settings)
    objective, shown = PGDiffSegObjective(network), []
    evaluate = objective.evaluations["denoiser"]
    monkeypatch.setattr(
        PGDiffSegObjective, "evaluations", {"denoiser": lambda *inputs: (shown.append(inputs[2]), evaluate(*inputs))[1]}
    )
    objective.begin_epoch(recycling=True)
    image, target = torch.randn(8, 1, 16, 16), torch.randint(0, 3, (8, 1, 16, 16))
    ((_, terms),) = objective.turns(image, target, cross_entropy, torch.Generator().manual_seed(1))
    assert torch.isfinite(sum(terms.values()))
    own = 2 * network.presegment(image).probabilities - 1
    recycled, trained = shown  # some of the images, then all
    assert 0 < len(recycled) < 8
    torch.testing.assert_close(trained[:, 1:], own)


def test_the_draws_of_an_epoch_depend_on_its_seed_alone():
    objective = PGDiffSegObjective(
        segmenter(dataclasses.replace(SETTINGS, starts={"truth": 0.5, "presegmentation": 0.5}))
    )
    image, clean = torch.randn(50, 1, 8, 8), clean_state(torch.randint(0, 3, (50, 1, 8, 8)), 3)

    def epoch(seed, steps):
        generator = torch.Generator().manual_seed(seed)
        objective.begin_epoch(recycling=False)
        return [objective.start(clean, image, generator) for _ in range(steps)]

    first = epoch(1, 3)
    epoch(2, 5)
    assert all(torch.equal(one, other) for one, other in zip(first, epoch(1, 3), strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], epoch(2, 1)[0])


def test_deep_supervision_halves_the_weight_of_each_coarser_stage():
    objective = DenoisingObjective(known(None))
    target = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    target[:, :, :, 4:] = 2
    sizes = []

    def loss(logits, truth):
        sizes.append((tuple(logits.shape[2:]), tuple(truth.shape[2:]), truth.float().mean().item()))
        return logits.mean()

    heads = [torch.full((2, 3, 4, 4), 4.0), torch.full((2, 3, 2, 2), 8.0)]
    found = objective.segmentation(torch.full((2, 3, 8, 8), 1.0), heads, target, loss)
    assert found.item() == pytest.approx((1 + 4 / 2 + 8 / 4) / (1 + 1 / 2 + 1 / 4))
    assert sizes == [((8, 8), (8, 8), 1), ((4, 4), (4, 4), 1), ((2, 2), (2, 2), 1)]


def test_conditioning_on_the_presegmentation_reaches_the_condition_flow():
    settings = dataclasses.replace(SETTINGS, condition_on_presegmentation=True, starts={"corrupted": 1.0})
    network, image = segmenter(settings), torch.randn(1, 1, 16, 16)
    assert network.denoiser.image_channels == 4
    assert network(image).shape == (1, 3, 16, 16)
    network.train()
    terms = terms_of(network, image, torch.randint(0, 3, (1, 1, 16, 16)), cross_entropy, torch.Generator())
    assert torch.isfinite(sum(terms.values()))


def test_logits_need_a_segmentation_loss():
    with pytest.raises(ValueError, match="segmentation_loss"):
        terms_of(segmenter(), torch.randn(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), None)


def test_overfits_one_batch_from_noise():
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.randn(4, 1, 4, 4), size=(16, 16), mode="bilinear")
    target = (image > 0.3).long() + (image > 0.8).long()
    network = segmenter().train()
    optimizer = torch.optim.AdamW(network.denoiser.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        sum(terms_of(network, image, target, cross_entropy, generator).values()).backward()
        optimizer.step()
    network.eval()
    with network.overridden(start_step=1000, steps=5, from_noise=True):
        found = network(image).argmax(1)
    for label in (1, 2):
        mine, truth = found == label, target[:, 0] == label
        assert 2 * (mine & truth).sum() / (mine.sum() + truth.sum()) > 0.95


def test_training_without_a_generator_draws_new_noise_each_time():
    network, image, target = segmenter(), torch.randn(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    found = [terms_of(network, image, target, cross_entropy)["denoising"].item() for _ in range(3)]
    assert len(set(found)) == 3
    torch.manual_seed(5)
    one = terms_of(network, image, target, cross_entropy)["denoising"].item()
    torch.manual_seed(5)
    assert terms_of(network, image, target, cross_entropy)["denoising"].item() == one
