"""The Bernoulli process against chains, Bayes by enumeration, and its limits."""

import itertools

import pytest
import torch

from nnunet_diffusion.diffusion.bernoulli import LEAST, BernoulliProcess, uniform_like
from nnunet_diffusion.diffusion.samplers import sample
from nnunet_diffusion.diffusion.schedules import NoiseSchedule, bernoulli_schedule, linear_betas

SCHEDULES = [("linear", 10), ("cosine", 10), ("linear", 1000)]


def of(values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def process_of(name="linear", timesteps=10, prior=None):
    return BernoulliProcess(bernoulli_schedule(name, timesteps), of([0.1, 0.5, 0.93]) if prior is None else prior)


def kernel(process, one, timestep, previous):
    """P(y_timestep = 1 | y_previous = `one`)."""
    keep = 1.0
    for step in range(previous + 1, timestep + 1):
        keep = keep * (1 - process.schedule.betas[step])
    return keep * one + (1 - keep) * process.prior


@pytest.mark.parametrize(("name", "timesteps"), SCHEDULES)
def test_a_chain_of_one_step_kernels_is_the_closed_form(name, timesteps):
    process = process_of(name, timesteps)
    for clean in (0.0, 1.0):
        chance = torch.full_like(process.prior, clean)
        for timestep in range(timesteps):
            beta = process.schedule.betas[timestep]
            chance = (1 - beta) * chance + beta * process.prior
            # add_noise compares uniform noise with the closed form
            state = torch.full_like(process.prior, clean)
            below, above = (
                process.add_noise(state, chance - 1e-12, timestep),
                process.add_noise(state, chance + 1e-12, timestep),
            )
            assert below.all() and not above.any()


@pytest.mark.parametrize(("name", "timesteps"), SCHEDULES[:2])
def test_the_posterior_is_bayes_rule_by_enumeration(name, timesteps):
    process = process_of(name, timesteps)
    for timestep, previous in itertools.combinations(range(timesteps - 1, -1, -1), 2):
        for clean, noisy in itertools.product((0.0, 1.0), repeat=2):
            weights = []
            for value in (0.0, 1.0):
                towards = kernel(process, value, timestep, previous)
                now = towards if noisy else 1 - towards
                reached = kernel(process, clean, previous, -1)
                weights.append(now * (reached if value else 1 - reached))
            wanted = weights[1] / (weights[0] + weights[1])
            full = (torch.full_like(process.prior, each) for each in (clean, noisy))
            found = process.posterior(*full, timestep, previous).probability
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_the_chain_ends_at_the_prior_whatever_it_begins_with():
    process = process_of(prior=torch.rand(1, 1, 1000, dtype=torch.float64))
    noise = torch.rand(1, 1, 1000, dtype=torch.float64)
    for clean in (torch.zeros_like(noise), torch.ones_like(noise)):
        assert torch.equal(process.add_noise(clean, noise, 9), (noise < process.prior).double())


@pytest.mark.parametrize(("name", "timesteps"), SCHEDULES[:2])
def test_the_step_has_the_marginals_of_noising_and_a_probability(name, timesteps):
    """Summed over y_t, the step from timestep to `previous` gives q(y_previous | y_0)."""
    process = process_of(name, timesteps)
    for timestep, previous in itertools.combinations(range(timesteps - 1, -1, -1), 2):
        for clean in (0.0, 1.0):
            state = torch.full_like(process.prior, clean)
            now = kernel(process, clean, timestep, -1)
            means = [
                process.step_mean(state, torch.full_like(state, value), timestep, previous) for value in (0.0, 1.0)
            ]
            assert all(((mean >= 0) & (mean <= 1)).all() for mean in means)
            torch.testing.assert_close(
                (1 - now) * means[0] + now * means[1], kernel(process, clean, previous, -1), rtol=0, atol=1e-14
            )


def test_certain_voxels_stay_and_no_posterior_is_undefined():
    values = list(itertools.product((0.0, 1.0), repeat=3))
    prior, clean, noisy = (of([each[place] for each in values]) for place in range(3))
    process = process_of(prior=prior)
    for timestep in range(1, 10):
        for previous in range(-1, timestep):
            found = process.posterior(clean, noisy, timestep, previous).probability
            assert torch.isfinite(found).all() and ((found >= 0) & (found <= 1)).all()
    certain = prior == clean
    noise = LEAST + (1 - 2 * LEAST) * torch.rand(500, 1, 8, dtype=torch.float64)
    for timestep in range(10):
        states = process.add_noise(clean.expand(500, 1, 8), noise, timestep)
        assert torch.equal(states[:, certain[0]], clean[certain].expand(500, -1))


def test_gradients_reach_the_prior_and_are_finite_at_its_limits():
    prior = of([0.0, 0.3, 1.0]).requires_grad_()
    process = process_of(prior=prior)
    found = process.posterior(of([0.2, 0.5, 0.9]), of([1.0, 0.0, 0.0]), 5, 4).probability
    (gradient,) = torch.autograd.grad(found.log().sum(), prior)
    assert torch.isfinite(gradient).all() and gradient[..., 1] != 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_a_perfect_flip_predictor_recovers_the_clean_state(sampler, steps):
    prior = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    truth = (torch.rand(2, 3, 16, 16) < 0.3).double()
    process = BernoulliProcess(bernoulli_schedule("linear", 10), prior)

    def estimate(noisy, timestep):
        flip = (noisy - truth).abs()
        return (noisy - flip).abs()

    start = process.start(prior, 10, torch.rand(prior.shape, dtype=torch.float64))
    assert torch.equal(sample(sampler, estimate, start, 10, steps, process), truth)


def test_states_stay_0_and_1_on_the_way():
    process = BernoulliProcess(bernoulli_schedule("linear", 10), torch.rand(1, 1, 20, 20))
    estimate = torch.rand(1, 1, 20, 20)
    state = process.start(process.prior, 10, torch.rand(1, 1, 20, 20))
    for timestep, eta in ((9, 0.0), (7, 0.5), (5, 1.0)):
        state = process.step(
            estimate, state, timestep, timestep - 2, eta=eta, generator=torch.Generator().manual_seed(0)
        )
        assert set(state.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(process.step(estimate, state, 3, -1), estimate)


def test_one_generator_for_each_entry_draws_as_one_by_one():
    state = torch.zeros(3, 2, 4)
    both = uniform_like(state, [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    for entry, seed in zip(both, (1, 2, 3), strict=True):
        assert torch.equal(entry, torch.rand(2, 4, generator=torch.Generator().manual_seed(seed)))


def test_schedules_of_the_process():
    linear = bernoulli_schedule("linear", 10)
    torch.testing.assert_close(linear.alpha_bar, 0.9 - torch.arange(10, dtype=torch.float64) / 10)
    assert linear.betas[-1] == 1
    assert (bernoulli_schedule("cosine", 10).alpha_bar.diff() < 0).all()
    with pytest.raises(ValueError, match="schedule is 'sigmoid'; known schedules: linear, cosine"):
        bernoulli_schedule("sigmoid", 10)
    with pytest.raises(ValueError, match="at least one noising step"):
        bernoulli_schedule("linear", 0)
    # linear betas scaled to ten steps, as in the published code, would replace more voxels than there are
    with pytest.raises(ValueError, match="'scaled linear' range from 0.01 to 2; every beta must be"):
        NoiseSchedule("scaled linear", torch.linspace(0.01, 2, 10), full_noise=True)
    with pytest.raises(ValueError, match="at least 21 timesteps"):
        linear_betas(10)
    # Gaussian noise needs a rest of the signal
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        NoiseSchedule("full", torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize(("name", "timesteps"), SCHEDULES[:2])
def test_the_clean_state_that_state_and_prior_tell_is_bayes_rule_by_enumeration(name, timesteps):
    process = process_of(name, timesteps)
    for timestep, noisy in itertools.product(range(timesteps), (0.0, 1.0)):
        given = [kernel(process, value, timestep, -1) for value in (0.0, 1.0)]
        weights = [
            (process.prior if value else 1 - process.prior) * (each if noisy else 1 - each)
            for value, each in zip((0.0, 1.0), given, strict=True)
        ]
        wanted = weights[1] / (weights[0] + weights[1])
        found = process.clean_logit(torch.full_like(process.prior, noisy), timestep).sigmoid()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    # at T the state says nothing: the clean state is what the prior says
    last = process.clean_logit(torch.ones_like(process.prior), timesteps - 1).sigmoid()
    if name == "linear":
        torch.testing.assert_close(last, process.prior, rtol=0, atol=1e-12)
