"""The rules that size the denoiser, on plans whose answer is known."""

import math

import pytest

from nnunet_diffusion.planning.costs import denoiser_cost
from nnunet_diffusion.planning.rules import (
    ATTENTION_SHARE,
    ATTENTION_TOKENS,
    HALF,
    WIDTHS,
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
    found = sized(plan, 1, 2, False, lambda cost, _: cost.total * 2 / (needs[16] + needs[32]))
    assert 16 <= found.parts < 32
    assert found.cost.total <= (needs[16] + needs[32]) / 2
    assert found.settings.features_per_stage == width_at(found.parts, (32, 64, 128))
    assert sized(plan, 1, 2, False, lambda *_: 1.0).parts == 32
    with pytest.raises(ValueError, match="eighth"):
        sized(plan, 1, 2, False, lambda *_: 1.01)


@pytest.mark.parametrize("depth", [4, 2])
@pytest.mark.parametrize("bend", ["line", "convex", "concave", "steps"])
def test_no_wider_one_would_fit_however_need_grows_and_few_are_tried(configuration, bend, depth):
    plan = configuration((32, 32), 4, 32, 3)
    known = {base_settings(plan, parts, False).features_per_stage: parts for parts in WIDTHS}
    tried = []

    def need(cost, settings):
        parts = known[settings.features_per_stage]
        tried.append(parts)
        share = {
            "line": parts / limit,
            "convex": (parts / limit) ** 2,
            "concave": (parts / limit) ** 0.3,
            "steps": math.ceil(parts / 3) * 3 / limit,
        }
        return share[bend] * (1 if settings.sdb_depth == depth else 1.5 if depth == 2 else 0.9)

    for limit in (18, 24, 30) if depth == 4 else (6, 9, 12):
        tried.clear()
        found = sized(plan, 1, 2, False, need)
        assert (found.parts, found.settings.sdb_depth) == (limit, depth)
        assert len(tried) <= (8 if bend == "line" else 13), tried


def test_shallow_dense_blocks_where_deep_ones_leave_less_than_half_of_the_width(configuration):
    plan = configuration((32, 32), 4, 32, 3)
    at_half = denoiser_cost(plan, base_settings(plan, HALF, False), 1, 2, 4).total

    def within(share):
        return sized(plan, 1, 2, False, lambda cost, _: cost.total / (share * at_half))

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
