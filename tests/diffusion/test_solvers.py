from __future__ import annotations

import builtins
import math
import warnings

import pytest
import torch
from paired_process import SCHEDULE, make_process, run, sample

from nnunet_diffusion.diffusion.predictions import PREDICTION_TYPES
from nnunet_diffusion.diffusion.samplers import timestep_grid
from nnunet_diffusion.diffusion.schedules import noise_schedule
from nnunet_diffusion.diffusion.solvers import SOLVERS, build_scheduler


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def network(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
    """A bounded, curved, time-dependent epsilon prediction."""
    return 0.8 * torch.tanh(1.5 * noisy) + 0.1 * math.cos(timestep / 50)


def assert_close(actual, expected, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", [SCHEDULE, noise_schedule("cosine", 1000)], ids=["linear", "cosine"])
def test_perfect_denoiser_gives_the_clean_state(name, prediction_type, schedule, knows, diffusers):
    process = make_process(prediction_type, schedule)
    clean = draw(2, 3, 4, 4).sign()
    for seed, (start_step, steps) in enumerate([(1, 1), (2, 1), (2, 2), (7, 7), (300, 1), (300, 5), (990, 20)]):
        start = process.start((clean + 1) / 2, start_step, draw(2, 3, 4, 4, seed=seed))
        result = sample(name, knows(process, clean), start, start_step, steps, process)
        assert result.dtype == torch.float32
        assert_close(result, clean, 1e-4)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("start_step", "steps"), [(300, 5), (300, 20), (20, 20), (1000, 10)])
def test_states_of_a_perfect_denoiser_stay_on_the_ray_of_the_start(name, start_step, steps, knows, diffusers):
    process, clean, noise = make_process(), draw(1, 2, 8).sign(), draw(1, 2, 8, seed=1)
    seen = []

    def look(timestep, noisy, estimate):
        seen.append(timestep)
        assert_close(noisy, process.add_noise(clean, noise, timestep), 1e-4)

    start = process.add_noise(clean, noise, start_step - 1)
    sample(name, knows(process, clean), start, start_step, steps, process, on_step=look)
    assert seen == timestep_grid(start_step, steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_network_calls_equal_steps(name, diffusers):
    process, calls = make_process("epsilon"), []

    def predict(noisy, timestep):
        calls.append(timestep)
        return network(noisy, timestep).half()

    for start_step, steps in [(1, 1), (300, 1), (300, 2), (10, 10), (300, 16)]:
        calls.clear()
        result = sample(name, predict, draw(1, 2, 3, 3).half(), start_step, steps, process)
        assert calls == timestep_grid(start_step, steps)
        assert result.dtype == torch.float32
        assert result.isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("start_step", "steps"), [(300, 5), (300, 20), (1000, 10)])
def test_on_diffusers_own_grid_the_states_are_diffusers_own(name, start_step, steps, diffusers):
    process, start = make_process("epsilon"), draw(1, 2, 6, 6)
    prefix = {
        "num_train_timesteps": start_step,
        "trained_betas": SCHEDULE.betas[:start_step].tolist(),
        "timestep_spacing": "linspace",
        "prediction_type": "epsilon",
    }
    if name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(**prefix)
    elif name == "dpm_solver++":
        scheduler = diffusers.DPMSolverMultistepScheduler(**prefix)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **prefix, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
        )
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    assert grid[0] == start_step - 1
    states, expected = [], start
    run(name, network, start, grid, process, on_step=lambda t, noisy, clean: states.append(noisy))
    for timestep, state in zip(grid, states, strict=True):
        assert_close(state, expected, 2e-4)
        expected = scheduler.step(network(expected, timestep), timestep, expected).prev_sample


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_converge_to_the_same_path_as_ddim(name, diffusers):
    # All solve one ordinary differential equation: with many steps they agree, and the second order gets there first.
    process, start = make_process("v"), draw(1, 1, 200, seed=2)

    def best(noisy, timestep):
        # The exact v for x_0 ~ N(0, 0.25).
        alpha_bar = SCHEDULE.alpha_bar[timestep].item()
        clean = math.sqrt(alpha_bar) * 0.25 / (alpha_bar * 0.25 + 1 - alpha_bar) * noisy
        return process.target(clean, process.to_noise(clean, noisy, timestep), timestep)

    exact = sample("ddim", best, start, 300, 300, process)
    errors = {
        method: (sample(method, best, start, 300, 10, process) - exact).abs().max().item() for method in (name, "ddim")
    }
    assert errors[name] < 0.25 * errors["ddim"]
    assert errors[name] < 0.03


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [6, 300])
def test_own_ddim_agrees_with_diffusers(eta, steps, diffusers):
    # "trailing" is the spacing on which diffusers' DDIM looks up the same previous timestep as its own list says.
    process, start = make_process("epsilon"), draw(1, 2, 6, 6)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=300,
        trained_betas=SCHEDULE.betas[:300].tolist(),
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    result = run("ddim", network, start, grid, process, generator=seeded(5), eta=eta)
    expected, generator = start, seeded(5)
    for timestep in grid:
        output = network(expected, timestep)
        expected = scheduler.step(output, timestep, expected, eta=eta, generator=generator).prev_sample
    assert_close(result, expected, 2e-4)


@pytest.mark.parametrize("steps", [6, 300])
def test_own_ancestral_sampler_agrees_with_diffusers(steps, diffusers):
    process, start = make_process("epsilon"), draw(1, 2, 6, 6)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=300,
        trained_betas=SCHEDULE.betas[:300].tolist(),
        clip_sample=False,
        variance_type="fixed_small",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    result = run("ddpm", network, start, grid, process, generator=seeded(5))
    expected, generator = start, seeded(5)
    for timestep in grid:
        output = network(expected, timestep)
        expected = scheduler.step(output, timestep, expected, generator=generator).prev_sample
    assert_close(result, expected, 2e-4)


def test_schedulers_are_shown_only_the_prefix(diffusers):
    scheduler = build_scheduler("unipc", [299, 100, 0], make_process())
    assert len(scheduler.betas) == 300
    assert scheduler.timesteps.tolist() == [299, 100, 0]


def test_building_a_solver_shows_no_warning_to_users(diffusers):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for name in SOLVERS:
            build_scheduler(name, [299, 100, 0], make_process())


@pytest.mark.parametrize("name", SOLVERS)
def test_missing_diffusers_names_the_cure(name, monkeypatch):
    real_import = builtins.__import__

    def no_diffusers(module, *args, **kwargs):
        if module.split(".")[0] == "diffusers":
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_diffusers)
    start = draw(1, 1, 2)
    with pytest.raises(ImportError, match="pip install diffusers"):
        sample(name, network, start, 300, 5, make_process("epsilon"))
    assert sample("ddim", network, start, 300, 5, make_process("epsilon")).isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_grids_are_named(name):
    for grid in ([], [3, 3], [1, 2], [2, -1], [1000]):
        with pytest.raises(ValueError, match="strictly decreasing timesteps within 0..999"):
            run(name, network, draw(1, 1, 1), grid, make_process("epsilon"))


def test_unknown_solver_is_named():
    with pytest.raises(ValueError, match="'deis'.*dpm_solver, dpm_solver.., unipc"):
        build_scheduler("deis", [5], make_process())
