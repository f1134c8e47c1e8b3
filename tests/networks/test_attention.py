"""Attention: equal to the naive softmax, linear memory, shared and separate parameters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from nnunet_diffusion.networks.attention import (
    ParameterSharedAttention,
    SelfAttention,
    attend,
    pool_tokens,
    pooled_size,
)


def naive(query, key, value):
    """Return softmax(q^T k / sqrt(D)) v with the N x M matrix written out."""
    q, k, v = query.flatten(2), key.flatten(2), value.flatten(2)
    weights = (torch.einsum("bdn,bdm->bnm", q, k) / math.sqrt(q.shape[1])).softmax(dim=2)
    return torch.einsum("bnm,bcm->bcn", weights, v).reshape(*value.shape[:2], *query.shape[2:])


@pytest.mark.parametrize("size", [(9,), (5, 7), (3, 5, 4)])
@pytest.mark.parametrize(("narrow", "wide"), [(1, 8), (2, 16), (5, 40), (8, 8)])
def test_attend_is_naive_softmax_attention_with_its_gradients(size, narrow, wide):
    shapes = [(2, narrow, *size), (2, narrow, *size[:-1], 2), (2, wide, *size[:-1], 2)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    fast, slow = attend(*tensors), naive(*tensors)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    weights = torch.randn_like(fast)
    fast_grads = torch.autograd.grad((fast * weights).sum(), tensors)
    slow_grads = torch.autograd.grad((slow * weights).sum(), tensors)
    torch.testing.assert_close(fast_grads, slow_grads, rtol=0, atol=1e-10)


def test_pooled_size_stays_below_the_limit_and_above_half_of_it():
    for size in itertools.product((1, 2, 3, 5, 8, 13), (1, 4, 7, 30), (1, 6, 33)):
        for tokens in (1, 2, 7, 64, 500):
            pooled = pooled_size(size, tokens)
            assert math.prod(pooled) <= tokens
            assert all(1 <= small <= large for small, large in zip(pooled, size, strict=True))
            if math.prod(size) <= tokens:
                assert pooled == size
            else:
                assert math.prod(pooled) >= tokens / 3 or math.prod(pooled) == 1


def test_pooled_size_halves_the_longest_axis():
    assert pooled_size((64, 64), 4096) == (64, 64)
    assert pooled_size((128, 128), 4096) == (64, 64)
    assert pooled_size((4, 256, 256), 4096) == (4, 32, 32)
    assert pooled_size((65, 64), 4096) == (33, 64)


def test_pool_tokens_averages_cells():
    features = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = features.reshape(2, 3, 2, 2, 3, 2).mean(dim=(3, 5))
    torch.testing.assert_close(pool_tokens(features, 6), expected, rtol=0, atol=1e-12)
    assert pool_tokens(features, 24) is features


def awake(channels, conv_op, tokens):
    """Return the module with eta away from its start at 0, where it is the identity."""
    attention = ParameterSharedAttention(channels, conv_op, tokens).double()
    for eta in attention.eta.values():
        nn.init.constant_(eta, 0.7)
    return attention


def test_shared_attention_starts_as_the_identity():
    attention = ParameterSharedAttention(16, nn.Conv2d, 4096)
    features = torch.randn(2, 16, 6, 5)
    for flow in ("condition", "denoising"):
        torch.testing.assert_close(attention(features, flow), features, rtol=0, atol=0)


@pytest.mark.parametrize(("conv_op", "size"), [(nn.Conv2d, (6, 5)), (nn.Conv3d, (3, 4, 5))])
@pytest.mark.parametrize("flow", ["condition", "denoising"])
def test_shared_attention_is_equations_2_to_5(conv_op, size, flow):
    attention = awake(24, conv_op, 4096)
    features = torch.randn(2, 24, *size, dtype=torch.float64)
    mixed = naive(attention.query(features), attention.key(features), attention.value[flow](features))
    torch.testing.assert_close(attention(features, flow), features + 0.7 * mixed, rtol=0, atol=1e-10)
    assert attention.query.out_channels == attention.key.out_channels == 24 // 8


def test_flows_share_query_and_key_but_not_value_and_eta():
    attention = awake(16, nn.Conv2d, 4096)
    for flow, other in (("condition", "denoising"), ("denoising", "condition")):
        attention.zero_grad(set_to_none=True)
        attention(torch.randn(1, 16, 4, 4, dtype=torch.float64), flow).square().sum().backward()
        assert attention.query.weight.grad is not None
        assert attention.key.weight.grad is not None
        assert attention.value[flow].weight.grad is not None
        assert attention.value[other].weight.grad is None
        assert attention.eta[other].grad is None


def test_pooling_is_exact_where_the_pooled_voxels_are_equal():
    small = torch.randn(1, 16, 4, 3, dtype=torch.float64)
    features = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    exact = awake(16, nn.Conv2d, 48)
    pooled = ParameterSharedAttention(16, nn.Conv2d, 12).double()
    pooled.load_state_dict(exact.state_dict())
    torch.testing.assert_close(pooled(features, "denoising"), exact(features, "denoising"), rtol=0, atol=1e-10)


def test_self_attention_is_norm_attention_projection_and_residual():
    attention = SelfAttention(16, nn.Conv2d, 4096).double()
    features = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    normed = attention.norm(features)
    mixed = naive(attention.query(normed), attention.key(normed), attention.value(normed))
    torch.testing.assert_close(attention(features), features + attention.out(mixed), rtol=0, atol=1e-10)


def test_no_key_has_a_bias():
    assert ParameterSharedAttention(16, nn.Conv2d, 16).key.bias is None
    assert SelfAttention(16, nn.Conv2d, 16).key.bias is None


def saved_bytes(call):
    """Return the bytes that the backward pass keeps, each storage counted once."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_memory_kept_for_the_backward_pass_is_linear_in_the_tokens(tokens):
    attention = ParameterSharedAttention(16, nn.Conv2d, tokens)
    per_token = []
    for edge in (32, 64, 128):
        features = torch.randn(1, 16, edge, edge, requires_grad=True)
        per_token.append(saved_bytes(lambda x=features: attention(x, "condition")) / edge**2)
    # pooling saves some of it; the N x N matrix alone would be 4 bytes x 16384 per token
    assert max(per_token) <= 1.05 * per_token[0]
    assert per_token[0] < 8 * 16 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 32, 160, 256, 320])
