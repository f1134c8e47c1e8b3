from __future__ import annotations

import math

import pytest
import torch
from paired_process import SCHEDULE, make_process, run, sample

from nnunet_diffusion.diffusion.predictions import PREDICTION_TYPES
from nnunet_diffusion.diffusion.samplers import timestep_grid
from nnunet_diffusion.diffusion.schedules import noise_schedule

OWN = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def assert_close(actual, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_grids_begin_at_the_start_step_and_fall():
    for start_step in [*range(1, 40), 300, 1000]:
        for steps in range(1, min(start_step, 40) + 1):
            grid = timestep_grid(start_step, steps)
            assert len(grid) == steps
            assert grid[0] == start_step - 1
            assert grid[-1] >= 0
            assert all(type(timestep) is int for timestep in grid)
            parts = [earlier - later for earlier, later in zip(grid, [*grid[1:], -1], strict=True)]
            assert min(parts) >= 1
            assert max(parts) - min(parts) <= 1
    assert timestep_grid(300, 300) == list(range(299, -1, -1))
    assert timestep_grid(300, 1) == [299]
    assert timestep_grid(300, 2) == [299, 149]
    assert timestep_grid(9, 5) == [8, 6, 4, 3, 1]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_grids_refuse_impossible_steps(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}.*start_step = 10"):
        timestep_grid(10, steps)


@pytest.mark.parametrize(("name", "eta"), OWN)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", [SCHEDULE, noise_schedule("cosine", 1000)], ids=["linear", "cosine"])
def test_perfect_denoiser_gives_the_clean_state(name, eta, prediction_type, schedule, knows):
    process = make_process(prediction_type, schedule)
    clean = draw(2, 3, 4, 4).sign()
    for seed, start_step in enumerate((1, 2, 7, 300, 990)):
        start = 3 * draw(2, 3, 4, 4, seed=seed)
        for steps in {1, min(2, start_step), min(6, start_step), min(50, start_step)}:
            result = sample(
                name, knows(process, clean), start, start_step, steps, process, generator=seeded(seed), eta=eta
            )
            assert_close(result, clean, 1e-12)


@pytest.mark.parametrize(("name", "eta"), OWN)
def test_states_of_a_perfect_denoiser_have_the_noise_level_of_their_timestep(name, eta, knows):
    process, clean = make_process(), torch.ones(1, 1, 100, 100, dtype=torch.float64)
    noise = draw(1, 1, 100, 100)
    levels = {}

    def look(timestep, noisy, estimate):
        levels[timestep] = (noisy.mean().item(), noisy.std().item())

    start = process.add_noise(clean, noise, 299)
    sample(name, knows(process, clean), start, 300, 10, process, generator=seeded(1), eta=eta, on_step=look)
    assert list(levels) == timestep_grid(300, 10)
    for timestep, (mean, std) in levels.items():
        # 10 000 draws: the mean's standard error is spread / 100, that of the standard deviation spread / 141.
        spread = math.sqrt(1 - SCHEDULE.alpha_bar[timestep].item())
        assert mean == pytest.approx(math.sqrt(SCHEDULE.alpha_bar[timestep].item()), abs=0.05 * spread)
        assert std == pytest.approx(spread, rel=0.04)


def test_deterministic_states_stay_on_the_ray_of_the_start(knows):
    process, clean, noise = make_process(), draw(1, 2, 8), draw(1, 2, 8, seed=1)

    def look(timestep, noisy, estimate):
        assert_close(noisy, process.add_noise(clean, noise, timestep), 1e-12)

    start = process.add_noise(clean, noise, 299)
    sample("ddim", knows(process, clean), start, 300, 12, process, on_step=look)


def test_ddim_with_full_eta_is_the_ddpm_posterior():
    process = make_process()
    clean = draw(1, 2, 50)
    for timestep in (1, 2, 10, 20, 50, 500, 999):
        noisy, states = process.add_noise(clean, draw(1, 2, 50, seed=1), timestep), []
        run("ddim", lambda state, t: clean, noisy, [timestep, timestep - 1], process, generator=seeded(2), eta=1.0,
             on_step=lambda t, state, estimate, states=states: states.append(state))  # fmt: skip
        posterior = process.posterior(clean, noisy, timestep, timestep - 1)
        noise = torch.randn(noisy.shape, generator=seeded(2)).double()
        # Near timestep 0, 1 - alpha_bar is 1e-4, so float64 itself leaves a relative 1e-12 of it.
        assert_close(states[1], posterior.mean + posterior.variance.sqrt() * noise, 2e-14 if timestep >= 20 else 1e-12)


def test_ddim_with_full_eta_is_ancestral_on_a_grid_with_gaps():
    process = make_process("epsilon")
    start, grid = draw(1, 2, 50), timestep_grid(700, 9)
    results = [
        run(name, lambda state, t: torch.tanh(state), start, grid, process, generator=seeded(2), eta=1.0)
        for name in ("ddim", "ddpm")
    ]
    assert_close(*results)


def test_ddim_without_eta_is_deterministic():
    process = make_process("v")
    start = draw(1, 2, 5)
    results = [
        sample("ddim", lambda state, t: torch.sin(state), start, 300, 8, process, generator=seeded(seed), eta=0.0)
        for seed in (1, 2)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 0.7)])
