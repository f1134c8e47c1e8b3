from __future__ import annotations

import math

import pytest
import torch
from paired_process import SCHEDULE, make_process

from nnunet_diffusion.diffusion.predictions import PREDICTION_TYPES, prediction_of

ONE = torch.ones(1, 1, 1, dtype=torch.float64)
ZERO = torch.zeros_like(ONE)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_close(actual, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_add_noise_is_the_papers_equation(timestep):
    clean, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    alpha_bar = math.prod(1 - beta for beta in SCHEDULE.betas[: timestep + 1].tolist())
    expected = math.sqrt(alpha_bar) * clean + math.sqrt(1 - alpha_bar) * noise
    assert_close(make_process().add_noise(clean, noise, timestep), expected)


def test_200_single_steps_compose_to_one_jump():
    signal, variance = 1.0, 0.0
    for beta in SCHEDULE.betas[:200].tolist():
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
    process = make_process()
    assert process.add_noise(ONE, ZERO, 199).item() == pytest.approx(signal, abs=1e-10)
    assert process.add_noise(ZERO, ONE, 199).item() ** 2 == pytest.approx(variance, abs=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("timestep", [0, 20, 999])
def test_conversions_are_round_trips(prediction_type, timestep):
    clean, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    process = make_process(prediction_type)
    noisy = process.add_noise(clean, noise, timestep)
    estimate = process.to_clean(process.target(clean, noise, timestep), noisy, timestep)
    assert_close(estimate, clean)
    assert_close(process.to_noise(estimate, noisy, timestep), noise)
    assert_close(process.add_noise(estimate, process.to_noise(estimate, noisy, timestep), timestep), noisy)


def test_v_is_the_derivative_along_the_circle():
    # Salimans and Ho 2022: with angle phi, x = cos(phi) clean + sin(phi) noise and v = dx / dphi.
    clean, noise = draw(1, 2, 3), draw(1, 2, 3, seed=1)
    angle = math.acos(math.sqrt(SCHEDULE.alpha_bar[300].item()))
    expected = -math.sin(angle) * clean + math.cos(angle) * noise
    assert_close(make_process("v").target(clean, noise, 300), expected)


@pytest.mark.parametrize("activation", [torch.sigmoid, lambda logits: logits.softmax(1)])
def test_logits_become_a_state_between_minus_one_and_one(activation):
    process = make_process("logits", activation=activation)
    logits = draw(2, 3, 4)
    clean = process.to_clean(logits, draw(2, 3, 4, seed=1), 5)
    assert_close((clean + 1) / 2, activation(logits))
    with pytest.raises(ValueError, match="logits"):
        process.target(logits, logits, 5)


def test_clamping_is_an_option_of_epsilon():
    noise, noisy = torch.tensor([[[-3.0, 0.5, 2.0]]]), torch.zeros(1, 1, 3)
    free = make_process("epsilon").to_clean(noise, noisy, 999)
    assert free.abs().max() > 100
    assert_close(make_process("epsilon", clamp=True).to_clean(noise, noisy, 999), free.clamp(-1, 1))
    far = torch.tensor([[[-3.0, 0.5, 2.0]]])
    assert_close(make_process(clamp=True).to_clean(far, far, 0), far)


@pytest.mark.parametrize(("timestep", "previous"), [(0, -1), (1, 0), (999, 998), (299, 149), (999, 0), (999, -1)])
def test_posterior_marginalises_to_the_forward_process(timestep, previous):
    process = make_process()
    of_clean = process.posterior(ONE, ZERO, timestep, previous).mean.item()
    of_noisy = process.posterior(ZERO, ONE, timestep, previous).mean.item()
    variance = process.posterior(ZERO, ZERO, timestep, previous).variance.item()
    alpha_bar = SCHEDULE.alpha_bar[timestep].item()
    expected = SCHEDULE.at(previous, ONE).item()
    assert of_clean + of_noisy * math.sqrt(alpha_bar) == pytest.approx(math.sqrt(expected), abs=1e-10)
    assert of_noisy**2 * (1 - alpha_bar) + variance == pytest.approx(1 - expected, abs=1e-10)


@pytest.mark.parametrize(("timestep", "previous"), [(1, 0), (2, 1), (299, 149), (999, 998), (999, 0)])
def test_posterior_is_bayes_rule(timestep, previous):
    # Prior q(x_previous | x_0) times likelihood q(x_timestep | x_previous), both multiplied up from the betas.
    clean, noisy = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    betas = SCHEDULE.betas.tolist()
    before = math.prod(1 - beta for beta in betas[: previous + 1])
    kept = math.prod(1 - beta for beta in betas[previous + 1 : timestep + 1])
    precision = 1 / (1 - before) + kept / (1 - kept)
    mean = (math.sqrt(before) * clean / (1 - before) + math.sqrt(kept) * noisy / (1 - kept)) / precision
    posterior = make_process().posterior(clean, noisy, timestep, previous)
    assert_close(posterior.mean, mean)
    assert posterior.variance.item() == pytest.approx(1 / precision, abs=1e-10)


def test_posterior_of_consecutive_timesteps_is_ddpms():
    # Ho et al. 2020, Eq. 7, written with beta as there.
    clean, noisy = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    for timestep in (1, 2, 10, 999):
        beta, now, before = (
            table[timestep].item() for table in (SCHEDULE.betas, SCHEDULE.alpha_bar, SCHEDULE.alpha_bar_prev)
        )
        mean = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * noisy) / (1 - now)
        posterior = make_process().posterior(clean, noisy, timestep, timestep - 1)
        assert_close(posterior.mean, mean)
        assert posterior.variance.item() == pytest.approx((1 - before) / (1 - now) * beta, abs=1e-10)


@pytest.mark.parametrize("timestep", [0, 1, 999])
def test_posterior_of_the_clean_state_is_the_clean_state(timestep):
    clean, noisy = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    posterior = make_process().posterior(clean, noisy, timestep, -1)
    assert torch.equal(posterior.mean, clean)
    assert posterior.variance.item() == 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_timesteps_of_a_batch_equal_separate_calls(prediction_type):
    process = make_process(prediction_type)
    clean, noise = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    timesteps, earlier = torch.tensor([0, 5, 400, 999]), torch.tensor([-1, 0, 399, 10])

    def evaluate(part: slice, timestep, previous) -> list[torch.Tensor]:
        noisy = process.add_noise(clean[part], noise[part], timestep)
        posterior = process.posterior(clean[part], noisy, timestep, previous)
        values = [noisy, process.to_clean(noise[part], noisy, timestep), process.to_noise(clean[part], noisy, timestep)]
        values += [posterior.mean, posterior.variance]
        return values if prediction_type == "logits" else [*values, process.target(clean[part], noise[part], timestep)]

    together = evaluate(slice(None), timesteps, earlier)
    for i in range(4):
        alone = evaluate(slice(i, i + 1), int(timesteps[i]), int(earlier[i]))
        for value, expected in zip(together, alone, strict=True):
            assert_close(value[i : i + 1], expected.expand_as(value[i : i + 1]))


@pytest.mark.parametrize("timestep", [7, torch.tensor([7, 900])])
def test_noise_in_place_is_the_same_and_written_into_the_noise(timestep):
    process, clean, noise = make_process(), draw(2, 3, 4), draw(2, 3, 4, seed=1)
    wanted = process.add_noise(clean, noise, timestep)
    found = process.add_noise(clean, noise, timestep, in_place=True)
    assert torch.equal(found, wanted)
    assert found is noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_half_precision_predictions_give_float32(dtype, prediction_type):
    process = make_process(prediction_type)
    half = draw(1, 2, 3).to(dtype)
    assert process.add_noise(half, half, 3).dtype == torch.float32
    assert process.to_clean(half, half.float(), 3).dtype == torch.float32
    assert process.to_noise(half, half, 3).dtype == torch.float32
    posterior = process.posterior(half, half, 3, 2)
    assert posterior.mean.dtype == posterior.variance.dtype == torch.float32
    if prediction_type != "logits":
        assert process.target(half, half, 3).dtype == torch.float32


def test_float32_keeps_its_digits_at_timestep_zero():
    # 1 - alpha_bar is 1e-4 there; subtracted in float32 it would be wrong in the fourth digit.
    clean, noise = torch.zeros(1, 1, 8), draw(1, 1, 8, dtype=torch.float32)
    process = make_process()
    torch.testing.assert_close(process.add_noise(clean, noise, 0), noise * 1e-2, rtol=1e-6, atol=0)
    variance = process.posterior(clean, noise, 1, 0).variance.item()
    betas = SCHEDULE.betas.tolist()
    expected = betas[0] * betas[1] / (1 - (1 - betas[0]) * (1 - betas[1]))
    assert variance == pytest.approx(expected, rel=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'noise'.*epsilon, x0, v, logits"):
        prediction_of("noise", torch.sigmoid)
    with pytest.raises(ValueError, match="previous is 5"):
        make_process().posterior(ONE, ONE, 5, 5)
