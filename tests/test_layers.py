"""The layers: against torch.nn, and by what must hold."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lm.layers import (
    Embedding,
    Linear,
    MultiHeadSelfAttention,
    RMSNorm,
    RotaryPositionalEmbedding,
    SiLUFeedForward,
    SwiGLU,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_same_outputs_and_gradients(ours, theirs, *inputs):
    """Both modules give equal outputs, and equal gradients for the inputs and, in order, for the parameters."""
    a, b = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(a)
    leaves = [x for x in inputs if x.requires_grad]
    grads_a = torch.autograd.grad((a * weights).sum(), leaves + list(ours.parameters()))
    grads_b = torch.autograd.grad((b * weights).sum(), leaves + list(theirs.parameters()))
    torch.testing.assert_close(grads_a, grads_b, rtol=1e-4, atol=1e-5)


def copy_parameters(source, target):
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        b.data.copy_(a.data)


def test_linear_equals_torch():
    ours, theirs = Linear(6, 4), nn.Linear(6, 4, bias=False)
    copy_parameters(ours, theirs)
    assert_same_outputs_and_gradients(ours, theirs, torch.randn(2, 3, 6, requires_grad=True))


def test_embedding_equals_torch():
    ours, theirs = Embedding(11, 4), nn.Embedding(11, 4)
    copy_parameters(ours, theirs)
    assert_same_outputs_and_gradients(ours, theirs, torch.randint(11, (2, 9)))


def test_rms_norm_equals_torch():
    ours, theirs = RMSNorm(12), nn.RMSNorm(12, eps=1e-5)
    nn.init.normal_(ours.weight)
    copy_parameters(ours, theirs)
    for scale in (1.0, 1e-3, 1e3):
        assert_same_outputs_and_gradients(ours, theirs, (scale * torch.randn(2, 5, 12)).requires_grad_())


def test_rms_norm_computes_in_float32_and_returns_the_input_dtype():
    x = 300 * torch.randn(4, 16)  # the square of 300 overflows float16
    for dtype in (torch.float16, torch.bfloat16):
        norm = RMSNorm(16, dtype=dtype)
        y = norm(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.rms_norm(x.to(dtype).float(), (16,), eps=1e-5).to(dtype))


class TorchSwiGLU(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)
        self.w3 = nn.Linear(d_model, d_ff, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def test_swiglu_equals_torch():
    ours, theirs = SwiGLU(8, 24), TorchSwiGLU(8, 24)
    copy_parameters(ours, theirs)
    for scale in (1.0, 100.0):
        assert_same_outputs_and_gradients(ours, theirs, (scale * torch.randn(2, 5, 8)).requires_grad_())


def test_silu_feed_forward_equals_torch():
    ours = SiLUFeedForward(8, 24)
    theirs = nn.Sequential(nn.Linear(8, 24, bias=False), nn.SiLU(), nn.Linear(24, 8, bias=False))
    copy_parameters(ours, theirs)
    assert_same_outputs_and_gradients(ours, theirs, torch.randn(2, 5, 8, requires_grad=True))


def rotate_by_definition(x, positions, theta):
    """RoPE as multiplication of complex numbers."""
    d_k = x.shape[-1]
    angles = positions[..., None] * theta ** (-torch.arange(0, d_k, 2) / d_k)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles.double())).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("shape", [(9, 8), (2, 9, 8), (2, 3, 9, 8)])
def test_rope_equals_complex_multiplication(shape):
    rope = RotaryPositionalEmbedding(10_000.0, 8, 32)
    x = torch.randn(shape, requires_grad=True)
    positions = torch.randint(32, (9,))
    ours, theirs = rope(x, positions), rotate_by_definition(x, positions, 10_000.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(shape)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), x), torch.autograd.grad((theirs * weights).sum(), x)
    )


def test_rope_takes_positions_per_sequence():
    rope = RotaryPositionalEmbedding(100.0, 4, 16)
    x, positions = torch.randn(3, 5, 4), torch.randint(16, (3, 5))
    one_by_one = torch.stack([rope(a, p) for a, p in zip(x, positions, strict=True)])
    torch.testing.assert_close(rope(x, positions), one_by_one)


def test_rope_scores_depend_on_the_distance_only():
    rope = RotaryPositionalEmbedding(10_000.0, 16, 256)
    q, k = torch.randn(2, 1, 16)
    scores = {
        (i, j): float((rope(q, torch.tensor([i])) * rope(k, torch.tensor([j]))).sum()) for i, j in [(5, 2), (205, 202)]
    }
    assert scores[5, 2] == pytest.approx(scores[205, 202], abs=1e-4)
    assert scores[5, 2] != pytest.approx(float((q * k).sum()), abs=1e-3)


def test_rope_made_without_memory_has_its_tables_when_it_gets_some():
    rope = RotaryPositionalEmbedding(10_000.0, 8, 32, device="meta").to_empty(device="cpu")
    assert torch.equal(rope.cos, RotaryPositionalEmbedding(10_000.0, 8, 32).cos)


def test_rope_keeps_lengths_and_starts_at_the_identity():
    rope = RotaryPositionalEmbedding(10_000.0, 16, 64)
    x = torch.randn(64, 16)
    rotated = rope(x, torch.arange(64))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[0], x[0], rtol=0, atol=0)


def test_rope_tables_are_no_part_of_the_state_dict():
    assert RotaryPositionalEmbedding(10_000.0, 16, 64).state_dict() == {}


def test_rope_tables_stay_float32():
    rope = RotaryPositionalEmbedding(10_000.0, 16, 64)
    exact = rope.cos.clone()
    rope.bfloat16()
    assert torch.equal(rope.cos, exact)
    assert rope(torch.randn(5, 16).bfloat16(), torch.arange(5)).dtype == torch.bfloat16


def test_rope_is_exact_far_from_the_beginning():
    rope = RotaryPositionalEmbedding(10_000.0, 64, 4096)
    exact = [math.cos(4095 * 10_000.0 ** (-i / 64)) for i in range(0, 64, 2)]
    torch.testing.assert_close(rope.cos[-1], torch.tensor(exact), rtol=0, atol=1e-6)


def test_rope_refuses_an_odd_size():
    with pytest.raises(ValueError, match="d_k=5 must be even"):
        RotaryPositionalEmbedding(10_000.0, 5, 8)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_attention_equals_torch(batch):
    ours = MultiHeadSelfAttention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    theirs.in_proj_weight.data.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]).data)
    theirs.out_proj.weight.data.copy_(ours.output_proj.weight.data)
    x = torch.randn(*batch, 10, 12)
    flat = x.reshape(-1, 10, 12)
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    expected, _ = theirs(flat, flat, flat, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected.reshape(x.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_library_kernel_equals_attention_from_scratch(batch):
    rope = RotaryPositionalEmbedding(10_000.0, 4, 16)
    scratch, fused = (MultiHeadSelfAttention(12, 3, rope, attention=kind) for kind in ("scratch", "fused"))
    fused.load_state_dict(scratch.state_dict())
    assert_same_outputs_and_gradients(scratch, fused, torch.randn(*batch, 10, 12, requires_grad=True))


def test_attention_uses_given_positions():
    attention = MultiHeadSelfAttention(12, 3, RotaryPositionalEmbedding(10.0, 4, 64))
    x = torch.randn(2, 10, 12)
    torch.testing.assert_close(attention(x), attention(x, torch.arange(10)))
    torch.testing.assert_close(attention(x), attention(x, torch.arange(10).expand(2, 10) + 30), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attention(x), attention(x, 2 * torch.arange(10)), atol=1e-3)


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_heads=3 must divide d_model=16"):
        MultiHeadSelfAttention(16, 3)


def test_the_initialisation_is_the_handouts():
    torch.manual_seed(0)
    linear, embedding = Linear(300, 500), Embedding(1000, 200)
    std = math.sqrt(2 / 800)
    assert linear.weight.shape == (500, 300)
    assert linear.weight.std().item() == pytest.approx(std, rel=0.03)  # the cut takes 1.3 % off
    assert 2.9 * std < linear.weight.abs().max() <= 3 * std
    assert embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    assert 2.9 < embedding.weight.abs().max() <= 3
    assert RMSNorm(7).weight.eq(1).all()


def test_parameters_take_device_and_dtype():
    for layer in (
        Linear(4, 4, "cpu", torch.float64),
        Embedding(4, 4, "cpu", torch.float64),
        RMSNorm(4, 1e-5, "cpu", torch.float64),
        SwiGLU(4, 4, "cpu", torch.float64),
        SiLUFeedForward(4, 4, "cpu", torch.float64),
        MultiHeadSelfAttention(4, 2, None, "cpu", torch.float64),
    ):
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