def test_the_generator_decides(name, eta):
    process, start = make_process("v"), draw(1, 2, 5)

    def with_seed(seed: int) -> torch.Tensor:
        torch.randn(1)  # the global random state must not matter
        return sample(name, lambda x, t: x.sin(), start, 300, 8, process, generator=seeded(seed), eta=eta)

    assert torch.equal(with_seed(1), with_seed(1))
    assert not torch.equal(with_seed(1), with_seed(2))


def std_of_gaussian_data(grid: list[int], eta: float, data_variance: float) -> float:
    """Closed form: every step of DDIM (eta = 1 is the ancestral sampler) scales the state and adds fresh noise."""
    variance = 1.0
    alpha_bars = [SCHEDULE.alpha_bar[timestep].item() for timestep in grid]
    for now, before in zip(alpha_bars, [*alpha_bars[1:], 1.0], strict=True):
        gain = math.sqrt(now) * data_variance / (now * data_variance + 1 - now)
        fresh = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
        direction = math.sqrt(1 - before - fresh) * (1 - math.sqrt(now) * gain) / math.sqrt(1 - now)
        variance = (math.sqrt(before) * gain + direction) ** 2 * variance + fresh
    return math.sqrt(variance)


# Third column: figures found at 1000, 100 and 20 steps by an independent experiment, good to about 0.005.
@pytest.mark.parametrize(
    ("name", "eta", "measured"), [("ddpm", 1.0, (0.494, 0.469, 0.387)), ("ddim", 0.0, (0.498, 0.486, 0.431))]
)
def test_gaussian_data_with_the_analytic_denoiser(name, eta, measured):
    process, data_variance = make_process(), 0.25

    def best(noisy, timestep):
        # E[x_0 | x_t] for x_0 ~ N(0, 0.25).
        alpha_bar = SCHEDULE.alpha_bar[timestep].item()
        return math.sqrt(alpha_bar) * data_variance / (alpha_bar * data_variance + 1 - alpha_bar) * noisy

    generator = seeded(3)
    start = torch.randn(1, 1, 100_000, generator=generator)
    for steps, figure in zip((1000, 100, 20), measured, strict=True):
        result = sample(name, best, start, 1000, steps, process, generator=generator)
        # 100 000 draws: standard errors of 0.0011 (standard deviation) and 0.0016 (mean); four of them are allowed.
        exact = std_of_gaussian_data(timestep_grid(1000, steps), eta, data_variance)
        assert result.std().item() == pytest.approx(exact, abs=0.0045)
        assert result.mean().item() == pytest.approx(0, abs=0.0065)
        assert exact == pytest.approx(figure, abs=0.005)


@pytest.mark.parametrize(("name", "eta"), OWN)
def test_network_calls_equal_steps(name, eta):
    process, calls, seen = make_process(), [], []

    def predict(noisy, timestep):
        assert type(timestep) is int
        calls.append(timestep)
        return noisy.clamp(-1, 1)

    start = draw(1, 2, 3, 3)
    for steps in (1, 2, 5, 30):
        calls.clear()
        seen.clear()
        result = sample(name, predict, start, 30, steps, process, generator=seeded(0), eta=eta,
                        on_step=lambda t, noisy, clean: seen.append((t, clean)))  # fmt: skip
        assert calls == timestep_grid(30, steps) == [t for t, _ in seen]
        assert torch.equal(result, seen[-1][1])