def test_memory_is_linear_on_the_gpu(dtype, channels):
    attention = ParameterSharedAttention(channels, nn.Conv2d, 4096).cuda()
    peak = []
    for edge in (64, 128):
        features = torch.randn(1, channels, edge, edge, device="cuda", requires_grad=True)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                attention(features, "condition").float().sum().backward()
            used = torch.cuda.max_memory_allocated() - start
        peak.append(used / (edge**2 * channels * 4))
    assert max(peak) < 20


@pytest.mark.parametrize("tokens", [1000, 16])
def test_row_is_that_of_the_whole_attention(tokens):
    """The row times the values is what attention gives the voxel."""
    torch.manual_seed(0)
    attention = ParameterSharedAttention(16, nn.Conv2d, tokens)
    features, voxel = torch.randn(2, 16, 6, 8), (4, 3)
    with torch.no_grad():
        attention.eta["denoising"].fill_(1)
        row = attention.row(features, voxel)
        values = attention.value["denoising"](pool_tokens(features, tokens))
        mixed = (attention(features, "denoising") - features)[(..., *voxel)]
    assert torch.allclose(row.flatten(1).sum(1), torch.ones(2), atol=1e-5)
    assert torch.allclose(torch.einsum("bm,bcm->bc", row.flatten(1), values.flatten(2)), mixed, atol=1e-5)
