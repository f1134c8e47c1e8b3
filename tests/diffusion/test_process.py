"""What every diffusion process must do; a new one is added to PROCESSES."""

import dataclasses

import pytest
import torch

from nnunet_diffusion.diffusion.bernoulli import BernoulliProcess
from nnunet_diffusion.diffusion.gaussian import GaussianProcess
from nnunet_diffusion.diffusion.samplers import sample, timestep_grid
from nnunet_diffusion.diffusion.schedules import bernoulli_schedule, noise_schedule

PROCESSES = {
    f"gaussian {name}, signal scale {scale}": (GaussianProcess(noise_schedule(name, 1000, scale)), torch.randn)
    for name, scale in (("linear", 1.0), ("cosine", 1.0), ("linear", 0.1))
}
PRIOR = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
PROCESSES |= {
    f"bernoulli {name}": (BernoulliProcess(bernoulli_schedule(name, 1000), PRIOR), torch.rand)
    for name in ("linear", "cosine")
}


@pytest.fixture(params=list(PROCESSES))
def made(request):
    """A process, and masks, probabilities and noise of its states' shape in float64."""
    process, draw = PROCESSES[request.param]
    generator = torch.Generator().manual_seed(0)

    def noise():
        return draw((2, 3, 8, 8), generator=generator, dtype=torch.float64)

    masks = torch.randint(0, 2, (2, 3, 8, 8), generator=generator).double()
    probabilities = torch.rand((2, 3, 8, 8), generator=generator, dtype=torch.float64)
    return process, masks, probabilities, noise


def test_state_and_probabilities_are_inverse_and_the_input_stays(made):
    process, masks, probabilities, _ = made
    for given in (masks, probabilities):
        kept = given.clone()
        torch.testing.assert_close(process.to_probabilities(process.to_state(given)), given, rtol=0, atol=1e-15)
        assert torch.equal(given, kept)
    state = process.to_state(masks)
    assert process.to_probabilities(state, in_place=True).data_ptr() == state.data_ptr()


def test_start_at_t_forgets_the_presegmentation_and_at_one_step_keeps_it(made):
    process, masks, _, noise = made
    steps, drawn = process.schedule.timesteps, noise()
    forgotten = process.start(masks, steps, drawn), process.start(1 - masks, steps, drawn)
    torch.testing.assert_close(*forgotten, rtol=0, atol=0.013)  # 2 sqrt(4.04e-5), of the linear schedule
    assert torch.equal(process.to_probabilities(process.start(masks, 1, drawn)) > 0.5, masks > 0.5)


def test_start_is_the_noised_state_of_the_presegmentation(made):
    process, masks, probabilities, noise = made
    for given, start_step in ((masks, 1), (probabilities, 300)):
        drawn = noise()
        wanted = process.add_noise(process.to_state(given), drawn, start_step - 1)
        assert torch.equal(process.start(given, start_step, drawn), wanted)
        assert torch.equal(process.start(given, start_step, drawn, in_place=True), wanted)
        assert torch.equal(drawn, wanted)
    for start_step in (0, process.schedule.timesteps + 1):
        with pytest.raises(ValueError, match=f"start_step is {start_step}; it must be 1 to timesteps"):
            process.start(masks, start_step, noise())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_perfect_denoiser_returns_the_truth_from_another_start(made, sampler, steps):
    process, masks, probabilities, noise = made
    truth = process.to_state(masks)
    found = sample(
        sampler, lambda *_: truth, process.start(probabilities, 300, noise()), 300, steps, process,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    torch.testing.assert_close(process.to_probabilities(found), masks, rtol=0, atol=1e-12)


def test_a_step_with_full_eta_is_a_draw_of_the_posterior(made):
    process, masks, _, noise = made
    clean = process.to_state(masks)
    for timestep, previous in ((299, 298), (299, 99)):
        noisy = process.add_noise(clean, noise(), timestep)
        drawn, stepped = (
            made_by(torch.Generator().manual_seed(2))
            for made_by in (
                process.posterior(clean, noisy, timestep, previous).draw,
                lambda source, noisy=noisy, where=(timestep, previous): process.step(
                    clean, noisy, *where, eta=1.0, generator=source
                ),
            )
        )
        torch.testing.assert_close(stepped, drawn, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_steps_keep_the_noise_level_of_their_timestep(name):
    """With the truth as estimate, each state of a chain is distributed as `add_noise` makes it: mean and spread."""
    process, draw = PROCESSES[name]
    if isinstance(process, BernoulliProcess):
        process = dataclasses.replace(process, prior=torch.full((1, 1, 1, 1), 0.4))
    clean = process.to_state(torch.ones(1, 1, 100, 100, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)

    def noised(timestep):
        return process.add_noise(clean, draw(clean.shape, generator=generator, dtype=torch.float64), timestep)

    state, grid = noised(299), timestep_grid(300, 6)
    for timestep, previous in zip(grid, grid[1:], strict=False):
        state = process.step(clean, state, timestep, previous, eta=1.0, generator=generator)
        fresh = noised(previous)
        # 10 000 draws each: the difference of means has a standard error of 1.4 % of the spread, of spreads 1 %
        assert (state.mean() - fresh.mean()).abs() < 0.07 * fresh.std()
        # of 0 and 1 the spread follows from the mean, with an error of its own where 1 is rare
        assert state.std() == pytest.approx(fresh.std().item(), rel=0.15 if fresh.std() < 0.3 else 0.05)


def test_noise_is_of_the_kind_that_the_process_adds_and_depends_on_the_seed(made):
    process, *_ = made
    one, other = (process.draw_noise((4, 100, 100), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.shape == (4, 100, 100) and one.dtype == torch.float32 and not torch.equal(one, other)
    assert torch.equal(one, process.draw_noise((4, 100, 100), torch.Generator().manual_seed(0)))
    uniform = isinstance(process, BernoulliProcess)
    assert bool(((one >= 0) & (one < 1)).all()) == uniform
    assert float(one.std()) == pytest.approx(12**-0.5 if uniform else 1, rel=0.02)


def test_towards_a_prior_changes_only_a_process_whose_noise_depends_on_it(made):
    process, masks, probabilities, _ = made
    changed = process.towards(1 - probabilities)
    assert (changed == process) if not isinstance(process, BernoulliProcess) else (changed.prior is not process.prior)
    assert changed.schedule is process.schedule


def test_a_bernoulli_process_without_a_prior_says_so():
    process = BernoulliProcess(bernoulli_schedule("linear", 10))
    with pytest.raises(ValueError, match="no prior"):
        process.add_noise(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 3)
