"""Costs found without data agree with what real steps keep, need and compute."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_diffusion.inference.volume import Tiling, VolumeProcess
from nnunet_diffusion.model.build import build_denoiser, build_objective
from nnunet_diffusion.model.objective import evaluate_pgdiffseg
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import default_settings
from nnunet_diffusion.planning import costs
from nnunet_diffusion.planning.costs import SavedBytes, denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.flops import count_flops
from nnunet_diffusion.planning.steps import build_nnunet, nnunet_builder, nnunet_loss, nnunet_step

CHANNELS, HEADS = 2, 3
# patch, batch, nnU-Net's width at the first stage, stages
PLANS = [
    ((32, 32), 2, 8, 3),
    ((56, 40), 16, 16, 4),
    ((64, 64), 8, 16, 4),
    ((96, 96), 4, 32, 5),
    ((127, 65), 2, 16, 4),
    ((128, 128), 2, 32, 5),
    ((192, 160), 3, 16, 6),
    ((16, 16, 16), 2, 8, 3),
    ((24, 40, 24), 2, 16, 3),
    ((32, 48, 32), 2, 8, 3),
    ((33, 31, 17), 3, 16, 3),
    ((48, 48, 48), 2, 16, 4),
    ((64, 64, 64), 1, 16, 4),
]


def precision(amp):
    return torch.autocast("cpu", dtype=torch.bfloat16) if amp else contextlib.nullcontext()


def batch_of(patch, batch):
    return torch.randn(batch, CHANNELS, *patch), torch.randint(0, HEADS, (batch, 1, *patch))


# processors without bfloat16 take many times as long for it: the smaller plans
@pytest.mark.parametrize(
    ("patch", "batch", "width", "stages", "amp"),
    [(*plan, False) for plan in PLANS] + [(*plan, True) for plan in (*PLANS[:2], *PLANS[7:9], PLANS[10])],
)
def test_saved_bytes_are_those_of_a_real_forward_pass(configuration, patch, batch, width, stages, amp):
    plan = configuration(patch, batch, width, stages)
    settings = default_settings(plan)
    denoiser = build_denoiser(settings, plan, CHANNELS, HEADS, nnunet_builder(plan, HEADS))
    denoiser.train()
    image, _ = batch_of(patch, batch)
    noisy, clean = torch.randn(batch, HEADS, *patch), torch.randn(batch, HEADS, *patch)
    with SavedBytes(denoiser) as saved:
        with precision(amp):
            outputs = evaluate_pgdiffseg(denoiser, noisy, image, torch.zeros(batch, dtype=torch.long))
        loss = (outputs[0].float() - clean).square().mean() + sum(part.float().square().mean() for part in outputs[1:])
    assert loss.requires_grad
    cost = denoiser_cost(plan, settings, CHANNELS, HEADS, batch, amp=amp)
    assert cost.attention == pytest.approx(saved.attention, rel=0.1)
    assert cost.activations == pytest.approx(saved.activations, rel=0.1)


@pytest.mark.parametrize("denoiser", ["pgdiffseg", "nnunet"])
def test_starts_out_of_fold_cost_an_evaluation_of_nnunet_more(configuration, denoiser):
    """The networks are not trained yet when a job estimates its memory."""
    plan = configuration((64, 64), 8, 16, 4)
    truth, unseen = (
        dataclasses.replace(default_settings(plan, denoiser=denoiser), starts={kind: 1.0})
        for kind in ("truth", "out_of_fold")
    )
    costs_of = [denoiser_cost(plan, settings, CHANNELS, HEADS, 8, amp=False) for settings in (truth, unseen)]
    # a step of nnU-Net is three passes
    assert costs_of[1].flops - costs_of[0].flops == pytest.approx(
        nnunet_cost(plan, CHANNELS, HEADS, 8, amp=False).flops / 3, rel=0.1
    )


@pytest.mark.parametrize(("patch", "residual"), [((64, 64), False), ((32, 32, 16), False), ((32, 32, 16), True)])
def test_peak_and_flops_of_nnunet_are_those_of_a_real_step(configuration, patch, residual):
    plan = configuration(patch, 2, 16, 3, residual=residual)
    network = build_nnunet(plan, CHANNELS, HEADS).train()
    trace = costs._Trace(network, network)
    with trace.recording():
        step = nnunet_step(network, *batch_of(patch, 2), update=False)
        trace.data_is_there()
        trace.run(step)
    real = trace.cost(optimizer_values=1, average=False, gpu=False)
    cost = nnunet_cost(plan, CHANNELS, HEADS, 2, amp=False, gpu=False)
    assert cost.flops == real.flops
    assert cost.total == pytest.approx(real.total, rel=0.1)
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    assert cost.flops == counter.get_total_flops()


def test_shortcuts_have_the_shapes_of_their_operators():
    aten, (features, gradient, weight) = torch.ops.aten, (torch.randn(2, 6, 5), torch.randn(2, 6, 5), torch.randn(6))
    sizes, mask = (2, 6, 5, 3), [True, True, True]
    _, mean, scale = aten.native_group_norm(features, weight, weight, *sizes, 1e-5)
    calls = {
        aten.native_group_norm: (features, weight, weight, *sizes, 1e-5),
        aten.native_group_norm_backward: (gradient, features, mean, scale, weight, *sizes, mask),
        aten.silu_backward: (gradient, features),
    }
    assert set(calls) == set(costs._SHORTCUTS)
    for operator, arguments in calls.items():
        real, short = operator(*arguments), costs._SHORTCUTS[operator](*arguments)
        real, short = (one if isinstance(one, tuple) else (one,) for one in (real, short))
        assert [(one.shape, one.dtype) for one in short] == [(one.shape, one.dtype) for one in real]


def test_parts_of_a_denoisers_cost(configuration):
    plan = configuration((32, 32), 4, 16, 3)
    settings = default_settings(plan)
    cost = denoiser_cost(plan, settings, CHANNELS, HEADS, 4)
    denoiser = build_denoiser(settings, plan, CHANNELS, HEADS, nnunet_builder(plan, HEADS))
    weights = 4 * sum(p.numel() for p in denoiser.parameters())
    assert cost.optimizer == 2 * weights and 0 <= cost.gradients <= weights
    frozen = 4 * sum(p.numel() for p in build_nnunet(plan, CHANNELS, HEADS).parameters())
    assert cost.weights == pytest.approx(weights + frozen, rel=0.01)  # buffers of the norms
    assert cost.average == pytest.approx(weights, rel=0.01)
    assert cost.data >= 4 * 32 * 32 * (CHANNELS * 4 + 2)  # the image in float32, the label map in int16
    assert cost.workspace > 0 == denoiser_cost(plan, settings, CHANNELS, HEADS, 4, gpu=False).workspace
    assert cost.total == sum(value for key, value in dataclasses.asdict(cost).items() if key != "flops")


def test_weights_that_outweigh_the_activations_are_updated_in_memory_too(configuration):
    plan = configuration((8, 8), 2, 128, 3)
    weights = 4 * sum(p.numel() for p in build_nnunet(plan, CHANNELS, HEADS).parameters())
    cost = nnunet_cost(plan, CHANNELS, HEADS, 2, amp=False, gpu=False)
    assert cost.activations < weights / 10
    # weights, momentum, gradients, and the temporary copy of these
    assert cost.total == pytest.approx(4 * weights, rel=0.05)


def test_need_grows_with_batch_width_and_precision(configuration):
    plan = configuration((48, 48), 4, 16, 3)
    settings = default_settings(plan)
    wide = dataclasses.replace(settings, features_per_stage=(16, 32, 64))

    def need(settings=settings, batch=4, **options):
        return denoiser_cost(plan, settings, CHANNELS, HEADS, batch, **options).total

    assert need() < need(batch=8) and need() < need(wide) and need() < need(amp=False)


def test_attention_counts_with_its_tokens(configuration):
    plan = configuration((64, 64), 2, 16, 3)
    few, many = (dataclasses.replace(default_settings(plan), attention_tokens=tokens) for tokens in (64, 1024))
    few, many = (denoiser_cost(plan, settings, CHANNELS, HEADS, 2) for settings in (few, many))
    assert few.flops < many.flops and few.attention < many.attention
    one = dataclasses.replace(default_settings(plan), attention_stages=(2,))
    assert denoiser_cost(plan, one, CHANNELS, HEADS, 2).attention < many.attention


def test_nothing_is_allocated_for_a_plan_beyond_this_machine(configuration):
    plan = configuration((512, 512, 512), 8, 32, 5)
    assert nnunet_cost(plan, 1, 5, 8).total > 10**12


@pytest.mark.parametrize(("patch", "batch", "width", "stages"), [((56, 40), 16, 16, 4), ((32, 48, 32), 2, 8, 3)])
def test_nnunets_network_as_denoiser_costs_what_nnunet_costs(configuration, patch, batch, width, stages):
    """A training step: the K more input channels and the timestep add a few per cent; PGDiffSeg costs more than half again."""
    plan = configuration(patch, batch, width, stages)
    nnunet = nnunet_cost(plan, CHANNELS, HEADS, batch).flops
    unet, pgdiffseg = (
        denoiser_cost(plan, default_settings(plan, denoiser=kind), CHANNELS, HEADS, batch).flops / nnunet
        for kind in ("nnunet", "pgdiffseg")
    )
    assert 0.98 < unet < 1.1 < 1.4 < pgdiffseg


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize(("patch", "batch", "width", "stages"), [((48, 40), 4, 16, 3), ((16, 24, 16), 2, 8, 3)])
def test_hidiff_costs_what_its_two_turns_save_and_compute(configuration, patch, batch, width, stages, weight, amp):
    plan = configuration(patch, batch, width, stages)
    settings = dataclasses.replace(default_settings(plan, denoiser="hidiff"), collaboration_weight=weight)
    denoiser = build_denoiser(settings, plan, CHANNELS, HEADS, nnunet_builder(plan, HEADS))
    segmenter = DiffusionSegmenter(build_nnunet(plan, CHANNELS, HEADS), denoiser, settings).train()
    image, target = batch_of(patch, batch)
    learning = nn.ModuleList([segmenter.denoiser, segmenter.presegmentor])
    with FlopCounterMode(display=False) as counted, SavedBytes(learning) as saved:
        generator = torch.Generator().manual_seed(0)
        turns = build_objective(segmenter).turns(
            image, target, nnunet_loss(), generator, precision=lambda: precision(amp)
        )
        for _, terms in turns:
            sum(terms.values()).backward()
    cost = denoiser_cost(plan, settings, CHANNELS, HEADS, batch, amp=amp)
    assert cost.activations + cost.attention == pytest.approx(saved.activations + saved.attention, rel=0.1)
    assert cost.flops == pytest.approx(counted.get_total_flops(), rel=0.1)
    assert cost.optimizer == 2 * 4 * sum(parameter.numel() for parameter in learning.parameters())


@pytest.mark.parametrize("patch", [(128, 128), (64, 64, 64)])
def test_an_iteration_of_hidiff_takes_the_flops_of_two_of_nnunets_at_stock_widths(configuration, patch):
    plan = configuration(patch, 2, 32, 5)
    settings = default_settings(plan, denoiser="hidiff")
    ratio = denoiser_cost(plan, settings, 1, 2, 2).flops / nnunet_cost(plan, 1, 2, 2).flops
    assert 1.5 < ratio < 2


@pytest.mark.parametrize("patch", [(96, 96), (32, 32, 32)])
@pytest.mark.parametrize(("steps", "limit"), [(10, 3.0), (2, 1.5)])
def test_prediction_with_hidiff_costs_little_more_than_mirrored_nnunet(configuration, patch, steps, limit):
    """In FLOPs, of a volume of two tiles: p comes from nnU-Net's mirrored prediction, the sample beside it is not mirrored."""
    plan = configuration(patch, 1, 16, 4)
    settings = dataclasses.replace(default_settings(plan, denoiser="hidiff"), steps=steps)
    denoiser = build_denoiser(settings, plan, CHANNELS, HEADS, nnunet_builder(plan, HEADS))
    segmenter = DiffusionSegmenter(build_nnunet(plan, CHANNELS, HEADS), denoiser, settings).eval()
    whole, prior = (torch.zeros(count, 2 * patch[0], *patch[1:]) for count in (CHANNELS, HEADS))
    tiles = [(slice(None), slice(a, a + patch[0]), *[slice(0, size) for size in patch[1:]]) for a in (0, patch[0])]
    tiling = Tiling(tiles, torch.ones(patch), 1, torch.device("cpu"))
    process = VolumeProcess(segmenter, whole, tiling, prior + 0.5, 1, torch.device("cpu"), condition_bytes=1e9)
    with torch.no_grad():
        once = count_flops(lambda: segmenter.presegmentor(whole[tiles[0]][None]))
        sample = count_flops(lambda: process.run([0]))
    mirrored = 2 ** len(patch) * once * len(tiles)
    assert process.evaluations.presegmentor == len(tiles)
    assert (mirrored + sample) / mirrored < limit
