from __future__ import annotations

import copy
import math

import pytest
import torch

from nnunet_diffusion.diffusion.schedules import SCHEDULES, NoiseSchedule, noise_schedule


def test_linear_schedule_is_the_papers():
    schedule = noise_schedule("linear", 1000)
    assert schedule.name == "linear"
    assert schedule.timesteps == 1000
    assert schedule.betas[0].item() == pytest.approx(1e-4, abs=1e-18)
    assert schedule.betas[-1].item() == pytest.approx(2e-2, abs=1e-16)
    assert schedule.alpha_bar[0].item() == pytest.approx(1 - 1e-4, abs=1e-15)
    assert schedule.alpha_bar[-1].item() == pytest.approx(4.0358e-5, abs=5e-10)


def test_alpha_bar_is_the_running_product():
    for name in SCHEDULES:
        schedule = noise_schedule(name, 50)
        product = 1.0
        for beta, alpha_bar, alpha_bar_prev in zip(
            schedule.betas, schedule.alpha_bar, schedule.alpha_bar_prev, strict=True
        ):
            assert alpha_bar_prev.item() == pytest.approx(product, abs=1e-15)
            product *= 1 - beta.item()
            assert alpha_bar.item() == pytest.approx(product, abs=1e-15)


def test_cosine_schedule_follows_the_squared_cosine():
    schedule = noise_schedule("cosine", 1000)

    def curve(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    for timestep in (0, 10, 499, 900):
        expected = curve((timestep + 1) / 1000) / curve(0)
        assert schedule.alpha_bar[timestep].item() == pytest.approx(expected, abs=1e-12)
    assert schedule.betas[-1].item() == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_schedules_are_valid_or_refused(name, timesteps):
    if name == "linear" and timesteps < 21:
        with pytest.raises(ValueError, match=rf"timesteps is {timesteps}.*at least 21.*cosine"):
            noise_schedule(name, timesteps)
        return
    schedule = noise_schedule(name, timesteps)
    assert schedule.betas.shape == schedule.alpha_bar.shape == schedule.alpha_bar_prev.shape == (timesteps,)
    assert schedule.betas.dtype == schedule.alpha_bar.dtype == torch.float64
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert ((schedule.alpha_bar > 0) & (schedule.alpha_bar < schedule.alpha_bar_prev)).all()
    assert schedule.alpha_bar_prev[0] == 1


def test_linear_schedule_scales_with_its_length():
    assert noise_schedule("linear", 21).betas[-1].item() < 1
    with pytest.raises(ValueError, match="at least 21"):
        noise_schedule("linear", 20)
    short, long = noise_schedule("linear", 250), noise_schedule("linear", 1000)
    assert short.betas[-1].item() == pytest.approx(4 * long.betas[-1].item(), rel=1e-12)
    assert math.log(short.alpha_bar[-1].item()) == pytest.approx(math.log(long.alpha_bar[-1].item()), rel=0.03)


def test_at_broadcasts_over_a_batch():
    schedule = noise_schedule("linear", 100)
    like = torch.zeros(3, 2, 4, 5, dtype=torch.float64)
    values = schedule.at(torch.tensor([0, 7, -1]), like)
    assert values.shape == (3, 1, 1, 1)
    assert values.flatten().tolist() == [schedule.alpha_bar[0].item(), schedule.alpha_bar[7].item(), 1.0]
    assert schedule.at(7, like).shape == ()
    assert schedule.at(7, like).item() == schedule.alpha_bar[7].item()
    assert schedule.at(-1, like).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_leaves_the_schedule_unchanged(dtype):
    schedule = noise_schedule("cosine", 100)
    before = copy.deepcopy((schedule.betas, schedule.alpha_bar, schedule.alpha_bar_prev))
    value = schedule.at(torch.tensor([3]), torch.zeros(1, 1, 2, dtype=dtype))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    after = (schedule.betas, schedule.alpha_bar, schedule.alpha_bar_prev)
    for old, new in zip(before, after, strict=True):
        assert new.dtype == torch.float64
        assert torch.equal(old, new)


def test_coefficients_meet_tensors_of_another_device():
    """Those of a batch follow it; a scalar stays on the CPU, so that no reverse step waits for a copy to the GPU."""
    schedule = noise_schedule("linear", 100)
    like = torch.zeros(2, 1, 2, device="meta")
    assert schedule.at(torch.tensor([5, 6]), like).device.type == "meta"
    scalar = schedule.at(5, like)
    assert scalar.device.type == "cpu"
    assert (scalar * like).device.type == "meta"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'quadratic'.*linear, cosine"):
        noise_schedule("quadratic", 10)
    with pytest.raises(ValueError, match="timesteps is 0"):
        noise_schedule("cosine", 0)
    for timestep in (-2, 10):
        with pytest.raises(ValueError, match=f"timestep is {timestep}"):
            noise_schedule("cosine", 10).at(timestep, torch.zeros(1))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        NoiseSchedule("mine", torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        NoiseSchedule("mine", torch.tensor([0.5, float("nan")]))
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        NoiseSchedule("mine", torch.full((2, 1), 0.5))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5, 1.0])
def test_scaling_the_signal_multiplies_its_ratio_to_the_noise(name, scale):
    plain, scaled = noise_schedule(name, 1000), noise_schedule(name, 1000, scale)
    torch.testing.assert_close(scaled.snr, scale**2 * plain.snr, rtol=1e-10, atol=0)
    assert scale != 1 or torch.equal(scaled.betas, plain.betas)


def test_a_scaled_process_noises_the_scaled_state_and_divides_by_its_standard_deviation():
    plain, scaled = noise_schedule("linear", 1000), noise_schedule("linear", 1000, 0.1)
    state = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).double()
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for timestep in (0, 99, 499, 999):
        before, after = plain.alpha_bar[timestep], scaled.alpha_bar[timestep]
        # x = b x_0 sqrt(alpha_bar) + noise sqrt(1 - alpha_bar), whose variance is b^2 alpha_bar + 1 - alpha_bar
        noisy = 0.1 * before.sqrt() * state + (1 - before).sqrt() * noise
        expected = noisy / (0.01 * before + 1 - before).sqrt()
        torch.testing.assert_close(after.sqrt() * state + (1 - after).sqrt() * noise, expected, rtol=0, atol=1e-12)


def test_start_step_of_a_ratio_is_the_nearest_and_the_same_noise_in_every_schedule():
    for schedule in (
        noise_schedule("linear", 1000),
        noise_schedule("cosine", 1000),
        noise_schedule("linear", 1000, 0.3),
    ):
        for step in (1, 150, 990):
            assert schedule.start_step_at(schedule.snr[step - 1].item()) == step
    assert noise_schedule("linear", 1000).start_step_at(noise_schedule("cosine", 1000).snr[299].item()) == 151
    with pytest.raises(ValueError, match="start_snr is 0"):
        noise_schedule("linear", 1000).start_step_at(0)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_signal_scale_is_above_zero_and_at_most_one(scale):
    with pytest.raises(ValueError, match=f"signal_scale is {scale}"):
        noise_schedule("linear", 1000, scale)
