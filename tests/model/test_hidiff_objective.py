"""HiDiff's two turns: who learns from what, and the terms of the refiner's loss against known answers."""

import contextlib
import dataclasses
from functools import partial

import pytest
import torch
from small_hidiff import SETTINGS, hidiff
from torch import nn

from nnunet_diffusion.diffusion.bernoulli import BernoulliProcess
from nnunet_diffusion.diffusion.schedules import bernoulli_schedule
from nnunet_diffusion.model import hidiff_objective, labels
from nnunet_diffusion.model.build import build_objective
from nnunet_diffusion.model.hidiff_objective import bernoulli_divergence, refinement
from nnunet_diffusion.planning.steps import nnunet_loss
from nnunet_diffusion.training.learner import Learner, train_step


def batch(regions=False):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 1, 16, 16, generator=generator)
    return image, torch.randint(0, 2 if regions else 3, (4, 3 if regions else 1, 16, 16), generator=generator)


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def turns(network, image, target, loss=None):
    generator = torch.Generator().manual_seed(2)
    loss = loss or nnunet_loss(network.settings.regions)
    yield from build_objective(network).turns(image, target, loss, generator)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_each_turn_touches_every_parameter_of_its_own_network_and_none_of_the_other(weight, regions):
    network = hidiff(dataclasses.replace(SETTINGS, collaboration_weight=weight, regions=regions)).train()
    image, target = batch(regions)
    found = []
    for name, terms in _stepped(network, image, target):
        found += terms
        other = "presegmentor" if name == "denoiser" else "denoiser"
        assert terms
        learning, resting = getattr(network, name), getattr(network, other)
        trained = [key for key, parameter in learning.named_parameters() if parameter.requires_grad]
        assert sorted(gradients(learning)) == sorted(trained) and not gradients(resting)
        learning.zero_grad(set_to_none=True)
    assert tuple(found) == build_objective(network).terms
    assert all(parameter.requires_grad for parameter in network.denoiser.parameters())
    # the coarsest output of nnU-Net has no part in its loss
    frozen = [key for key, parameter in network.presegmentor.named_parameters() if not parameter.requires_grad]
    assert frozen and all(key.startswith("decoder.seg_layers.0.") for key in frozen)


def _stepped(network, image, target, loss=None):
    for name, terms in turns(network, image, target, loss):
        sum(terms.values()).backward()
        yield name, terms


def test_the_refiners_loss_reaches_the_segmentor_through_its_probabilities_and_its_features(monkeypatch):
    image, target = batch()

    def nothing(logits, _):
        return 0 * logits.sum()

    def reach(settings):
        network = hidiff(settings).train()
        nn.init.normal_(network.denoiser.output[-1].weight, std=0.1)  # 0 before training
        (_, _), (name, terms) = _stepped(network, image, target, nothing)
        assert name == "presegmentor"
        return {key: float(value.abs().max()) for key, value in gradients(network.presegmentor).items()}, terms

    alone, terms = reach(dataclasses.replace(SETTINGS, collaboration_weight=0.0))
    assert set(terms) == {"segmentation"} and max(alone.values()) == 0
    together, terms = reach(SETTINGS)
    assert set(terms) == {"segmentation", "collaboration"}
    assert together["decoder.seg_layers.1.weight"] > 0  # p
    # without p only the features are left: the encoder's weights, none of the decoder's
    monkeypatch.setattr(labels, "activate", lambda logits, regions: logits.detach().softmax(1))
    by_features, _ = reach(SETTINGS)
    assert by_features["encoder.stages.0.0.convs.0.conv.weight"] > 0
    assert all(value == 0 for key, value in by_features.items() if key.startswith("decoder.seg_layers"))


def test_collaboration_is_lambda_times_the_refiners_loss():
    network = hidiff(dataclasses.replace(SETTINGS, collaboration_weight=0.25)).eval()
    (_, refiners), (_, segmentors) = turns(network, *batch())
    # no step between the turns, so the refiner says the same again
    assert float(segmentors["collaboration"]) == pytest.approx(0.25 * float(sum(refiners.values())), rel=1e-5)


def test_both_turns_see_the_same_noisy_states_and_nnunet_is_evaluated_once(monkeypatch):
    network, seen = hidiff().train(), []
    kinds = hidiff_objective.HiDiffObjective.evaluations

    def refine(refiner, noisy, image, timestep, features):
        seen.append((noisy, timestep, image.requires_grad, any(each.requires_grad for each in features)))
        return kinds["denoiser"](refiner, noisy, image, timestep, features)

    calls = []

    def segment(segmentor, image):
        calls.append(len(image))
        return kinds["presegmentor"](segmentor, image)

    monkeypatch.setattr(hidiff_objective.HiDiffObjective, "evaluations", {"denoiser": refine, "presegmentor": segment})
    list(_stepped(network, *batch()))
    assert calls == [4] and len(seen) == 2
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2:] == (False, False) and seen[1][2:] == (True, True)
    assert set(seen[0][0].unique().tolist()) == {0, 1} and int(seen[0][1].max()) < 10


