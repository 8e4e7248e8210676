"""softmax, SiLU, attention, cross-entropy: against torch's own, and by what must hold."""

import math

import pytest
import torch
from torch.nn import functional as F

from lm import functional
from lm import gradients as gradients_by_hand
from lm.functional import (
    causal_attention,
    cross_entropy,
    gated_silu,
    linear_cross_entropy,
    perplexity,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    softmax,
    squared_relu,
)

EXTREMES = [1.0, 1e4]


@pytest.fixture(autouse=True, params=["by hand", "formula"])
def path(request, monkeypatch):
    """Each test runs with the gradients derived by hand, and on the formulas that torch.compile sees."""
    torch.manual_seed(0)
    if request.param == "formula":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(functional, "COMPILED_QUERIES", 64)


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


def test_gated_silu_equals_torch():
    a, b = (torch.randn(2, 5, 6, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(gated_silu(a, b), F.silu(a) * b)
    torch.testing.assert_close(gradients(gated_silu(a, b), a, b), gradients(F.silu(a) * b, a, b))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_rms_norm_equals_torch(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(8, requires_grad=True)
    ours, theirs = rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, x, weight), gradients(theirs, x, weight))


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


@pytest.mark.parametrize("held", [1, 100, 2**25])
@pytest.mark.parametrize("batch", [(), (6,), (2, 35)])
def test_linear_cross_entropy_equals_cross_entropy_of_the_logits(batch, held, monkeypatch):
    monkeypatch.setattr(gradients_by_hand, "LOGITS", held)
    hidden, weight = torch.randn(*batch, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(20, batch)
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = F.cross_entropy((hidden @ weight.T).reshape(-1, 20), targets.reshape(-1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(3 * ours, hidden, weight), gradients(3 * theirs, hidden, weight))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), ours)


def test_squared_relu_and_its_gradient():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0], requires_grad=True)
    y = squared_relu(x)
    assert y.tolist() == [0.0, 0.0, 0.25, 9.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.0, 1.0, 6.0]


def test_the_loss_of_bfloat16_weights_is_summed_in_float32(monkeypatch):
    """Also where bfloat16 is the default type, as under Lightning's bf16-true, and in many pieces."""
    hidden, weight, targets = torch.randn(4096, 8), torch.randn(16, 8), torch.randint(16, (4096,))
    monkeypatch.setattr(gradients_by_hand, "LOGITS", 16 * 16)
    exact = linear_cross_entropy(hidden.bfloat16().float(), weight.bfloat16().float(), targets)
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=2e-3, atol=0)


def test_linear_cross_entropy_under_autocast_is_near_float32():
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True)
    targets = torch.randint(100, (64,))
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_cross_entropy(hidden, weight, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0)
    for a, b in zip(gradients(rough, hidden, weight), gradients(exact, hidden, weight), strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_perplexity_is_the_number_of_equally_likely_tokens():
    torch.testing.assert_close(perplexity(torch.zeros(3, 4, 17), torch.zeros(3, 4).long()), torch.tensor(17.0))


def test_linear_cross_entropy_of_bfloat16_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(200, 64).bfloat16().requires_grad_()
    weight = torch.randn(1000, 64).bfloat16()
    loss = linear_cross_entropy(hidden, weight, targets := torch.randint(1000, (200,)))
    expected = cross_entropy((hidden @ weight.T).double(), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
