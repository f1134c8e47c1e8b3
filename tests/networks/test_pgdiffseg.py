"""PGDiffSeg: shapes on any topology, dependence on its inputs, shared conditions, refusals."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnunet_diffusion.model.objective import evaluate_pgdiffseg
from nnunet_diffusion.networks import PGDiffSeg
from nnunet_diffusion.networks.blocks import GroupNorm, InstanceNorm, group_count

PLAIN_2D = {"features_per_stage": [8, 16, 16], "strides": [1, 2, 2], "kernel_sizes": [3, 3, 3], "conv_op": nn.Conv2d}
ANISOTROPIC_3D = {
    "features_per_stage": [8, 12, 16, 16],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 1]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "conv_op": "torch.nn.modules.conv.Conv3d",
}


def build(topology=PLAIN_2D, awake=True, **options):
    """Return a small network; awake: with etas and running statistics away from their start."""
    torch.manual_seed(0)
    net = PGDiffSeg(2, 3, 4, **topology, presence_classes=2, location_classes=3, **options)
    if awake:
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if "eta" in name:
                nn.init.constant_(tensor, 0.5)
            if "running" in name:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return net


def inputs(size=(12, 16), batch=2, dtype=torch.float64):
    image, noisy = torch.randn(batch, 2, *size, dtype=dtype), torch.randn(batch, 3, *size, dtype=dtype)
    return image, noisy, torch.arange(batch) * 37 + 5


def assert_same(ours, theirs):
    for name in ("skips", "bottleneck", "prior", "presence_logits", "location_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("topology", "size"), [(PLAIN_2D, (9, 7)), (ANISOTROPIC_3D, (4, 6, 5))])
def test_what_is_constant_stays_so_up_to_the_edge_in_the_first_and_last_convolution(topology, size):
    net = build(topology)
    for conv in (net.image_dense.layers[0][0], net.noisy_dense.layers[0][0], net.output[-1]):
        values = torch.randn(1, conv.in_channels, *[1] * len(size))
        found = conv(values.expand(-1, -1, *size))
        torch.testing.assert_close(found, found[(..., *[slice(2, 3)] * len(size))].expand_as(found))


@pytest.mark.parametrize("size", [(16, 16), (17, 13), (1, 1), (5, 32), (2, 3)])
def test_2d_sizes(size):
    net = build().double()
    image, noisy, timestep = inputs(size)
    condition = net.encode(image, timestep)
    half = tuple(-(-n // 2) for n in size)
    assert net(noisy, timestep, condition).shape == (2, 4, *size)
    assert condition.presence_logits.shape == (2, 2)
    assert condition.location_logits.shape == (2, 3, *half)
    assert condition.bottleneck.shape == condition.prior.shape == (2, 16, *(-(-n // 2) for n in half))
    assert [skip.shape[1:] for skip in condition.skips] == [(16, *size), (16, *half)]


@pytest.mark.parametrize("size", [(4, 16, 8), (5, 9, 7), (1, 3, 2)])
def test_3d_anisotropic_sizes(size):
    net = build(ANISOTROPIC_3D)
    image, noisy, timestep = inputs(size, dtype=torch.float32)
    assert net(noisy, timestep, net.encode(image, timestep)).shape == (2, 4, *size)


@pytest.mark.parametrize("first", [1, 2, 3, [1, 2], [3, 1], [4, 2]])
@pytest.mark.parametrize("second", [1, 2, [2, 1], 5])
def test_every_stride(first, second):
    net = build({**PLAIN_2D, "strides": [1, first, second]}, norm="instance")
    image, noisy, timestep = inputs((11, 14), batch=1, dtype=torch.float32)
    assert net(noisy, timestep, net.encode(image, timestep)).shape == (1, 4, 11, 14)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_one_image_with_a_single_voxel_at_the_bottleneck_in_training(norm):
    net = build(norm=norm).train()
    image, noisy, timestep = inputs((4, 4), batch=1, dtype=torch.float32)
    condition = net.encode(image, timestep)
    assert condition.bottleneck.shape[2:] == (1, 1)
    assert net(noisy, timestep, condition).isfinite().all()


@pytest.mark.parametrize("topology", [PLAIN_2D, ANISOTROPIC_3D])
def test_gradient_reaches_image_noisy_and_timestep(topology):
    net = build(topology, awake=False).double()
    image, noisy, timestep = inputs((8, 12) if topology is PLAIN_2D else (4, 8, 8))
    tensors = [image, noisy, timestep.double(), timestep.double()]
    for tensor in tensors:
        tensor.requires_grad_()
    prediction = net(noisy, tensors[2], net.encode(image, tensors[3]))
    for tensor in torch.autograd.grad(prediction.square().sum(), tensors):
        assert tensor.reshape(2, -1).abs().amax(dim=1).min() > 1e-8


def test_prediction_uses_every_part_of_the_condition_and_adds_the_prior_to_the_bottleneck():
    net = build().double().eval()
    image, noisy, timestep = inputs()
    condition = net.encode(image, timestep)
    prediction = net(noisy, timestep, condition)
    parts = [*condition.skips, condition.bottleneck, condition.prior]
    gradients = torch.autograd.grad(prediction.square().sum(), parts)
    assert all(gradient.abs().max() > 1e-8 for gradient in gradients)
    # Eq. 6: only the sum of the two counts
    moved = replace(condition, bottleneck=condition.prior, prior=condition.bottleneck)
    torch.testing.assert_close(net(noisy, timestep, moved), prediction, rtol=0, atol=1e-10)


def test_skip_is_the_sum_of_both_flows():
    net = build().double().eval()
    image, noisy, timestep = inputs()
    received = []
    hooks = [unit.register_forward_pre_hook(lambda _, given: received.append(given[1])) for unit in net.up_units]
    condition = net.encode(image, timestep)
    net(noisy, timestep, condition)
    net(noisy, timestep, replace(condition, skips=tuple(torch.zeros_like(skip) for skip in condition.skips)))
    for hook in hooks:
        hook.remove()
    both, ours = received[:2], received[2:]
    # up units run from the deepest skip to the shallowest
    torch.testing.assert_close(both[0] - ours[0], condition.skips[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(both[1] - ours[1], condition.skips[0], rtol=0, atol=1e-10)


def test_each_sample_depends_on_its_own_timestep():
    net = build().double().eval()
    image, noisy, timestep = inputs()
    condition = net.encode(image, timestep)
    changed = net(noisy, timestep + torch.tensor([0, 1]), condition) - net(noisy, timestep, condition)
    assert changed[0].abs().max() < 1e-10
    assert changed[1].abs().max() > 1e-6


def test_encode_does_not_depend_on_anything_of_the_denoising_side():
    net = build().double().eval()
    image, noisy, timestep = inputs()
    before = net.encode(image, timestep)
    net(noisy, timestep, before)
    for name, parameter in net.named_parameters():
        if any(part in name for part in ("noisy_dense", "denoising", "bottleneck", "up_units", "output")):
            nn.init.normal_(parameter)
    assert_same(net.encode(image, timestep), before)


def test_condition_depends_on_image_and_timestep():
    net = build().double().eval()
    image, _, timestep = inputs()
    condition = net.encode(image, timestep)
    for other in (net.encode(image + 1, timestep), net.encode(image, timestep + 1)):
        assert (other.bottleneck - condition.bottleneck).abs().max() > 1e-6


def test_without_time_in_the_condition_flow_one_condition_serves_all_timesteps():
    net = build(time_in_condition_flow=False).double().eval()
    image, noisy, timestep = inputs()
    condition = net.encode(image)
    assert_same(net.encode(image, timestep), condition)
    later = net(noisy, timestep + 1, condition) - net(noisy, timestep, condition)
    assert later.abs().max() > 1e-6
    assert not any("condition_flow" in name and "time" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize("batch", [1, 2])
def test_shared_condition_equals_separate_evaluations(batch):
    net = build().double().eval()
    image, _, timestep = inputs(batch=batch)
    noisy = torch.randn(3 * batch, 3, 12, 16, dtype=torch.float64)
    times = timestep.repeat_interleave(3)
    shared = net.encode(image, timestep).repeat_interleave(3)
    assert_same(shared, net.encode(image.repeat_interleave(3, dim=0), times))
    together = net(noisy, times, shared)
    for i in range(3 * batch):
        alone = net.encode(image[i // 3 : i // 3 + 1], times[i : i + 1])
        torch.testing.assert_close(
            together[i : i + 1], net(noisy[i : i + 1], times[i : i + 1], alone), rtol=0, atol=1e-10
        )


def test_condition_of_one_image_is_shared_without_copies():
    net = build()
    image, _, timestep = inputs(batch=1, dtype=torch.float32)
    condition = net.encode(image, timestep)
    assert condition.repeat_interleave(5).skips[0].data_ptr() == condition.skips[0].data_ptr()


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_samples_of_a_batch_are_independent_in_eval(norm):
    net = build(norm=norm).double().eval()
    image, noisy, timestep = inputs(batch=3)
    together = net.encode(image, timestep)
    predictions = net(noisy, timestep, together)
    for i in range(3):
        alone = net.encode(image[i : i + 1], timestep[i : i + 1])
        torch.testing.assert_close(alone.presence_logits, together.presence_logits[i : i + 1], rtol=0, atol=1e-10)
        prediction = net(noisy[i : i + 1], timestep[i : i + 1], alone)
        torch.testing.assert_close(prediction, predictions[i : i + 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("time", [True, False])
def test_two_steps_change_every_parameter(optimizer, norm, time):
    net = build(awake=False, norm=norm, time_in_condition_flow=time).double().train()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    steps = optimizer(net.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        image, noisy, timestep = inputs()
        condition = net.encode(image, timestep)
        heads = condition.presence_logits.square().mean() + condition.location_logits.square().mean()
        steps.zero_grad()
        (net(noisy, timestep, condition).square().mean() + heads).backward()
        steps.step()
    # a parameter that a norm cancels has a gradient of rounding errors: about 1e-17
    dead = [name for name, parameter in net.named_parameters() if parameter.grad.abs().max() < 1e-12]
    unchanged = [name for name, parameter in net.named_parameters() if torch.equal(parameter, before[name])]
    assert not dead
    assert not unchanged


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm2d), ("instance", InstanceNorm), ("group", GroupNorm)]
)
def test_norms_and_their_groups_are_what_was_asked(norm, kind):
    net = build(norm=norm, sdb_depth=3)
    extraction = [m for part in (net.image_dense, net.noisy_dense, net.prior) for m in part.modules()]
    # 3 layers in each slim dense block, one block and two units of two in the prior branch
    assert sum(type(m) is kind for m in extraction) == 2 * 3 + 1 + 2 * 2
    groups = [m for m in net.modules() if type(m) is GroupNorm]
    assert groups
    assert all(m.num_groups == group_count(m.num_channels) for m in groups)


def test_attention_only_in_the_stages_asked_for():
    assert list(build().attention) == ["1", "2"]
    assert list(build(attention_stages=[2]).attention) == ["2"]
    net = build(attention_stages=[])
    image, noisy, timestep = inputs(dtype=torch.float32)
    assert net(noisy, timestep, net.encode(image, timestep)).shape == (2, 4, 12, 16)


def test_half_precision_under_autocast():
    net = build()
    image, noisy, timestep = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        condition = net.encode(image, timestep)
        prediction = net(noisy, timestep, condition)
    assert prediction.dtype == condition.bottleneck.dtype == torch.bfloat16
    full = net(noisy, timestep, net.encode(image, timestep))
    assert (prediction - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dimension", [2, 3])
def test_compiled_training_step_has_the_same_gradients(dimension):
    """By torch.compile's own code, which is what a GPU's training runs by default."""
    torch.manual_seed(0)
    conv = (nn.Conv2d, nn.Conv3d)[dimension - 2]
    net = PGDiffSeg(
        1, 2, 2, (4, 8), [1, 2], [3, 3], conv, presence_classes=1, location_classes=1, sdb_depth=2, norm="instance"
    )
    image, noisy = torch.randn(2, 1, *[8] * dimension), torch.randn(2, 2, *[8] * dimension)
    timestep, gradients = torch.tensor([3, 700]), {}
    for name, evaluate in (("eager", evaluate_pgdiffseg), ("compiled", torch.compile(evaluate_pgdiffseg))):
        net.zero_grad()
        sum(output.square().mean() for output in evaluate(net, noisy, image, timestep)).backward()
        gradients[name] = {key: parameter.grad.clone() for key, parameter in net.named_parameters()}
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["compiled"][key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_one_graph_for_torch_compile():
    net = build().eval()
    image, noisy, timestep = inputs(dtype=torch.float32)

    def call(image, noisy, timestep):
        return net(noisy, timestep, net.encode(image, timestep))

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image, noisy, timestep), call(image, noisy, timestep))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_per_stage": [8]}, "features_per_stage must hold at least 2"),
        ({"strides": [1, 2]}, r"strides must have one entry per stage \(3\), got 2"),
        ({"strides": [2, 2, 2]}, r"strides\[0\] must be all ones"),
        ({"strides": [1, [2, 2, 2], 2]}, r"strides\[1\] must hold 2 integers"),
        ({"strides": [1, 0, 2]}, r"strides\[1\] must hold 2 integers of at least 1"),
        ({"kernel_sizes": [3, 3]}, "kernel_sizes must have one entry per stage"),
        ({"kernel_sizes": [3, 4, 3]}, "kernel_sizes must be odd"),
        ({"conv_op": "torch.nn.Linear"}, "conv_op must be a convolution"),
        ({"norm": "layer"}, "norm must be one of batch, instance, group"),
        ({"sdb_depth": 0}, "sdb_depth must be at least 1"),
        ({"attention_tokens": 0}, "attention_tokens must be at least 1"),
        ({"attention_stages": [3]}, r"attention_stages must lie in 1\.\.2, got \[3\]"),
    ],
)
def test_refusals_name_argument_and_limit(change, message):
    with pytest.raises(ValueError, match=message):
        build({**PLAIN_2D, **change})


def test_inputs_that_do_not_fit_are_refused():
    net = build()
    image, noisy, timestep = inputs(dtype=torch.float32)
    condition = net.encode(image, timestep)
    with pytest.raises(ValueError, match="image must have 2 channels"):
        net.encode(noisy, timestep)
    with pytest.raises(ValueError, match="timestep is missing"):
        net.encode(image)
    for wrong in (noisy[:1], noisy[:, :2], noisy[..., 1:]):
        with pytest.raises(ValueError, match=r"noisy must have the shape \(2, 3, 12, 16\)"):
            net(wrong, timestep, condition)


def test_networks_import_neither_nnunet_nor_diffusion():
    code = (
        "import sys, nnunet_diffusion.networks; "
        "assert not {'nnunetv2', 'nnunet_diffusion.diffusion'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("topology", "size"), [(PLAIN_2D, (9, 7)), (ANISOTROPIC_3D, (4, 6, 5))])
@pytest.mark.parametrize("options", [{"guidance": "normalised"}, {"attention": "cross"}], ids=lambda given: str(given))
def test_variants_keep_the_interface_and_the_condition_knows_no_state(topology, size, options):
    net = build(topology, **options).double().eval()
    image, noisy, timestep = inputs(size)
    condition = net.encode(image, timestep)
    found = net(noisy, timestep, condition)
    assert found.shape == (2, 4, *size) and torch.isfinite(found).all()
    assert not torch.equal(found, net(noisy + 1, timestep, condition))
    # two states of one image, by one condition
    twice = net(noisy.repeat_interleave(2, 0), timestep.repeat_interleave(2), condition.repeat_interleave(2))
    torch.testing.assert_close(twice[::2], found, rtol=0, atol=1e-10)


def test_normalised_guidance_does_not_depend_on_the_scale_of_its_terms():
    net = build(guidance="normalised").double().eval()
    image, noisy, timestep = inputs()
    condition = net.encode(image, timestep)
    larger = replace(condition, bottleneck=1000 * condition.bottleneck, prior=1000 * condition.prior)
    torch.testing.assert_close(net(noisy, timestep, larger), net(noisy, timestep, condition), rtol=0, atol=1e-3)
    elsewhere = replace(condition, location_logits=condition.location_logits + 3)
    assert (net(noisy, timestep, elsewhere) - net(noisy, timestep, condition)).abs().max() > 1e-3
    papers = build().double().eval()
    condition = papers.encode(image, timestep)
    elsewhere = replace(condition, location_logits=condition.location_logits + 3)
    assert torch.equal(papers(noisy, timestep, elsewhere), papers(noisy, timestep, condition))


def test_in_cross_attention_the_denoising_flow_attends_to_the_condition_flow():
    net = build(awake=False, attention="cross").double().eval()
    image, noisy, timestep = inputs()
    condition = net.encode(image, timestep)
    assert len(condition.attended) == len(net.attention) == 2
    other = replace(condition, attended=tuple(features.flip(2) + 1 for features in condition.attended))
    assert (net(noisy, timestep, other) - net(noisy, timestep, condition)).abs().max() > 1e-4
    assert build().encode(image.float(), timestep).attended == ()


@pytest.mark.parametrize("options", [{"guidance": "strong"}, {"attention": "full"}])
def test_unknown_variants_name_the_known_ones(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be one of paper.*'{value}'"):
        build(**options)