def test_half_of_the_samples_have_the_timestep_with_which_the_reverse_process_begins():
    objective, clean = build_objective(hidiff()), torch.zeros(20_000, 1, 1, 1)
    timestep, noise = objective.draw_noise(clean, torch.Generator().manual_seed(0))
    shares = torch.bincount(timestep, minlength=10) / len(clean)
    assert shares[:9] == pytest.approx(torch.full((9,), 0.05), abs=0.01)
    assert float(shares[9]) == pytest.approx(0.55, abs=0.02)
    assert noise.shape == clean.shape and 0 <= float(noise.min()) < float(noise.max()) < 1


def states(timestep, seed=0):
    """Truth, prior, noisy state and the process, for given timesteps."""
    generator = torch.Generator().manual_seed(seed)
    truth = labels.Target(labels.labels_to_masks(torch.randint(0, 3, (len(timestep), 1, 8, 8), generator=generator), 3))
    prior = torch.rand(truth.masks.shape, generator=generator)
    process = BernoulliProcess(bernoulli_schedule("linear", 10)).towards(prior)
    noise = process.draw_noise(prior.shape, generator)
    return truth, process.add_noise(truth.masks, noise, timestep), process


def test_a_perfect_refiner_has_no_loss_and_the_terms_of_a_wrong_one_are_those_of_their_formulas():
    timestep = torch.tensor([0, 3, 9])
    truth, noisy, process = states(timestep)
    clean = truth.masks
    flipped = (noisy - clean).abs()
    perfect = refinement(80 * (2 * flipped - 1), noisy, clean, timestep, process, truth)
    assert all(float(value) == pytest.approx(0, abs=1e-5) for value in perfect.values())
    added = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(5))
    found = refinement(added, noisy, clean, timestep, process, truth)
    known = process.clean_logit(noisy, timestep)
    # where y_t is 1, a flip means 0
    flip = added + torch.where(noisy > 0.5, -known, known)
    estimate = (noisy - flip.sigmoid()).abs()
    divergences = [nn.functional.binary_cross_entropy(estimate[0], clean[0], reduction="none")]
    for place, step in ((1, 3), (2, 9)):
        one, other = (
            torch.distributions.Bernoulli(
                probs=dataclasses.replace(process, prior=process.prior[place : place + 1])
                .posterior(each[place : place + 1], noisy[place : place + 1], step, step - 1)
                .probability.clamp(1e-6, 1 - 1e-6)
            )
            for each in (clean, estimate)
        )
        divergences.append(torch.distributions.kl_divergence(one, other)[0])
    assert float(found["posterior"]) == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-3)
    right = torch.where(flipped > 0.5, flip.sigmoid(), 1 - flip.sigmoid())
    assert float(found["flip"]) == pytest.approx(float(((1 - right) ** 2 * -right.log()).mean()), rel=1e-4)


def test_the_divergence_is_that_of_two_bernoulli_distributions():
    wanted, found = torch.rand(1000) * 0.98 + 0.01, torch.rand(1000) * 0.98 + 0.01
    known = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(probs=wanted), torch.distributions.Bernoulli(probs=found)
    )
    assert torch.allclose(bernoulli_divergence(wanted, found), known, atol=1e-5)
    certain = bernoulli_divergence(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]))
    assert certain[:2].abs().max() < 1e-5 and torch.isfinite(certain).all()


def test_ignored_voxels_have_no_part_in_the_loss():
    network, (image, target) = hidiff().eval(), batch()
    network.ignore_label = 3
    target = target.clone()
    target[:, :, :5] = 3

    def plain(logits, wanted):
        return nn.functional.cross_entropy(logits, wanted[:, 0].long(), ignore_index=3)

    def losses_at(changed):
        def refine(refiner, noisy, seen, timestep, features):
            found = hidiff_objective.evaluate_refiner(refiner, noisy, seen, timestep, features)
            return torch.cat((found[:, :, :5] + changed, found[:, :, 5:]), 2)

        evaluate = {
            "denoiser": lambda *inputs: refine(network.denoiser, *inputs),
            "presegmentor": lambda image: hidiff_objective.evaluate_segmentor(network.presegmentor, image),
        }
        generator = torch.Generator().manual_seed(0)
        (_, terms), _ = build_objective(network).turns(image, target, plain, generator, evaluate)
        return {name: float(value) for name, value in terms.items()}

    assert losses_at(0.0) == losses_at(7.0)


def test_compiled_networks_take_the_steps_of_the_others_with_all_three_evaluations_compiled(monkeypatch):
    """Dynamo's graphs run eagerly, so that the test takes seconds; of the refiner there are two, with and without gradients."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = hidiff().train()
        objective = build_objective(network)
        learners = {}
        for name, evaluate in objective.evaluations.items():
            module = getattr(network, name)
            learners[name] = Learner(module, evaluate, torch.optim.AdamW(module.parameters(), 1e-3, fused=True), 0.9)
        if compiled:
            for learner in learners.values():
                learner.compile()
            calls = counted(monkeypatch, learners["denoiser"])
        rest = (nnunet_loss(), torch.Generator().manual_seed(3), contextlib.nullcontext)
        found = [train_step(objective, learners, *batch(), *rest)[0]["loss"] for _ in range(2)]
        losses.append([float(loss) for loss in found])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]
    assert len(calls) == 4 and len(graphs) == 3


def counted(monkeypatch, learner):
    calls, evaluate = [], learner._evaluate
    monkeypatch.setattr(learner, "_evaluate", lambda *inputs: calls.append(1) or evaluate(*inputs))
    return calls
