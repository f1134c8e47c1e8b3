"""FLOPs on a CPU: what torch's own counter leaves out is in."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nnunet_diffusion.planning.flops import count_flops, flops_text

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 32, 16, 8
PRODUCTS = 2 * BATCH * HEADS * QUERIES * KEYS * WIDTH
"""Of queries with keys; as many again of the weights with the values."""


def attention(requires_grad):
    query = torch.randn(BATCH, HEADS, QUERIES, WIDTH, requires_grad=requires_grad)
    key, value = (torch.randn(BATCH, HEADS, KEYS, WIDTH, requires_grad=requires_grad) for _ in range(2))
    return lambda: scaled_dot_product_attention(query, key, value)


def test_attention_and_products_are_counted():
    matrix = torch.randn(4, 5)
    assert count_flops(lambda: matrix @ matrix.T) == 2 * 4 * 5 * 4
    assert count_flops(attention(requires_grad=False)) == 2 * PRODUCTS


def test_backward_pass_is_counted():
    run = attention(requires_grad=True)
    # five products: the weights again, then the gradients of values, weights, queries and keys
    assert count_flops(lambda: run().sum().backward()) == (2 + 5) * PRODUCTS


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (3.29e8, "329 MFLOP"),
        (3.294e9, "3.29 GFLOP"),
        (123.4e9, "123 GFLOP"),
        (999.9e9, "1000 GFLOP"),
        (1.5e12, "1.5 TFLOP"),
        (1.5e15, "1500 TFLOP"),
    ],
)
def test_flops_have_a_unit_of_their_size(flops, text):
    assert flops_text(flops) == text