@pytest.mark.parametrize(("name", "eta"), OWN)
def test_half_precision_network_and_start_give_float32(name, eta):
    process = make_process("epsilon")
    start = draw(1, 2, 3, 3, dtype=torch.float32).half()

    def predict(noisy, timestep):
        assert noisy.dtype == torch.float32
        return noisy.half()

    assert sample(name, predict, start, 30, 4, process, generator=seeded(0), eta=eta).dtype == torch.float32


def test_samplers_follow_the_device_of_the_start():
    start = torch.zeros(1, 2, 3, device="meta")
    for name, eta in OWN:
        result = sample(name, lambda x, t: x, start, 30, 4, make_process("v"), generator=seeded(0), eta=eta)
        assert result.device.type == "meta"


def test_bad_arguments_are_named():
    process, start = make_process(), draw(1, 1, 1)

    def predict(noisy, timestep):
        return noisy

    with pytest.raises(ValueError, match="'euler'.*ddpm, ddim, dpm_solver, dpm_solver.., unipc"):
        sample("euler", predict, start, 10, 2, process)
    for start_step in (0, 1001):
        with pytest.raises(ValueError, match=f"start_step is {start_step}.*timesteps = 1000"):
            sample("ddim", predict, start, start_step, 1, process)
        with pytest.raises(ValueError, match=f"start_step is {start_step}"):
            process.start(start, start_step, start)
    with pytest.raises(ValueError, match="eta is 1.5"):
        sample("ddim", predict, start, 10, 2, process, eta=1.5)
    for name in ("ddpm", "ddim"):
        for grid in ([], [3, 3], [1, 2], [2, -1], [1000]):
            with pytest.raises(ValueError, match="strictly decreasing timesteps within 0..999"):
                run(name, predict, start, grid, process)


# PD-DDPM


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_one_step_from_start_step_one_is_the_networks_estimate_at_timestep_zero(name, prediction_type):
    process = make_process(prediction_type)
    presegmentation, noise = torch.rand(1, 2, 4, 4, dtype=torch.float64), draw(1, 2, 4, 4)
    start = process.start(presegmentation, 1, noise)
    # Timestep 0 has one noising step behind it, of variance 1e-4.
    assert_close(start, math.sqrt(1 - 1e-4) * (2 * presegmentation - 1) + 1e-2 * noise)
    result = sample(name, lambda noisy, t: torch.cos(noisy) + t, start, 1, 1, process)
    assert_close(result, process.to_clean(torch.cos(start), start, 0), 1e-12)


def test_near_total_noise_forgets_the_presegmentation():
    process, noise = make_process(), draw(1, 2, 4, 4)
    presegmentation = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    start = process.start(presegmentation, 1000, noise)
    # sqrt(4.0358e-5) = 0.00635 of the pre-segmentation is left.
    assert_close(start, noise, 0.0065)
    other = process.start(1 - presegmentation, 1000, noise)
    assert (start - other).abs().max().item() <= 2 * 0.00636


@pytest.mark.parametrize(("name", "eta"), OWN)
@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_identity_denoiser_returns_the_presegmentation(name, eta, prediction_type, knows):
    process = make_process(prediction_type)
    presegmentation = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    start = process.start(presegmentation, 300, draw(2, 3, 4, 4))
    denoiser = knows(process, 2 * presegmentation - 1)
    result = sample(name, denoiser, start, 300, 5, process, generator=seeded(0), eta=eta)
    assert_close((result + 1) / 2, presegmentation, 1e-12)


def test_a_denoiser_that_sees_no_noise_keeps_the_presegmentation_without_noise():
    # epsilon = 0 scales the state back along the ray on which it was made.
    presegmentation = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    process = make_process("epsilon")
    start = process.start(presegmentation, 300, torch.zeros_like(presegmentation))
    result = sample("ddim", lambda noisy, t: torch.zeros_like(noisy), start, 300, 7, process)
    assert_close((result + 1) / 2, presegmentation, 1e-12)


def test_start_state_of_half_precision_probabilities_is_float32():
    half = torch.rand(1, 2, 4).half()
    assert make_process().start(half, 300, torch.randn(1, 2, 4)).dtype == torch.float32
