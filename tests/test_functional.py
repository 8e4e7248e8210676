"""softmax, SiLU, attention, cross-entropy: against torch's own, and by what must hold."""

import math

import pytest
import torch
from torch.nn import functional as F

from lm.functional import (
    causal_attention,
    cross_entropy,
    perplexity,
    scaled_dot_product_attention,
    silu,
    softmax,
)

EXTREMES = [1.0, 1e4]


def gradients(output, *inputs):
    """The gradients of a fixed random combination of `output`'s entries."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("scale", EXTREMES)
def test_softmax_equals_torch(dim, scale):
    x = (torch.randn(3, 4, 5) * scale).requires_grad_()
    ours, theirs = softmax(x, dim), F.softmax(x, dim)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, x), gradients(theirs, x))


def test_softmax_ignores_a_shift():
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(softmax(x + 100, -1), softmax(x, -1))


def test_softmax_keeps_the_dtype_and_reduces_in_float32():
    x = torch.zeros(100_000, dtype=torch.bfloat16)
    assert softmax(x, 0).dtype == torch.bfloat16
    assert softmax(x, 0)[0] == torch.tensor(1e-5, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256


@pytest.mark.parametrize("scale", EXTREMES)
def test_silu_equals_torch(scale):
    x = (torch.randn(5, 6) * scale).requires_grad_()
    torch.testing.assert_close(silu(x), F.silu(x))
    torch.testing.assert_close(gradients(silu(x), x), gradients(F.silu(x), x))


def random_qkv(*batch, queries=5, keys=7, d_k=8, d_v=6):
    shapes = (queries, d_k), (keys, d_k), (keys, d_v)
    return tuple(torch.randn(*batch, *shape, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch(batch, masked):
    q, k, v = random_qkv(*batch)
    mask = None
    if masked:
        mask = torch.rand(*batch, 5, 7) < 0.5
        mask[..., 0] = True
    ours, theirs = scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, q, k, v), gradients(theirs, q, k, v))


def test_attention_broadcasts_the_mask():
    q, k, v = random_qkv(2, 3)
    mask = torch.rand(5, 7) < 0.7
    mask[:, 0] = True
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, mask),
        scaled_dot_product_attention(q, k, v, mask.expand(2, 3, 5, 7)),
    )


def test_a_query_that_may_look_nowhere_gets_zeros_and_no_gradient():
    q, k, v = random_qkv()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    output = scaled_dot_product_attention(q, k, v, mask)
    assert output[2].eq(0).all()
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output[2].sum(), (q, k, v)):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("queries", [1, 5, 200])
@pytest.mark.parametrize("past", [0, 3, 70])
def test_causal_attention_is_attention_under_the_triangle(queries, past, scale):
    keys = past + queries
    q, k, v = (x.detach().double().requires_grad_() for x in random_qkv(2, 3, queries=queries, keys=keys, d_v=8))
    triangle = torch.arange(keys) <= past + torch.arange(queries)[:, None]
    ours, theirs = causal_attention(scale * q, k, v), F.scaled_dot_product_attention(scale * q, k, v, triangle)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, q, k, v), gradients(theirs, q, k, v))


@pytest.mark.parametrize("scale", EXTREMES)
@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 300)])
def test_cross_entropy_equals_torch(batch, scale):
    logits = (torch.randn(*batch, 50) * scale).requires_grad_()
    targets = torch.randint(50, batch)
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.reshape(-1, 50), targets.reshape(-1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, logits), gradients(theirs, logits))


def test_cross_entropy_of_uniform_and_certain_logits():
    targets = torch.tensor([3, 1])
    torch.testing.assert_close(cross_entropy(torch.zeros(2, 8), targets), torch.tensor(math.log(8)))
    certain = torch.full((2, 8), -1e4).scatter(1, targets[:, None], 1e4)
    assert cross_entropy(certain, targets) == 0


def test_cross_entropy_reduces_bfloat16_in_float32():
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    targets = torch.randint(1000, (64,))
    loss = cross_entropy(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == torch.bfloat16


def test_perplexity_is_the_number_of_equally_likely_tokens():
    torch.testing.assert_close(perplexity(torch.zeros(3, 4, 17), torch.zeros(3, 4).long()), torch.tensor(17.0))
