"""The rules that size the denoiser, on plans whose answer is known."""

import math

import pytest

from nnunet_diffusion.planning.costs import denoiser_cost
from nnunet_diffusion.planning.rules import (
    ATTENTION_SHARE,
    ATTENTION_TOKENS,
    HALF,
    base_settings,
    sized,
    stage_tokens,
    width_at,
    with_attention,
)


def test_widths_are_32nds_of_nnunets():
    assert width_at(32, (32, 64, 320)) == (32, 64, 320)
    assert width_at(4, (32, 64, 320)) == (4, 8, 40)
    assert width_at(4, (8, 16)) == (4, 4)
    assert width_at(4, (2, 4)) == (2, 4), "never wider than nnU-Net"


def test_tokens_follow_the_strides_and_odd_sizes(configuration):
    plan = configuration((33, 20), stages=3)
    assert stage_tokens(plan) == [(33, 20), (17, 10), (9, 5)]


def test_the_widest_that_fits_is_taken(configuration):
    plan = configuration((32, 32), 4, 32, 3)
    needs = {parts: denoiser_cost(plan, base_settings(plan, parts, False), 1, 2, 4).total for parts in (8, 16, 32)}
    assert sorted(needs.values()) == list(needs.values())
    found = sized(plan, 1, 2, False, lambda cost, settings: cost.total <= (needs[16] + needs[32]) / 2)
    assert 16 <= found.parts < 32
    assert found.cost.total <= (needs[16] + needs[32]) / 2
    assert found.settings.features_per_stage == width_at(found.parts, (32, 64, 128))
    assert sized(plan, 1, 2, False, lambda *_: True).parts == 32
    with pytest.raises(ValueError, match="eighth"):
        sized(plan, 1, 2, False, lambda *_: False)


def test_shallow_dense_blocks_where_deep_ones_leave_less_than_half_of_the_width(configuration):
    plan = configuration((32, 32), 4, 32, 3)
    at_half = denoiser_cost(plan, base_settings(plan, HALF, False), 1, 2, 4).total

    def within(share):
        return sized(plan, 1, 2, False, lambda cost, settings: cost.total <= share * at_half)

    assert within(1.2).settings.sdb_depth == 4
    tight = within(0.8)
    assert tight.settings.sdb_depth == 2
    as_deep = base_settings(plan, tight.parts, False)
    assert denoiser_cost(plan, as_deep, 1, 2, 4).total > 0.8 * at_half, "so wide a denoiser of 4 layers would not fit"


def test_regions_and_training_length_reach_the_settings(configuration):
    settings = base_settings(configuration((32, 32)), HALF, True)
    assert settings.regions and settings.ema_decay == 0.9999


@pytest.mark.parametrize("patch", [(32, 32), (256, 256), (512, 512), (40, 56, 40), (128, 128, 128)])
def test_attention_keeps_to_its_share(configuration, patch):
    plan = configuration(patch, 2, 32, 5)
    start = base_settings(plan, HALF, False)
    settings, reasons = with_attention(plan, start, 1, 3)
    assert settings.attention_tokens in ATTENTION_TOKENS
    assert set(reasons) == {"attention_tokens", "attention_stages"}
    with_it = denoiser_cost(plan, settings, 1, 3, 2, amp=False).flops
    deepest = denoiser_cost(plan, with_stage(settings, 4), 1, 3, 2, amp=False).flops
    assert with_it - deepest <= 2.1 * ATTENTION_SHARE * with_it
    tokens = [math.prod(size) for size in stage_tokens(plan)]
    if max(tokens[1:]) <= 256:
        assert settings.attention_stages == (1, 2, 3, 4) and settings.attention_tokens == 4096


def with_stage(settings, stage):
    import dataclasses

    return dataclasses.replace(settings, attention_stages=(stage,))
